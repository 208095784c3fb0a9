"""The specs of a study as YAML: the part that all share, and the rest of each. All pure."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .... import SpecError, load_spec
from ..records import Entry

_PROSE = ("about", "notes", "published")
_Path = tuple[str, ...]


@dataclass(frozen=True)
class SpecText:
    """The spec of one optimizer as YAML."""

    label: str
    whole: str
    rest: str  # without the part that all specs of the study share
    note: str = ""  # why the spec is shown as stored


def spec_texts(entries: Sequence[Entry]) -> tuple[str, list[SpecText]]:
    """(shared YAML, texts of each optimizer). A component, a mapping with `kind`, is shared as a whole or not at all."""
    read = [_read(_as_run(entry)) for entry in entries]
    leaves = [dict(_leaves(plain)) for plain, _ in read]
    shared = {path: value for path, value in leaves[0].items() if len(leaves) > 1 and all(_has(other, path, value) for other in leaves)}
    if set(shared) <= {("version",)}:
        shared = {}
    texts = [
        SpecText(entry.label, _yaml(plain), _yaml(_tree({path: value for path, value in own.items() if path not in shared})), note)
        for entry, own, (plain, note) in zip(entries, leaves, read, strict=True)
    ]
    return _yaml(_tree(shared)), texts


def _has(leaves: Mapping[_Path, Any], path: _Path, value: Any) -> bool:
    return path in leaves and leaves[path] == value


def _as_run(entry: Entry) -> dict[str, Any]:
    return next((record.spec for record in entry.finals if record.spec), entry.spec)


def _read(spec: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(the spec without defaults and prose, "") or (the stored mapping, the reason why it cannot be read here)."""
    from ruamel.yaml import YAML

    if not spec.get("pipelines"):
        return _without_prose(spec), ""
    try:
        plain = YAML(typ="safe").load(load_spec(spec).to_yaml())
    except SpecError as error:
        return _without_prose(spec), f"shown as stored, because this installation cannot read it: {str(error).splitlines()[0]}"
    return _without_prose(plain), ""


def _without_prose(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in _PROSE}


def _leaves(value: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for key, inner in value.items():
        here = (*path, str(key))
        if isinstance(inner, Mapping) and inner and "kind" not in inner:
            yield from _leaves(inner, here)
        else:
            yield here, inner


def _tree(leaves: Mapping[_Path, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in leaves.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return root


def _yaml(plain: Mapping[str, Any]) -> str:
    """YAML with components and short lists on one line each; empty for an empty mapping."""
    from ruamel.yaml import YAML

    if not plain:
        return ""
    out, yaml = io.StringIO(), YAML()
    yaml.width = 52  # fits into a card of the page
    yaml.dump(_flowing(plain), out)
    return out.getvalue()


def _flowing(value: Any, depth: int = 0) -> Any:
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    is_leaf = isinstance(value, list) or (isinstance(value, Mapping) and ("kind" in value or (depth and not _has_mapping(value))))
    if is_leaf and not (isinstance(value, list) and any(isinstance(item, Mapping) for item in value)):
        node = CommentedMap(value) if isinstance(value, Mapping) else CommentedSeq(value)
        node.fa.set_flow_style()
        return node
    if isinstance(value, Mapping):
        return {key: _flowing(inner, depth + 1) for key, inner in value.items()}
    return [_flowing(item, depth + 1) for item in value] if isinstance(value, list) else value


def _has_mapping(value: Mapping[str, Any]) -> bool:
    lists = [item for inner in value.values() if isinstance(inner, list) for item in inner]
    return any(isinstance(inner, Mapping) for inner in (*value.values(), *lists))
