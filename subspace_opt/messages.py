"""From a validation error to a message: where, what, and what was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .registry import find, suggest

Path = tuple[int | str, ...]

MOST = 10  # errors shown


def describe(error: ValidationError, data: Any, locate: Callable[[Path], str], top: type[BaseModel]) -> str:
    """One line an error: `file:line:col: path: what is wrong`; `locate` tells where a path stands."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        path = _existing(item["loc"], data)
        line = f"{locate(path)}: " + (f"{'.'.join(map(str, path))}: " if path else "") + _what(item, path, data, top)
        if line not in lines:
            lines.append(line)
    extra = f"\n... and {len(lines) - MOST} more" if len(lines) > MOST else ""
    return "\n".join(lines[:MOST]) + extra


def _existing(loc: Path, data: Any) -> Path:
    """The location as the user wrote it: without the index of a list of one that was written bare, and pydantic's union tags."""
    path: list[int | str] = []
    for part in loc:
        if isinstance(data, Mapping) and isinstance(part, str):
            path.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            path.append(part)
            data = data[part] if part < len(data) else None
    return tuple(path)


def _what(item: Any, path: Path, data: Any, top: type[BaseModel]) -> str:
    kind, value = item["type"], item["input"]
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    if kind == "extra_forbidden":
        return f"unknown key '{path[-1]}'; {suggest(str(path[-1]), _known_keys(path[:-1], data, top))}"
    if kind == "missing":
        return "is required and missing"
    if kind in ("unknown_kind", "missing_kind"):
        return str(item["msg"])
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should", "should")
    if kind == "value_error" and isinstance(value, Mapping):
        return message
    return f"{message}, not {shown}"


def _known_keys(path: Path, data: Any, top: type[BaseModel]) -> list[str]:
    """The keys that the mapping at `path` may have."""
    kind: Any = top
    for part in path:
        data = data[part]
        kind = _below(kind, part, data)
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _below(kind: Any, part: int | str, data: Any) -> Any:
    """The type of a field of a model, or of a value in a container; the kind's class where a component stands."""
    if isinstance(data, Mapping) and isinstance(data.get("kind"), str):
        return find("selector" if part == "selector" else "rule", data["kind"])
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        return None if field is None else field.annotation
    arguments = [a for a in get_args(kind) if a is not ...]
    return arguments[-1] if arguments else None
