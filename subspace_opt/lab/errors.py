"""The error classes of the lab. A caller can tell a mistake of the user from a bug with one `except`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run.events import Result


class LabError(RuntimeError):
    """A request cannot be carried out; the message says why and what to do instead."""


class DivergedError(LabError):
    """A loss or a gradient norm was not finite. `result` is the outcome of the run up to there."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result
