"""The state of one parameter under the new spec: its views, its storage, its counters, and its rows of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import lowbit
from ..plan import COUNTERS, Row, state_key
from ..plan.views import View
from .moments import Known, full, rotated
from .report import ReportRow
from .source import Blocks, known
from .target import Filled, Restart, Target, fill

COUNTED_ON = "updates are counted on, so bias corrections and schedules go on"


class Old(NamedTuple):
    """A parameter under the old spec, with its state by slot."""

    row: Row
    state: Mapping[str, Any]
    blocks: list[Blocks]

    @property
    def device(self) -> torch.device:
        """The device of its state."""
        return next((v.device for k, v in self.state.items() if isinstance(v, Tensor) and k not in COUNTERS), torch.device("cpu"))


@dataclass
class New:
    """The new state of one parameter, empty if it starts anew, and its rows of the report."""

    name: str
    pipeline: str
    state: dict[str, Any] = field(default_factory=dict)
    rows: list[ReportRow] = field(default_factory=list)

    def tell(self, slot: str, status: str, why: str, origin: str = "") -> None:
        """Add a row to the report."""
        self.rows.append(ReportRow(self.name, self.pipeline, slot, status, origin, why))


def converted(old: Old, row: Row, param: Tensor, seed: int) -> New:
    """The state of one parameter under its row of the new plan."""
    before, after = old.row.pipeline, row.pipeline
    new = New(row.entry.name, before if before == after else f"{before} -> {after}")
    count = old.blocks[0].count
    if count < 1:
        new.tell("all slots", "reset", "it has had no update so far")
        return new
    made = [fill(target) for target in _targets(old, row, param, seed)]
    restart = next((filled for filled in made if isinstance(filled, Restart)), None)
    if restart is not None:
        new.tell("all slots", "reset", f"{restart.why}: it starts anew, its counter and bias corrections included")
        return new
    _count_on(new, old, row, count)
    for index, filled in enumerate(made):
        assert not isinstance(filled, Restart)
        _store(new, old, row, index, filled)
    if row.compensated:
        kept = old.state.get("compensation")
        fresh = torch.zeros(row.entry.shape, dtype=row.entry.dtype, device=old.device)
        new.state["compensation"] = fresh if kept is None else kept.clone()
        new.tell("compensation", "reset" if kept is None else "exact", "what Kahan's rounding has cut off so far")
    for key in _unused(old, new.rows):
        new.tell(key, "dropped", "the new pipeline has no use for it", key)
    return new


def _targets(old: Old, row: Row, param: Tensor, seed: int) -> list[Target]:
    """For every block what is to be filled, and from what."""
    same_view = old.row.view == row.view
    told = [known(blocks) for blocks in old.blocks]
    told = told if same_view else _recut(told, old, row)
    weights = row.view.cut(row.view.whole(param.detach())) if row.splits else []
    refreshed = _last_refresh(row, old.blocks[0].count) if "refreshed" in row.state else None
    out = []
    for index, (block, frame) in enumerate(row.splits):
        new = Blocks(row, index, frame, {}, old.blocks[0].count, refreshed, seed)
        weight = weights[index].to(row.compute_dtype) if frame.needs_weight else None
        like = torch.empty(block.count, 0, dtype=row.compute_dtype, device=old.device)
        out.append(Target(new, old.blocks[index] if same_view else None, told[index], weight, like))
    return out


def _count_on(new: New, old: Old, row: Row, count: int) -> None:
    """The counters: updates so far, and the update of the last refresh on schedule."""
    primes = any(frame.primes for _, frame in row.splits)
    new.state["step"] = torch.tensor(float(count + primes), dtype=torch.float32)
    new.tell("step", "exact", COUNTED_ON, "step")
    if "refreshed" in row.state:
        new.state["refreshed"] = torch.tensor(float(_last_refresh(row, count)), dtype=torch.float32)


def _last_refresh(row: Row, count: int) -> int:
    frame = row.splits[0][1]
    return count - frame.pipeline.selector.age(count, row.turn) + 1 if frame.opens else count


# -------------------------------------------------------------------------------------------------------------- storage


def _store(new: New, old: Old, row: Row, index: int, filled: Mapping[str, Filled]) -> None:
    """Put the slots of a block into the new state, as the plan stores them; 0 for matrices that have had no gradient."""
    block = row.splits[index][0]
    same_view = old.row.view == row.view
    begun = old.blocks[index].begun if same_view else torch.ones(block.count, dtype=torch.bool)
    for key, slot in filled.items():
        name = state_key(block, key)
        mask = begun.to(slot.value.device, slot.value.dtype).reshape(-1, *[1] * (slot.value.dim() - 1))
        new.state[name], rounded = _stored(slot.value * mask, row, name)
        loses = bool(rounded) and not _was_stored_so(old, slot.origin, row, name)
        status = "approximate" if loses and slot.status == "exact" else slot.status
        new.tell(name, status, f"{slot.why}; {rounded}" if loses else slot.why, slot.origin)


def _stored(value: Tensor, row: Row, name: str) -> tuple[Tensor, str]:
    """A slot in its own dtype or codes, and how it was rounded."""
    shape, dtype = row.state[name]
    value = value.reshape(shape).contiguous()
    if name in row.codes:
        return lowbit.coded(value.to(torch.float32), row.codes[name]), f"stored as {row.codes[name]}"
    narrower = dtype.is_floating_point and value.is_floating_point() and dtype.itemsize < value.dtype.itemsize
    return value.to(dtype).clone(), f"rounded to {str(dtype).removeprefix('torch.')}" if narrower else ""


def _was_stored_so(old: Old, origin: str, row: Row, name: str) -> bool:
    """True if the old slot was stored in the same way, so that storing it again loses nothing."""
    same_type = origin in old.row.state and old.row.state[origin][1] == row.state[name][1]
    return same_type and old.row.codes.get(origin) == row.codes.get(name)


def _unused(old: Old, rows: Sequence[ReportRow]) -> list[str]:
    """Old slots, by their names in the pipeline, that gave nothing to the new state. A basis gives coordinates their meaning."""
    used = {name for row in rows for name in row.origin.split(" + ")}
    slots = dict.fromkeys(key for blocks in old.blocks for key in blocks.frame.slots)
    return [key for key in slots if key not in used and not key.startswith("selector.")]


# ---------------------------------------------------------------------------------------------------------------- views


def _recut(told: list[Known], old: Old, row: Row) -> list[Known]:
    """What is known about the matrices of another view: averages in full space, cut anew."""
    mean = _cut_anew([None if k.mean is None else rotated(k.mean, None, None) for k in told], old.row.view, row)
    square = _cut_anew([None if k.square is None else k.squared(None, None) for k in told], old.row.view, row)
    first = told[0]
    return [
        Known(
            None if mean is None or first.mean is None else full(first.mean, mean[index]),
            None if square is None or first.square is None else full(first.square, square[index]),
        )
        for index in range(len(row.splits))
    ]


def _cut_anew(blocks: list[Tensor | None], view: View, row: Row) -> list[Tensor] | None:
    """Stacks of one view as stacks of the new one; None if one is missing."""
    given = [block for block in blocks if block is not None]
    if len(given) < len(blocks) or not given:
        return None
    return [stack.contiguous() for stack in row.view.cut(row.view.whole(view.restore(given, torch.Size(row.entry.shape))))]
