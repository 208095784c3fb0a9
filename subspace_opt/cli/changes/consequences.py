"""The costs of a change of the spec: bytes of state by slot and role, operations, and the parameters that are treated differently."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...lab.report import readable_bytes
from ...plan import COUNTERS, Plan, Row
from ...plan.costs import flops
from ..tables import make_table, split_name

WORDS = {
    "state_bytes": "state",
    "constant_bytes": "tables",
    "flops": "operations per step",
    "refresh_flops": "more, if all refresh",
    "mean_flops": "mean per step",
}


@dataclass(frozen=True)
class Totals:
    """The sums of one plan. `flops`: of a step without refresh; `refresh_flops`: more of them if all bases are refreshed."""

    state_bytes: int
    constant_bytes: int
    flops: float
    refresh_flops: float
    mean_flops: float  # of a step, with each refresh divided by its period


@dataclass(frozen=True)
class SlotChange:
    """Bytes of one slot, summed over the parameters of one role."""

    role: str
    slot: str
    old_bytes: int
    new_bytes: int


@dataclass(frozen=True)
class RouteChange:
    """A parameter that another pipeline, view or rank treats."""

    parameter: str
    old: str
    new: str
    old_bytes: int
    new_bytes: int


@dataclass(frozen=True)
class Consequences:
    """Totals of both plans, and what changes."""

    old: Totals
    new: Totals
    slots: tuple[SlotChange, ...]
    routes: tuple[RouteChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """The consequences as plain data."""
        totals = {name: {"old": value, "new": asdict(self.new)[name]} for name, value in asdict(self.old).items()}
        return {"totals": totals, "slots": [asdict(slot) for slot in self.slots], "parameters": [asdict(route) for route in self.routes]}


def consequences(old: Plan, new: Plan) -> Consequences:
    """Compare the plans of two specs for one model."""
    routes = [
        RouteChange(a.entry.name, _treatment(a), _treatment(b), a.state_bytes, b.state_bytes)
        for a, b in zip(old, new, strict=True)
        if _treatment(a) != _treatment(b)
    ]
    return Consequences(_totals(old), _totals(new), tuple(_slots(old, new)), tuple(routes))


def _totals(plan: Plan) -> Totals:
    update = refresh = mean = 0.0
    for row in plan:
        for block, frame in row.splits if not row.entry.frozen else ():
            own, anew = (cost * block.count for cost in flops(frame))
            every = frame.pipeline.selector.every if frame.opens else None
            update, refresh, mean = update + own, refresh + anew, mean + own + (anew / every if every else 0.0)
    return Totals(plan.total_bytes, sum(plan.constants.values()), update, refresh, mean)


def _treatment(row: Row) -> str:
    """Pipeline, view and rank in a few words."""
    rank = f", rank {'/'.join(map(str, dict.fromkeys(row.ranks)))}" if row.ranks else ""
    shape = "x".join(map(str, row.entry.shape))
    view = "" if str(row.view) in (shape, f"1x{shape}") or not row.entry.shape else f" as {row.view}"
    return f"{row.pipeline}{view}{rank}"


def _slots(old: Plan, new: Plan) -> Iterator[SlotChange]:
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for side, plan in enumerate((old, new)):
        for row in plan:
            for slot, size in _sizes(row):
                sums[(row.role.name, slot)][side] += size
    yield from (SlotChange(role, slot, a, b) for (role, slot), (a, b) in sums.items() if a or b)


def _sizes(row: Row) -> Iterator[tuple[str, int]]:
    """Bytes of every slot of a parameter; the names of its blocks are left out."""
    if row.entry.frozen:
        return
    names = {block.name for block, _ in row.splits if block.name}
    for key, (shape, dtype) in row.state.items():
        head, _, rest = key.partition(".")
        if key not in COUNTERS:
            size = row.codes[key].nbytes(prod(shape)) if key in row.codes else prod(shape) * dtype.itemsize
            yield rest if head in names else key, size


def show_consequences(found: Consequences, title: str, out: Console) -> None:
    """Totals, bytes by slot and role, and the parameters that change, by layers that change alike."""
    out.print(title, end="\n\n", markup=False, soft_wrap=True)
    for table in (_totals_table(found), _slots_table(found), _routes_table(found)):
        if table.row_count:
            out.print(table)
            out.print()
    if not found.routes:
        out.print("every parameter keeps its pipeline, view and rank")


def _totals_table(found: Consequences) -> Table:
    table = make_table("total", "old", "new", "ratio", right=("old", "new", "ratio"))
    for name, word in WORDS.items():
        old, new = asdict(found.old)[name], asdict(found.new)[name]
        if old or new:
            said = readable_bytes if name.endswith("bytes") else _readable_flops
            table.add_row(word, said(old), said(new), _ratio(old, new))
    return table


def _slots_table(found: Consequences) -> Table:
    table = make_table("role", "slot", "old bytes", "new bytes", right=("old bytes", "new bytes"), fold="slot")
    before = ""
    for slot in sorted(found.slots, key=lambda slot: slot.role):
        table.add_row("" if slot.role == before else slot.role, slot.slot, *map(_readable, (slot.old_bytes, slot.new_bytes)))
        before = slot.role
    return table


def _routes_table(found: Consequences) -> Table:
    """Parameters of one name in several layers that change alike share a line."""
    table = make_table("parameter", "count", "old", "new", right=("count",), fold="parameter")
    alike: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for route in found.routes:
        alike[(split_name(route.parameter)[1] or route.parameter, route.old, route.new)].append(route.parameter)
    for (rest, old, new), names in alike.items():
        table.add_row(*map(escape, (names[0] if len(names) == 1 else f"*.{rest}", str(len(names)), old, new)))
    return table


def _readable(size: int) -> str:
    return readable_bytes(size) if size else "-"


def _readable_flops(count: float) -> str:
    for unit in ("", " K", " M", " G", " T"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} P"


def _ratio(old: float, new: float) -> str:
    return f"{new / old:.2f}" if old else "-"
