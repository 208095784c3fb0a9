"""Events on their way out: to the caller, and one JSON object a line to `log.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import LabError
from .events import Event, OnEvent, record

LOG = "log.jsonl"


class Journal:
    """Call it with an event. `folder=None` writes nothing.

    Raises LabError where the folder cannot be made.
    """

    def __init__(self, folder: Path | None, on_event: OnEvent | None) -> None:
        self.path = make_folder(folder) / LOG if folder else None
        self.on_event = on_event

    def __call__(self, event: Event) -> None:
        if self.path:
            with self.path.open("a", encoding="utf-8") as log:  # closed each time, so a killed run keeps its log
                log.write(json.dumps(record(event)) + "\n")
        if self.on_event:
            self.on_event(event)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, where the checkpoint stands: those steps are about to be made again."""
        if self.path and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if step else []
            known = [(line, _step(line)) for line in lines]
            kept = [line + "\n" for line, at in known if at is not None and at <= step]
            self.path.write_text("".join(kept), encoding="utf-8")


def make_folder(folder: Path) -> Path:
    """The folder, there from now on. Raises LabError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"out: {folder} cannot be made a folder: {error.strerror}. Choose another") from error
    return folder


def _step(line: str) -> int | None:
    """The step of a logged event, or None for a line that a kill cut short."""
    try:
        found: Any = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return int(found)
