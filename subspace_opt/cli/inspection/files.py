"""Reads the optimizer's state dictionary from every kind of checkpoint that this package, its lab or a trainer writes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...checkpoint import CheckpointError
from ...engine import lowbit

IN_FOLDERS = ("last.pt", "last.prev.pt", "optimizer.pt", "optimizer.bin")  # of a lab run, transformers, accelerate


class Checkpoint(NamedTuple):
    """The optimizer's state dictionary of a checkpoint, and the file or folder that holds it."""

    path: Path
    optimizer: Mapping[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """The state dictionary of a file or folder, with its tensors on the CPU.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it has no state of this package's optimizers.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return Checkpoint(path, _optimizer_in(_loaded(path), path))
    inside = next((path / name for name in IN_FOLDERS if (path / name).is_file()), None)
    if inside is not None:
        return Checkpoint(inside, _optimizer_in(_loaded(inside), inside))
    from ...snapshots.reading import optimizer_state  # late: torch.distributed.checkpoint is slow to import

    return Checkpoint(*optimizer_state(path))


def _loaded(path: Path) -> Any:
    """The content of a file of `torch.save`."""
    try:
        return _loaded_once(path)
    except pickle.UnpicklingError as error:
        if "torchao" not in str(error):
            raise CheckpointError(
                f"{path} has objects that are unsafe to load, or is no file of torch.save; save the optimizer's state_dict() alone: "
                f"{str(error).splitlines()[0]}"
            ) from error
    lowbit.torchao_types()  # tells torch that codes of 8 and 4 bits are safe
    return _loaded_once(path)


def _loaded_once(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # depending on the damage, torch.load raises any exception
        raise CheckpointError(f"{path} is truncated, damaged, or no file of torch.save ({type(error).__name__}: {error})") from error


def _optimizer_in(content: Any, path: Path) -> Mapping[str, Any]:
    """The state dictionary itself, or that under `optimizer`, `optimizer_states` or the like."""
    for found in _candidates(content):
        if isinstance(found, Mapping) and {"state", "param_groups"} <= set(found):
            return found
    keys = f" It has {', '.join(map(str, list(content)[:8]))}." if isinstance(content, Mapping) else ""
    raise CheckpointError(f"{path} has no state dictionary of an optimizer.{keys} Save optimizer.state_dict(), alone or as `optimizer`")


def _candidates(content: Any) -> list[Any]:
    found = [content]
    if isinstance(content, Mapping):
        for name in ("optimizer", "optimizer_state_dict", "optimizer_states", "optim"):
            value = content.get(name)
            found += list(value) if isinstance(value, list | tuple) else [value]
    return found
