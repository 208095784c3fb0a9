"""Snapshots of a training run on any number of ranks. A snapshot is complete or absent, whenever a process dies.

In: a model, its optimizer, a folder and a step. Out: a folder `step-00000100` with sharded files and a manifest, or a `SnapshotError`.
Loading changes nothing before everything has been verified.

    save        state of model and optimizer -> sharded files (torch.distributed.checkpoint) -> manifest -> one rename
    load        manifest verified -> files read into copies -> all compared -> optimizer, then model

torch.distributed.checkpoint writes the tensors under canonical names, so another number of ranks can load them. All other values (options
of parameter groups, `extra`) go into one more file, which is read with `weights_only=True`.

`import subspace_opt` does not import this package, because torch.distributed.checkpoint is slow to import: use
`from subspace_opt import snapshots`.
"""

from __future__ import annotations

import logging
import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from .. import __version__
from . import manifest
from .content import MODEL, Content, arranged, check_model, check_optimizer, empty_like_saved, packed_rest
from .manifest import Manifest, SnapshotError
from .ranks import Ranks

__all__ = ["Pending", "Snapshot", "SnapshotError", "async_save", "complete", "discard", "latest", "load", "save"]

Folder = str | os.PathLike[str]
REST = "rest.pt"  # all values that are not tensors
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The snapshot that `load` has loaded."""

    step: int
    extra: Any
    path: Path


# -------------------------------------------------------------------------------------------------------------------------- public


def complete(folder: Folder) -> list[int]:
    """The steps of all complete snapshots, ascending. Only `load` verifies the contents of their files."""
    return manifest.complete(Path(folder))


def latest(folder: Folder) -> int | None:
    """The step of the newest complete snapshot; None if there is none."""
    return next(reversed(complete(folder)), None)


def save(
    folder: Folder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    extra: Any = None,
    keep: int = 2,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Save model and optimizer as `step-00000100` in `folder`, then remove all complete snapshots except the newest `keep`. A collective.

    If a rank is killed at any moment, or the disk fails, the earlier snapshots stay complete.

    Args:
        folder: A folder for this run only, on a file system that all ranks share.
        model: A plain module, or one under DistributedDataParallel or fully_shard.
        step: A step later than every snapshot in the folder.
        extra: Everything else that the run needs to continue: tensors, numbers, strings, lists, dicts (read with
            `torch.load(weights_only=True)`). Only the value of rank 0 is saved.
        keep: The number of snapshots to keep, at least 1.
        process_group: The ranks that save together; all ranks by default.

    Returns:
        The path of the snapshot.

    Raises:
        SnapshotError: the step is not later than all snapshots, `extra` could not be loaded again, or the disk failed.
    """
    _finish_pending()
    ranks = Ranks.of(process_group)
    content, packed = _content(ranks, model, optimizer, step, extra, keep)
    return _write(ranks, Path(folder), step, content.tensors, packed, keep)


def async_save(
    folder: Folder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    extra: Any = None,
    keep: int = 2,
    process_group: dist.ProcessGroup | None = None,
) -> Pending:
    """Copy the state to host memory, return, and write the snapshot in the background as `save` would. A collective.

    Only one save runs at a time: the next `save`, `async_save` or `load` waits for it and raises its error. With more than one rank the
    function needs its own gloo group, made once with `torch.distributed.new_group(backend="gloo")`, because its messages would mix with
    those of training on a group that training uses.
    """
    _finish_pending()
    ranks = Ranks.of(process_group)
    ranks.check_background()
    content, packed = _content(ranks, model, optimizer, step, extra, keep)
    stager = DefaultStager(
        StagingOptions(False, False, False, False)
    )  # not pinned, not shared, synchronous; positional, because the names differ between versions of torch
    copied = stager.stage(content.tensors)
    assert isinstance(copied, dict)  # an asynchronous stager would return a future

    def write() -> Path:
        try:
            return _write(ranks, Path(folder), step, copied, packed, keep)
        finally:
            stager.close()

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")  # at exit Python waits for its thread
    _pending.append(Pending(executor.submit(write), step))
    executor.shutdown(wait=False)
    return _pending[-1]


def load(
    folder: Folder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Snapshot:
    """Load the newest snapshot, or that of `step`, on any number of ranks. A collective.

    Everything is read, verified and compared before model or optimizer change.

    Raises:
        SnapshotError: there is no snapshot; a file is missing, unknown, truncated or damaged; model or optimizer do not match.
        CheckpointError: the optimizer's state belongs to another spec or version.
    """
    _finish_pending()
    _without_warning()
    ranks = Ranks.of(process_group)
    path, found = _verified(ranks, Path(folder), step)
    own = Content.template(model, optimizer)

    def fitting() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        check_model(path, own, rest, metadata)
        groups = arranged(path, rest["param_groups"], own.groups)
        check_optimizer(path, own, rest, metadata, groups, optimizer)
        return {key: empty_like_saved(key, entry, own, rest["slots"]) for key, entry in metadata.items()}, rest, groups

    tensors, rest, groups = ranks.every_rank(fitting)
    _read(path, tensors, process_group)
    values = {**rest["values"], **tensors}
    state: dict[str, dict[str, Any]] = {}
    for key, (name, slot) in rest["slots"].items():
        state.setdefault(name, {})[slot] = values[key]
    # The optimizer may refuse its state; the model must be unchanged on all ranks then.
    ranks.every_rank(lambda: optimizer.load_state_dict({"state": state, "param_groups": groups}))
    set_model_state_dict(model, {key.removeprefix(MODEL): value for key, value in values.items() if key.startswith(MODEL)})
    return Snapshot(step=found.step, extra=rest["extra"], path=path)


def discard(folder: Folder, *, after: int, process_group: dist.ProcessGroup | None = None) -> None:
    """Remove all snapshots later than step `after`, damaged ones included, to continue the run from there. A collective."""
    _finish_pending()
    root = Path(folder)

    def remove() -> None:
        for step in manifest.named(root):
            if step > after:
                manifest.remove(root, step)

    Ranks.of(process_group).on_rank_0(remove)


class Pending:
    """A save that runs in the background."""

    def __init__(self, future: Future[Path], step: int) -> None:
        self.step = step
        self._future = future
        self._reported = False
        future.add_done_callback(self._report)

    def done(self) -> bool:
        """True if the save has ended, with or without an error."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Path:
        """Wait for the save and return the path of the snapshot, or raise the error of the save."""
        try:
            return self._future.result(timeout)
        finally:
            self._reported = self._future.done()

    def finish(self) -> None:
        """Wait for the save and raise its error, unless `result` has already returned or raised."""
        if not self._reported:
            self.result()

    def _report(self, future: Future[Path]) -> None:
        """Log the error of the save, because the process may end before `result` is called."""
        if error := future.exception():
            _log.error("the snapshot of step %d was not saved: %s", self.step, error)


_pending: list[Pending] = []  # at most one in this process


def _finish_pending() -> None:
    """Wait for the save in the background, if there is one, and raise its error.

    A running save is not an error: ranks finish at different times, and all of them must do the same.
    """
    while _pending:
        _pending.pop().finish()


def _content(
    ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, extra: Any, keep: int
) -> tuple[Content, bytes | None]:
    """The state to save, and on rank 0 the bytes of the file with all values that are not tensors."""
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    content = Content.now(model, optimizer)
    return content, ranks.every_rank(lambda: packed_rest(content, optimizer, extra) if ranks.rank == 0 else None)


# ------------------------------------------------------------------------------------------------------------------------- reading


def _verified(ranks: Ranks, folder: Path, step: int | None) -> tuple[Path, Manifest]:
    """The snapshot to load and its manifest, after each rank has verified its part of the files."""
    path, found = ranks.on_rank_0(lambda: manifest.choose(folder, step))
    mine = manifest.assign_files({name: size for name, (size, _) in found.files.items()}, ranks.size)[ranks.rank]
    unknown = ranks.on_rank_0(lambda: manifest.unknown_files(path, found))
    manifest.raise_problems(path, sum(ranks.gather(lambda: manifest.find_faults(path, found, mine)), unknown))
    return path, found


def _read(path: Path, tensors: dict[str, Any], process_group: dist.ProcessGroup | None) -> None:
    """Fill `tensors` from the files of a snapshot."""
    try:
        dcp.load(
            tensors,
            storage_reader=dcp.FileSystemReader(path),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=process_group,
        )
    except dcp.CheckpointException as error:
        raise _failed(error, f"{path} could not be read: {{reasons}}. {manifest.remedy(path)}") from error


# ------------------------------------------------------------------------------------------------------------------------- writing


def _write(ranks: Ranks, folder: Path, step: int, tensors: dict[str, Any], packed: bytes | None, keep: int) -> Path:
    _without_warning()
    partial = ranks.on_rank_0(lambda: manifest.begin(folder, step))
    try:
        metadata = dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(partial, sync_files=True, overwrite=False),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=ranks.group,
        )
    except dcp.CheckpointException as error:
        raise _failed(
            error,
            f"step {step} could not be saved in {folder}: {{reasons}}. The earlier snapshots are unchanged; make room, or choose another "
            "folder",
        ) from error

    def listed() -> dict[str, int]:
        assert packed is not None
        manifest.write(partial / REST, packed)
        sizes = manifest.sizes_in(partial)
        written = {info.relative_path for info in (metadata.storage_data or {}).values()}
        if unseen := sorted(written - set(sizes)):
            raise SnapshotError(
                f"rank 0 does not see {unseen[0]} in {folder}, which another rank wrote: choose a folder that all ranks share"
            )
        return sizes

    mine = manifest.assign_files(ranks.on_rank_0(listed), ranks.size)[ranks.rank]
    files: dict[str, tuple[int, str]] = {}
    for part in ranks.gather(lambda: manifest.digests(partial, mine)):
        files.update(part)
    whole = Manifest(step=step, world_size=ranks.size, files=files, torch=str(torch.__version__), subspace_opt=__version__)
    return ranks.on_rank_0(lambda: manifest.publish(partial, whole, keep))


def _failed(error: dcp.CheckpointException, text: str) -> BaseException:
    """The exception to raise for the failures that torch has collected from all ranks.

    A SnapshotError with `text`, in which the failures replace `{reasons}`; the exception itself if one is a KeyboardInterrupt or the like.
    """
    causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
    for cause in causes.values():
        if not isinstance(cause, Exception):
            return cause
    return SnapshotError(text.replace("{reasons}", "; ".join(f"rank {rank}: {type(c).__name__}: {c}" for rank, c in causes.items())))


def _without_warning() -> None:
    """Silence torch's warning that it saves or loads in a single process, which is intended here.

    The filter stays. `catch_warnings` would restore the filters of other threads when a save in the background ends.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
