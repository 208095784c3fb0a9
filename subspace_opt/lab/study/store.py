"""Finished runs on disk, one JSON object a line: an interrupted study continues, and a repeated one costs nothing."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import LabError
from ..run.journal import make_folder
from .records import Record, from_line, to_line


class Store:
    """The records in a folder. Each process appends to a file of its own and reads those of all.

    Raises:
        LabError: the folder cannot be made.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = make_folder(folder)
        self.path = self.folder / (f"runs-{rank}.jsonl" if rank else "runs.jsonl")
        self.records: dict[str, Record] = {}
        whole, newline, cut = self.path.read_bytes().rpartition(b"\n") if self.path.exists() else (b"", b"", b"")
        if cut:  # a process that was killed while it wrote has left half a line; that run is made again
            self.path.write_bytes(whole + newline)

    def read(self) -> Store:
        """Read what all processes have stored so far. No other process may be in `__init__` meanwhile.

        Raises:
            LabError: a line that is not the last of its file is damaged.
        """
        for path in sorted(self.folder.glob("runs*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines, start=1):
                try:
                    record = from_line(line)
                except (ValueError, TypeError, KeyError) as error:
                    if number == len(lines):  # another process is writing it, or was killed while it did
                        continue
                    raise LabError(
                        f"{path}:{number}: this line is no record of a run that this version can read. Remove the line to make the run "
                        "again, or choose another folder"
                    ) from error
                self.records[record.key] = record
        return self

    def add(self, record: Record) -> None:
        """Store a finished run. It is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(to_line(record) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.records[record.key] = record
