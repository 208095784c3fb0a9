"""Pass events to the caller, and append them to `log.jsonl` as one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import LabError
from .events import Event, OnEvent, record

LOG = "log.jsonl"


class Journal:
    """A function of an event that logs it and passes it on. With `folder=None` it writes nothing.

    Raises:
        LabError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, on_event: OnEvent | None) -> None:
        self.path = make_folder(folder) / LOG if folder else None
        self.on_event = on_event

    def __call__(self, event: Event) -> None:
        if self.path:
            with self.path.open("a", encoding="utf-8") as log:  # closed each time, so that the log survives a kill
                log.write(json.dumps(record(event)) + "\n")
        if self.on_event:
            self.on_event(event)

    def rewind(self, step: int) -> None:
        """Remove the events after `step` from the log, because a run that resumes there makes those steps again."""
        if self.path and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if step else []
            known = [(line, _step(line)) for line in lines]
            kept = [line + "\n" for line, at in known if at is not None and at <= step]
            self.path.write_text("".join(kept), encoding="utf-8")


def make_folder(folder: Path) -> Path:
    """Make the folder if it does not exist, and return it.

    Raises:
        LabError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"out: the folder {folder} cannot be made: {error.strerror}. Choose another") from error
    return folder


def _step(line: str) -> int | None:
    """The step of a logged event; None if the line is incomplete, as after a kill."""
    try:
        found: Any = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return int(found)
