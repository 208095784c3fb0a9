"""Flush folders to the disk, so that new files survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def flush_names(folder: Path) -> None:
    """Write the folder's entries to the disk: a new or renamed file is safe only after its folder has been flushed.

    Does nothing on Windows, which cannot open folders.
    """
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
