"""Snapshots of a training run on any number of ranks, that are whole or absent whenever a process dies.

    save        state of model and optimizer -> sharded files (torch.distributed.checkpoint) -> manifest -> one rename
    load        manifest verified -> files read into copies -> all compared -> optimizer, then model

Tensors go through torch.distributed.checkpoint under canonical names, so another number of ranks may load them. What is no tensor
(options of parameter groups, `extra`) is one file beside them, read with `weights_only=True`.

Imported on its own, `from subspace_opt import snapshots`: torch.distributed.checkpoint takes its time to import.
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
from .content import MODEL, Content, arranged, check_model, check_optimizer, packed_rest, room
from .manifest import Manifest, SnapshotError
from .ranks import Ranks

__all__ = ["Pending", "Snapshot", "SnapshotError", "async_save", "complete", "discard", "latest", "load", "save"]

Folder = str | os.PathLike[str]
REST = "rest.pt"  # what is no tensor
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What `load` has loaded."""

    step: int
    extra: Any
    path: Path


# --------------------------------------------------------------------------------------------------------------------- the public


def complete(folder: Folder) -> list[int]:
    """Steps of all complete snapshots, ascending. What is in their files is verified by `load`."""
    return manifest.complete(Path(folder))


def latest(folder: Folder) -> int | None:
    """Step of the newest complete snapshot; None if there is none."""
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
    """Save model and optimizer as `step-00000100` in `folder`, and remove complete snapshots but the newest `keep`.

    All ranks call it. A kill at any moment, of any of them, leaves the snapshots that were there; a disk that refuses, too.

    Args:
        folder: On a file system that all ranks share, for one run alone.
        model: Plain, DistributedDataParallel or fully_shard.
        step: Later than every snapshot in the folder.
        extra: What else the run needs to go on, of rank 0: tensors, numbers, strings, lists, dicts (`torch.load(weights_only=True)`).
        process_group: The ranks that save together; all by default.

    Raises:
        SnapshotError: a step that is not the latest, an `extra` that could not be loaded again, a disk that refuses.
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
    """As `save`, in the background: the state is copied to host memory before this returns, so training may go on.

    One save is in flight at a time: the next `save`, `async_save` or `load` waits for it, and raises what it raised. With more than one
    rank it needs a gloo group of its own, made once by `torch.distributed.new_group(backend="gloo")`: on the group that training
    uses, its messages would run into those of training.
    """
    _finish_pending()
    ranks = Ranks.of(process_group)
    ranks.check_background()
    content, packed = _content(ranks, model, optimizer, step, extra, keep)
    stager = DefaultStager(
        StagingOptions(False, False, False, False)
    )  # not pinned, not shared, here and now; names differ between versions
    copied = stager.stage(content.tensors)
    assert isinstance(copied, dict)  # it would be a future if it were not now

    def write() -> Path:
        try:
            return _write(ranks, Path(folder), step, copied, packed, keep)
        finally:
            stager.close()

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")  # Python waits for its thread at exit
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
    """Load the newest snapshot, or that of `step`. All ranks call it; there may be more or fewer of them than saved it.

    All is read, verified and compared before model or optimizer change.

    Raises:
        SnapshotError: no snapshot; a file that is missing, foreign, cut short or damaged; another model or kind of optimizer.
        CheckpointError: the optimizer's state is of another spec or version.
    """
    _finish_pending()
    _without_warning()
    ranks = Ranks.of(process_group)
    path, found = ranks.lead(lambda: manifest.choose(Path(folder), step))
    mine = manifest.shares({name: size for name, (size, _) in found.files.items()}, ranks.size)[ranks.rank]
    problems = ranks.lead(lambda: manifest.strangers(path, found))
    manifest.refuse(path, sum(ranks.each(lambda: manifest.faults(path, found, mine)), problems))

    own = Content.template(model, optimizer)

    def fitting() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        check_model(path, own, rest, metadata)
        groups = arranged(path, rest["param_groups"], own.groups)
        check_optimizer(path, own, rest, metadata, groups, optimizer)
        return {key: room(key, entry, own, rest["slots"]) for key, entry in metadata.items()}, rest, groups

    tensors, rest, groups = ranks.every(fitting)
    try:
        dcp.load(
            tensors,
            storage_reader=dcp.FileSystemReader(path),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=process_group,
        )
    except dcp.CheckpointException as error:
        raise _failed(error, f"{path} could not be read: {{reasons}}. {manifest.remedy(path)}") from error
    values = {**rest["values"], **tensors}
    state: dict[str, dict[str, Any]] = {}
    for key, (name, slot) in rest["slots"].items():
        state.setdefault(name, {})[slot] = values[key]
    # The optimizer may refuse what it is given, and then the model must not have changed on any rank.
    ranks.every(lambda: optimizer.load_state_dict({"state": state, "param_groups": groups}))
    set_model_state_dict(model, {key.removeprefix(MODEL): value for key, value in values.items() if key.startswith(MODEL)})
    return Snapshot(step=found.step, extra=rest["extra"], path=path)


def discard(folder: Folder, *, after: int, process_group: dist.ProcessGroup | None = None) -> None:
    """Remove all snapshots of later steps than `after`, damaged ones too: a run is taken back to where it was. All ranks call it."""
    _finish_pending()
    root = Path(folder)

    def remove() -> None:
        for step in manifest.named(root):
            if step > after:
                manifest.remove(root, step)

    Ranks.of(process_group).lead(remove)


class Pending:
    """A save in the background."""

    def __init__(self, future: Future[Path], step: int) -> None:
        self.step = step
        self._future = future
        self._told = False
        future.add_done_callback(self._report)

    def done(self) -> bool:
        """Whether the snapshot is complete, or has failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Path:
        """The snapshot's path, once it is complete; raises what the save raised."""
        try:
            return self._future.result(timeout)
        finally:
            self._told = self._future.done()

    def finish(self) -> None:
        """Wait; raise what the save raised, unless `result` has."""
        if not self._told:
            self.result()

    def _report(self, future: Future[Path]) -> None:
        """The process may end before anybody asks."""
        if error := future.exception():
            _log.error("the snapshot of step %d was not saved: %s", self.step, error)


_pending: list[Pending] = []  # of this process, at most one


def _finish_pending() -> None:
    """Wait instead of raising that one is in flight: ranks finish at different times, and all of them must do the same."""
    while _pending:
        _pending.pop().finish()


def _content(
    ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, extra: Any, keep: int
) -> tuple[Content, bytes | None]:
    """What is to be saved, and on rank 0 the file of what is no tensor."""
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    content = Content.now(model, optimizer)
    return content, ranks.every(lambda: packed_rest(content, optimizer, extra) if ranks.rank == 0 else None)


# -------------------------------------------------------------------------------------------------------------------------- writing


def _write(ranks: Ranks, folder: Path, step: int, tensors: dict[str, Any], packed: bytes | None, keep: int) -> Path:
    _without_warning()
    partial = ranks.lead(lambda: manifest.begin(folder, step))
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
            f"step {step} could not be saved in {folder}: {{reasons}}. The snapshots before it are untouched; make room, or choose another "
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

    mine = manifest.shares(ranks.lead(listed), ranks.size)[ranks.rank]
    files: dict[str, tuple[int, str]] = {}
    for part in ranks.each(lambda: manifest.digests(partial, mine)):
        files.update(part)
    whole = Manifest(step=step, world_size=ranks.size, files=files, torch=str(torch.__version__), subspace_opt=__version__)
    return ranks.lead(lambda: manifest.publish(partial, whole, keep))


def _failed(error: dcp.CheckpointException, text: str) -> BaseException:
    """What to raise for a failure that torch has collected from all ranks; an interrupt stays one."""
    causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
    for cause in causes.values():
        if not isinstance(cause, Exception):
            return cause
    return SnapshotError(text.replace("{reasons}", "; ".join(f"rank {rank}: {type(c).__name__}: {c}" for rank, c in causes.items())))


def _without_warning() -> None:
    """torch warns that it saves and loads in one process, where that is what was asked.

    A filter that stays, since `catch_warnings` would take filters of other threads back when a save in the background ends.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
