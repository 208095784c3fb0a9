"""The numbers of a pipeline that are in force at one update of a parameter.

A later source wins: the spec, its schedules, `momentum` and `betas` of the parameter's group, `values` of the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..algebra.frame import Frame
from ..algebra.pipeline import MomentFields, Values, checked_value, moment_fields
from ..algebra.shaped import recent
from ..registry import suggest
from ..spec import Spec
from .rows import Row


class Numbers(NamedTuple):
    """Numbers that replace those of the pipeline, and the factors of learning rate and weight decay."""

    values: Values
    lr_scale: float
    decay_scale: float


def numbers_of(group: Mapping[str, Any], row: Row, count: int, given: Mapping[str, Values]) -> Numbers:
    """The numbers for the next update of a parameter.

    Args:
        group: The parameter's group, for `momentum` and `betas`.
        count: Updates that the parameter has had.
        given: The group's `values` by pipeline, from `checked_values`.

    Raises:
        ValueError: A decay rate of the group is not between 0 and 1.
    """
    moments = moment_values(group, row)
    if not row.splits or not (given or row.splits[0][1].scheduled):
        return Numbers(moments, row.lr_scale, row.decay_scale)
    found = {**dict(_scheduled_values(row.splits[0][1], count)), **dict(moments), **dict(given.get(row.pipeline, ()))}
    lr_scale, decay_scale = found.pop("lr_scale", row.lr_scale), found.pop("decay_scale", row.decay_scale)
    return Numbers(tuple(found.items()), lr_scale, decay_scale)


def _scheduled_values(frame: Frame, count: int) -> Values:
    """The values of all schedules; a first gradient that only sets the basis is not an update."""
    n = max(count - frame.primes, 0)
    made: Values = recent(
        frame.memo.setdefault("scheduled", {}), n, lambda: tuple((path, part.scheduled_at(name, n)) for path, part, name in frame.scheduled)
    )
    return made


def moment_values(group: Mapping[str, Any], row: Row) -> Values:
    """The decay rates that a group sets for the moments of a parameter. `momentum` comes before the first of `betas`.

    Raises:
        ValueError: A rate is not between 0 and 1. A scheduler may have set it.
    """
    first, betas = group.get("momentum"), group.get("betas")
    if (first is None and betas is None) or not row.splits:
        return ()
    memo = row.splits[0][1].memo
    if "moments" not in memo:
        memo["moments"] = moment_fields(row.splits[0][1].pipeline)
    fields: MomentFields = memo["moments"]
    pairs = [(fields.first, float(first))] if first is not None else []
    if betas is not None:
        pairs += [(fields.second, float(betas[1]))] + ([(fields.first, float(betas[0]))] if first is None else [])
    for _, value in pairs:
        if not 0 < value < 1:
            raise ValueError(f"a parameter group has momentum {first} and betas {betas}; decay rates are between 0 and 1")
    return tuple((path, value) for paths, value in pairs for path in paths)


def listed_values(given: Any) -> Values:
    """`values` of a group as pairs of path and number.

    Raises:
        ValueError: It is no mapping of paths to numbers. A tensor is refused, because reading it would wait for its device.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"`values` of a parameter group is {given!r}; it must be a mapping, such as {{'matrix.momentum.beta': 0.9}}")
    for path, value in given.items():
        if not isinstance(path, str) or isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"`values` of a parameter group has {path!r}: {value!r}; give a dotted path and a number of Python")
    return tuple(given.items())


def checked_values(spec: Spec, values: Values) -> dict[str, Values]:
    """`values` of a group by pipeline, with paths below the pipeline.

    Raises:
        ValueError: A path leads to no number of the spec, or a number cannot be used there.
    """
    found: dict[str, Values] = {}
    for path, value in values:
        where = f"`values` of a parameter group: '{path}' of spec '{spec.name}'"
        name, _, rest = path.partition(".")
        if name not in spec.pipelines:
            raise ValueError(f"{where}: no pipeline is named '{name}'; {suggest(name, spec.pipelines)}")
        try:
            found[name] = (*found.get(name, ()), (checked_value(spec.pipelines[name], rest, value), value))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return found
