"""Reads a snapshot without its model and its optimizer, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from . import manifest
from .manifest import SnapshotError


def optimizer_state(folder: Path, step: int | None = None) -> tuple[Path, dict[str, Any]]:
    """The optimizer's state dictionary of the newest snapshot in a folder, or of that of `step`, on the CPU, and the snapshot's path.

    `folder` may also be one snapshot, `step-00000100`. Tensors that ranks shared are whole.

    Raises:
        SnapshotError: There is no snapshot, or a file of it is missing or damaged.
    """
    if (folder / manifest.MANIFEST).is_file() and folder.name.removeprefix("step-").isdecimal():
        folder, step = folder.parent, int(folder.name.removeprefix("step-"))
    path, found = manifest.choose(folder, step)
    manifest.raise_problems(path, manifest.find_faults(path, found, found.files) + manifest.unknown_files(path, found))
    rest = torch.load(path / "rest.pt", map_location="cpu", weights_only=True)
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {key: _empty(saved[key]) for key in rest["slots"] if key in saved}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        raise SnapshotError(f"{path} could not be read: {error}. {manifest.remedy(path)}") from error
    state: dict[str, dict[str, Any]] = {}
    for key, (name, slot) in rest["slots"].items():
        state.setdefault(name, {})[slot] = tensors[key] if key in tensors else rest["values"][key]
    return path, {"state": state, "param_groups": rest["param_groups"]}


def _empty(entry: Any) -> torch.Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)
