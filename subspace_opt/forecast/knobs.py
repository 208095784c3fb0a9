"""The knobs of a spec that trade quality for memory: the ranks of its selectors and the dtypes of its slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..algebra.core import Selector
from ..algebra.storage import StateDtype
from ..plan import Plan, Row
from ..spec import Spec

WIDTH: dict[StateDtype, float] = {"fp32": 4, "bf16": 2, "8bit": 1, "4bit": 0.5}  # bytes per entry
GRAIN = 16  # ranks are multiples of this: products of such sizes are fast, and slots fill the blocks of codes
FINEST = 64  # a rank that is a part of the short side is lowered to this part of itself at least


class Rank(NamedTuple):
    """The rank of a selector, with the place where an override sets it."""

    path: str
    value: float  # below 1: a part of the short side


def ranks(spec: Spec, plan: Plan) -> list[Rank]:
    """The ranks of all selectors that some parameter uses."""
    used = [name for name, rows in plan.by_pipeline.items() if any(frame.opens for row in rows for _, frame in row.splits)]
    return [rank for name in used for rank in _ranks_in(spec.pipelines[name].selector, f"pipelines.{name}.selector")]


def _ranks_in(selector: Selector, path: str) -> Iterator[Rank]:
    """The ranks of a selector and of the selectors inside it."""
    for name in type(selector).model_fields:
        value = getattr(selector, name)
        if name == "rank" and isinstance(value, int | float):
            yield Rank(f"{path}.rank", value)
        elif isinstance(value, Selector):
            yield from _ranks_in(value, f"{path}.{name}")


def shares(found: list[Rank]) -> list[float]:
    """The factors below 1 by which the search lowers all ranks together, largest first."""
    whole = [int(rank.value) for rank in found if rank.value >= 1]
    if not whole:
        parts = [*(k / GRAIN for k in range(GRAIN - 1, 0, -1)), *(1 / k for k in (2 * GRAIN, FINEST))]
        return parts if found else []
    most = max(whole)
    steps = [*range((most - 1) // GRAIN * GRAIN, 0, -GRAIN), *(rank for rank in (8, 4, 2, 1) if rank < most)]
    return [rank / most for rank in steps]


def lowered(found: list[Rank], share: float) -> dict[str, float]:
    """Overrides that multiply all ranks by a factor."""
    return {rank.path: _times(rank.value, share) for rank in found}


def _times(rank: float, share: float) -> float:
    if rank < 1:
        return float(f"{rank * share:.4g}")
    wanted = max(1, round(rank * share))
    return wanted if wanted < GRAIN or wanted == rank else wanted // GRAIN * GRAIN


class Storage(NamedTuple):
    """Dtypes for the slots of all pipelines. `entrywise`: for pipelines that update each entry by itself, as AdamW does."""

    signed: StateDtype
    unsigned: StateDtype
    entrywise: StateDtype | None = None


def stored(spec: Spec, plan: Plan, storage: Storage) -> dict[str, StateDtype]:
    """Overrides that store every moment in the dtype of `storage`, except slots that are stored in fewer bits already."""
    out: dict[str, StateDtype] = {}
    for name, rows in plan.by_pipeline.items():
        pipeline = spec.pipelines[name]
        signed = _signs(rows)
        by_entries = all(frame.is_elementwise for row in rows for _, frame in row.splits)
        for slot in (slot for slot, large in pipeline.storable.items() if large and slot in signed):
            word = storage.signed if signed[slot] else storage.unsigned
            if storage.entrywise is not None and by_entries:
                word = storage.entrywise
            if WIDTH[word] < WIDTH[pipeline.state_dtype.get(slot, "fp32")]:
                out[f"pipelines.{name}.state_dtype.{slot}"] = word
    return out


def _signs(rows: list[Row]) -> dict[str, bool]:
    """The slots of some parameters by their last name; True if all of that name hold signed numbers."""
    out: dict[str, bool] = {}
    for frame in {id(frame): frame for row in rows for _, frame in row.splits}.values():
        for key, slot in frame.slots.items():
            name = key.rpartition(".")[2]
            out[name] = out.get(name, True) and slot.holds == "signed"
    return out


def values_at(spec: Spec, paths: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a spec has where overrides would set others; fp32 for a slot without a `state_dtype`."""
    return {path: _value(spec, path.split(".")) for path in paths}


def _value(part: Any, path: list[str]) -> Any:
    for name in path:
        part = part.get(name, "fp32") if isinstance(part, Mapping) else getattr(part, name)
    return part
