"""Checkpoints that are whole or absent: whenever the process dies, the last complete one can be loaded.

The new file is written beside the old one, flushed to the disk, and only then takes its name; the old one stays as
`last.prev.pt`, so a file that the disk spoils later does not take the run with it.
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
    """The checkpoint to go on from: the last, or the one before where the last is gone."""
    return next((path for path in (folder / LAST, folder / PREVIOUS) if path.exists()), None)


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Save and return the path. A kill at any moment leaves `last.pt` or `last.prev.pt` complete.

    Raises LabError where the disk refuses; what was there before is untouched.
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
            f"{f'{kept.name} is untouched' if kept else 'Nothing was saved'}; make room or choose another folder"
        ) from error
    return last


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU.

    Raises LabError for a file that is cut short, damaged, or of another format.
    """
    try:
        with ZipFile(path) as parts:
            if broken := parts.testzip():  # torch writes checksums and does not look at them
                raise BadZipFile(broken)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage happens to look like
        raise LabError(f"{path} is cut short or damaged and cannot be loaded. {_remedy(path)}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise LabError(f"{path} is no checkpoint of this program (format {found}, wanted {FORMAT}). {_remedy(path)}")
    return dict(content)


def _remedy(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name == LAST and previous.exists():
        return f"Move it away and resume again: the run then goes on from {previous.name}, the checkpoint before it"
    return "Move it away and start the run again: no other checkpoint is in this folder"
