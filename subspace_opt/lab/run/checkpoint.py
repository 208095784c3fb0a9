"""Checkpoints of a run. A checkpoint is complete or absent: whenever the process dies, the last complete one can be loaded.

A new file is written beside the old one, flushed to the disk, and then renamed to `last.pt`. The old file stays as `last.prev.pt`, so the
run can go on if the disk damages the new one later.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from ...checkpoint.files import flush_names
from ..errors import LabError

FORMAT = 1
LAST = "last.pt"
PREVIOUS = "last.prev.pt"


def newest(folder: Path) -> Path | None:
    """The path of the last checkpoint, or of the one before if the last is missing; None if there is neither."""
    return next((path for path in (folder / LAST, folder / PREVIOUS) if path.exists()), None)


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Save a checkpoint and return its path. If the process is killed at any moment, `last.pt` or `last.prev.pt` is complete.

    Raises:
        LabError: the file cannot be written; earlier checkpoints are unchanged.
    """
    last, fresh = folder / LAST, folder / f"{LAST}.tmp"
    try:
        with fresh.open("wb") as stream:
            torch.save({"format": FORMAT, **content}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if last.exists():
            os.replace(last, folder / PREVIOUS)
        os.replace(fresh, last)
        flush_names(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        fresh.unlink(missing_ok=True)
        kept = newest(folder)
        raise LabError(
            f"out: the checkpoint could not be written to {folder}: {error}. "
            f"{f'{kept.name} is unchanged' if kept else 'Nothing was saved'}; make room or choose another folder"
        ) from error
    return last


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, with its tensors on the CPU.

    Raises:
        LabError: the file is truncated, damaged, or of another format.
    """
    try:
        with ZipFile(path) as parts:
            if broken := parts.testzip():  # torch writes checksums and does not verify them
                raise BadZipFile(broken)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # depending on the damage, torch.load raises any exception
        raise LabError(f"{path} is truncated or damaged and cannot be loaded. {_remedy(path)}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise LabError(f"{path} is not a checkpoint of this program (format {found}, expected {FORMAT}). {_remedy(path)}")
    return dict(content)


def _remedy(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name == LAST and previous.exists():
        return f"Move it away and resume again: the run then continues from {previous.name}, the checkpoint before it"
    return "Move it away and start the run again: there is no other checkpoint in this folder"
