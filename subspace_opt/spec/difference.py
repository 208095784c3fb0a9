"""The difference of two specs by place: only what differs, with defaults written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from .model import Spec

RULE_PLACES = ("momentum", "inside", "complement", "finish", "apply")
MISSING = None


class Change(NamedTuple):
    """One value that differs. None stands for a field, a rule or a pipeline that one of the two specs lacks."""

    pipeline: str  # "" for what is outside the pipelines; "all / matrix" for two pipelines of different names
    place: str  # selector, inside, mix, ...; a number is added if the place has several rules
    field: str  # "kind", "rank", ...; "" for a place that is one value
    old: Any
    new: Any

    @property
    def path(self) -> str:
        """The dotted path, as `--set` takes it for pipelines of one name."""
        return ".".join(part for part in (self.pipeline, self.place, self.field) if part)


def differences(old: Spec, new: Spec) -> list[Change]:
    """Every value in which two specs differ: defaults, pipelines by place, routes, roles. Names and prose are left out."""
    a, b = old.model_dump(mode="json"), new.model_dump(mode="json")
    found = list(_fields("", "defaults", a["defaults"], b["defaults"]))
    for name, mine, other in _paired(a["pipelines"], b["pipelines"]):
        found += _pipeline(name, mine, other)
    found += _lists("routes", [_routed(route) for route in old.routes], [_routed(route) for route in new.routes])
    found += _fields("", "roles", a["roles"], b["roles"])
    return found


def _routed(route: Any) -> str:
    return f"{route} -> {route.use}"


def _paired(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Pipelines of one name; a pipeline alone on its side is compared with all that are left on the other."""
    left, right = [name for name in a if name not in b], [name for name in b if name not in a]
    yield from ((name, a[name], b[name]) for name in a if name in b)
    lone, many = (left or list(a), right) if len(a) == 1 else (left, right or list(b)) if len(b) == 1 else ([], [])
    if len(a) == 1 and right:
        yield from ((f"{lone[0]} / {name}", a[lone[0]], b[name]) for name in many)
    elif len(b) == 1 and left:
        yield from ((f"{name} / {many[0]}", a[name], b[many[0]]) for name in lone)
    else:
        yield from ((name, a[name], MISSING) for name in left)
        yield from ((name, MISSING, b[name]) for name in right)


def _pipeline(name: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Iterator[Change]:
    if a is None or b is None:
        yield Change(name, "", "", a, b)
        return
    for place in a:
        if place in RULE_PLACES:
            yield from _rules(name, place, a[place], b[place])
        else:
            yield from _fields(name, place, a[place], b[place])


def _rules(name: str, place: str, a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> Iterator[Change]:
    """The rules of one place, in their order: rules of one kind are compared with each other."""
    pairs: list[tuple[Any, Any]] = []
    kinds = [rule["kind"] for rule in a], [rule["kind"] for rule in b]
    for _, i, j, k, l in SequenceMatcher(None, *kinds, autojunk=False).get_opcodes():  # noqa: E741
        mine, other = list(a[i:j]), list(b[k:l])
        length = max(len(mine), len(other))
        pairs += zip(mine + [MISSING] * (length - len(mine)), other + [MISSING] * (length - len(other)), strict=True)
    for index, (rule, other_rule) in enumerate(pairs):
        yield from _fields(name, place if len(pairs) == 1 else f"{place}.{index}", rule, other_rule)


def _fields(name: str, place: str, a: Any, b: Any) -> Iterator[Change]:
    """The fields of a component, or one value."""
    if not isinstance(a, Mapping) and not isinstance(b, Mapping):
        if a != b:
            yield Change(name, place, "", a, b)
        return
    a, b = (side if isinstance(side, Mapping) else {} for side in (a, b))
    for key in dict.fromkeys((*a, *b)):
        old, new = a.get(key, MISSING), b.get(key, MISSING)
        if old != new:
            yield Change(name, place, key, old, new)


def _lists(place: str, a: Sequence[str], b: Sequence[str]) -> Iterator[Change]:
    """Lines of two ordered lists that differ."""
    for _, i, j, k, l in (code for code in SequenceMatcher(None, a, b, autojunk=False).get_opcodes() if code[0] != "equal"):  # noqa: E741
        for index in range(max(j - i, l - k)):
            mine, other = a[i + index] if i + index < j else MISSING, b[k + index] if k + index < l else MISSING
            yield Change("", place, str(min(i, k) + index), mine, other)
