"""Turn a validation error into a message: where it is, what was found, what is allowed and what was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..registry import Component, find, near, suggest
from ..schedules import schedule_model, scheduled_fields

Path = tuple[int | str, ...]

MOST = 10  # errors in one message

# The types that pydantic expects, in the words of a spec file.
WANTED = {
    "bool_type": "should be true or false",
    "dict_type": "should be a mapping",
    "float_type": "should be a number",
    "int_type": "should be a whole number",
    "list_type": "should be a list",
    "model_type": "should be a mapping",
    "string_type": "should be text",
    "tuple_type": "should be a list",
}


def describe(error: ValidationError, data: Any, locate: Callable[[Path], str], top: type[BaseModel]) -> str:
    """One line for each error: `file:line:column: path: what is wrong`. `locate` gives the position of a path."""
    found: dict[Path, list[str]] = {}
    meant: set[Path] = set()
    for item in sorted(error.errors(include_url=False), key=lambda item: item["type"] == "missing"):
        path = _existing((*item["loc"], *item.get("ctx", {}).get("place", ())), data)
        if item["type"] == "extra_forbidden":
            known = _known_keys(path[:-1], data, top)
            meant.add((*path[:-1], near(str(path[-1]), known) or ""))
            found[path] = [f"unknown key '{path[-1]}'; {suggest(str(path[-1]), known)}"]
        elif not (item["type"] == "missing" and path in meant):  # a misspelt key is reported once, not also as missing
            found.setdefault(path, []).append(_what(item))
    lines = [f"{locate(path)}: {_dotted(path)}{_joined(wrong)}" for path, wrong in found.items()]
    extra = f"\n... and {len(lines) - MOST} more" if len(lines) > MOST else ""
    return "\n".join(lines[:MOST]) + extra


def _dotted(path: Path) -> str:
    return f"{'.'.join(map(str, path))}: " if path else ""


def _joined(wrong: list[str]) -> str:
    """Join the errors of several branches of a union: `should be A, or B, not X`."""
    *first, last = dict.fromkeys(wrong)
    return "".join(f"{words.rpartition(', not ')[0]}, or " for words in first) + (last.removeprefix("should be ") if first else last)


def _existing(loc: Path, data: Any) -> Path:
    """The path as the user wrote it: without pydantic's union tags and without the index of a rule that is written without a list."""
    path: list[int | str] = []
    for part in loc:
        if isinstance(data, Mapping) and isinstance(part, str):
            path.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            path.append(part)
            data = data[part] if part < len(data) else None
    return tuple(path)


def _what(item: Any) -> str:
    """The error of one value."""
    kind, value = item["type"], item["input"]
    if kind == "missing":
        return "required, but missing"
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    if kind in ("unknown_kind", "missing_kind", "route") or (kind == "value_error" and isinstance(value, Mapping)):
        return message
    return f"{WANTED.get(kind, message)}, not {_shown(value)}"


def _shown(value: Any) -> str:
    """The value in the spelling of a file, cut to 80 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(path: Path, data: Any, top: type[BaseModel]) -> list[str]:
    """The keys that are allowed in the mapping at `path`."""
    kind: Any = top
    for part in path:
        data = data[part]
        kind = _below(kind, part, data)
    fields = kind.model_fields.items() if isinstance(kind, type) and issubclass(kind, BaseModel) else ()
    return sorted(field.alias or name for name, field in fields)


def _below(kind: Any, part: int | str, data: Any) -> Any:
    """The type of one field of a model, or of the values of a container; for a component, the class of its kind."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(part))
        if isinstance(data, Mapping) and part in scheduled_fields(kind):
            return schedule_model(data)
        kind = None if field is None else field.annotation
    else:
        kind = next((a for a in reversed(get_args(kind)) if a is not ...), None)
    if isinstance(data, Mapping):  # one rule may be written in place of a list of rules
        for family in (kind, *get_args(kind)):
            if isinstance(family, type) and issubclass(family, Component) and family.is_family:
                return find(family.family, str(data.get("kind", "none")))
    return kind
