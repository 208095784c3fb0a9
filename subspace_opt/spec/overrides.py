"""Overrides: set one value of a spec by its dotted path, such as `matrix.selector.rank`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ..registry import FAMILIES, find, suggest
from .document import DocumentError, parse_document
from .model import STANDARD_OTHER, Spec, SpecError


def to_mutable(value: Any) -> Any:
    """A copy in which every mapping is a dict and every sequence a list, such as those of omegaconf with interpolations resolved."""
    if isinstance(value, Mapping):
        return {key: to_mutable(v) for key, v in value.items()}
    return [to_mutable(v) for v in value] if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


def apply_override(data: dict[str, Any], path: str, value: Any) -> tuple[int | str, ...]:
    """Set one value by dotted path and return its place. The first part of the path is a field of the spec or the name of a pipeline.

    Raises:
        SpecError: a path that is malformed, or that leads to no field.
    """
    if not isinstance(path, str) or not all(path.split(".")):
        raise SpecError(f"override {path!r}: give a dotted path, such as 'matrix.selector.rank'")
    parts = path.split(".")
    if parts[0] not in Spec.model_fields:
        _name_pipeline(data, parts[0], path)
        parts = ["pipelines", *parts]
    node: Any = data
    place: list[int | str] = []
    for i, part in enumerate(parts):
        last, where = i == len(parts) - 1, ".".join(parts[:i])
        if isinstance(node, dict) and "kind" in node and part == "0" and not last:
            continue  # a list of one rule may be written as the rule itself: skip the index
        if isinstance(node, list) and len(node) == 1 and not part.isdigit():
            place.append(0)  # the index of the only rule may be left out
            node = _opened(node, 0, path, where)
        if isinstance(node, list) and (not part.isdigit() or int(part) >= len(node)):
            raise SpecError(
                f"override '{path}': {where} is a list of {len(node)}; give an index below {len(node)}, or replace the whole list"
            )
        key = int(part) if isinstance(node, list) else part
        place.append(key)
        if last:
            node[key] = value
        else:
            node = _opened(node, key, path, f"{where}.{part}" if where else part)
    return tuple(place)


def _name_pipeline(data: dict[str, Any], name: str, path: str) -> None:
    """Check the name of a pipeline. The standard pipeline `other` is written into `data`, so that the override can change it."""
    pipelines = data.setdefault("pipelines", {})
    if not isinstance(pipelines, dict):
        return
    known = [*pipelines] if data.get("routes") else [*pipelines, "other"]
    if name not in known:
        raise SpecError(
            f"override '{path}': '{name}' is neither a pipeline nor a field of a spec; {suggest(name, [*known, *Spec.model_fields])}"
        )
    pipelines.setdefault(name, copy.deepcopy(STANDARD_OTHER))


def _opened(node: Any, key: int | str, path: str, where: str) -> Any:
    """The mapping or list at `key`. A missing value becomes an empty mapping; the name of a kind becomes a mapping with it."""
    value = node.get(key) if isinstance(node, dict) else node[key]
    if value is None:
        value = {}
    elif isinstance(value, str) and key != "kind" and any(find(family, value) for family in FAMILIES):
        value = {"kind": value}
    if not isinstance(value, dict | list):
        raise SpecError(f"override '{path}': {where} is {value!r}, a value without fields; shorten the path")
    node[key] = value
    return value


def has_path(data: Any, path: tuple[int | str, ...]) -> bool:
    """True if `data` has an entry at `path`."""
    for part in path:
        if not isinstance(data, dict | list):
            return False
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def value_in_text(text: str, place: str) -> Any:
    """The plain value that one line of YAML gives, as in `matrix.selector.rank=128`.

    Args:
        place: Where the text stands; errors begin with it.

    Raises:
        SpecError: The text is not YAML of one line.
    """
    try:
        data = parse_document(f"value: {text}").data
    except DocumentError as error:
        raise SpecError(f"{place}: the value cannot be read: {str(error).partition(': ')[2]}") from None
    if list(data) != ["value"]:
        raise SpecError(f"{place}: the value must be one line of YAML, such as 128 or {{kind: svd, rank: 8}}")
    return data["value"]
