"""Sinks: callables that take a sample. Files of JSON lines, TensorBoard, and loggers shaped like wandb."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def scalars(sample: dict[str, Any], prefix: str = "subspace") -> Iterator[tuple[str, float]]:
    """The numbers of a sample under flat names, `subspace/blocks.0.weight/captured_gradient`. Words and lists are left out."""
    for layer, fields in sample["layers"].items():
        for name, value in fields.items():
            if isinstance(value, dict):
                yield from ((f"{prefix}/{layer}/{name}/{key}", float(number)) for key, number in value.items() if _is_number(number))
            elif _is_number(value):
                yield f"{prefix}/{layer}/{name}", float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def json_lines(path: str | Path) -> Callable[[dict[str, Any]], None]:
    """A sink that appends each sample to a file, one JSON object a line.

    The file is opened and closed for each sample, so a killed run loses none. Raises `OSError` now if the file cannot be written.
    """
    file = Path(path)
    with file.open("a", encoding="utf-8"):
        pass

    def write(sample: dict[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(sample) + "\n")

    return write


def tensorboard(writer: Any, prefix: str = "subspace") -> Callable[[dict[str, Any]], None]:
    """A sink for `torch.utils.tensorboard.SummaryWriter`, or any object with `add_scalar(name, value, step)`.

    Raises:
        TypeError: The object has no `add_scalar`.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"tensorboard() takes an object with add_scalar(name, value, step), not {type(writer).__name__}")

    def write(sample: dict[str, Any]) -> None:
        for name, value in scalars(sample, prefix):
            writer.add_scalar(name, value, sample["step"])

    return write


def logger(run: Any, prefix: str = "subspace") -> Callable[[dict[str, Any]], None]:
    """A sink for a wandb run, or any object with `log(dict, step=)`.

    Raises:
        TypeError: The object has no `log`.
    """
    if not callable(getattr(run, "log", None)):
        raise TypeError(f"logger() takes an object with log(dict, step=), such as a wandb run, not {type(run).__name__}")

    def write(sample: dict[str, Any]) -> None:
        run.log(dict(scalars(sample, prefix)), step=sample["step"])

    return write
