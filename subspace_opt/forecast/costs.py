"""The costs of a plan: bytes that are held, temporaries, operations and traffic, in total and by role and pipeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..distributed.meshes import PlacedPlan
from ..plan import Plan, Row, adamw_bytes
from ..plan.costs import flops
from .rehearsal import Group, Peaks, group_of, rehearse


@dataclass(frozen=True)
class GroupCosts:
    """The costs of the parameters of one role in one pipeline. Bytes, and floating-point operations of products and decompositions.

    `step` is an update without a refresh, `refresh` one that refreshes every basis; they are equal if each update has a refresh, or none
    has. `sent` is the mean over the ranks.
    """

    role: str
    pipeline: str
    tensors: int
    parameters: int
    state_bytes: int
    adamw_bytes: int
    step_temporaries: int
    refresh_temporaries: int
    step_flops: float
    refresh_flops: float
    sent: float | None = None
    sent_at_refresh: float | None = None


@dataclass(frozen=True)
class Costs:
    """The costs of a plan.

    `training_bytes` is the memory of training without activations: weights, gradients, state, tables and the larger peak of temporaries.
    """

    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    adamw_bytes: int
    table_bytes: int
    step_temporaries: int
    refresh_temporaries: int
    step_flops: float
    refresh_flops: float
    groups: tuple[GroupCosts, ...]

    @property
    def held_bytes(self) -> int:
        """State and the tables that matrices share."""
        return self.state_bytes + self.table_bytes

    @property
    def temporaries(self) -> int:
        """The larger peak."""
        return max(self.step_temporaries, self.refresh_temporaries)

    @property
    def training_bytes(self) -> int:
        """Weights, gradients, state, tables and temporaries."""
        return self.weight_bytes + self.gradient_bytes + self.held_bytes + self.temporaries

    def to_dict(self) -> dict[str, Any]:
        """Plain data: totals, and `groups`."""
        plain = asdict(self)
        groups = plain.pop("groups")
        for group in groups:
            if group["sent"] is None:
                del group["sent"], group["sent_at_refresh"]
        return {"totals": {**plain, "training_bytes": self.training_bytes}, "groups": groups}


def costs_of(plan: Plan, placed: PlacedPlan | None = None, known: dict[Any, Any] | None = None) -> Costs:
    """The costs of one process, and the bytes that each rank of a mesh sends if the plan is placed on one.

    Args:
        known: Peaks of temporaries by shapes, kept between calls for plans of one model.
    """
    peaks = rehearse(plan.rows, known=known)
    members: dict[Group, list[int]] = defaultdict(list)
    for i, row in enumerate(plan.rows):
        members[group_of(row)].append(i)
    groups = tuple(_group(group, [plan.rows[i] for i in own], peaks, _part(placed, own)) for group, own in members.items())
    weights = sum(row.entry.numel * row.entry.dtype.itemsize for row in plan)
    gradients = sum(row.entry.numel * row.entry.dtype.itemsize for row in plan if not row.entry.frozen)
    return Costs(
        weight_bytes=weights,
        gradient_bytes=gradients,
        state_bytes=plan.total_bytes,
        adamw_bytes=plan.adamw_bytes,
        table_bytes=sum(plan.constants.values()),
        step_temporaries=peaks.at_step,
        refresh_temporaries=peaks.at_refresh,
        step_flops=sum(group.step_flops for group in groups),
        refresh_flops=sum(group.refresh_flops for group in groups),
        groups=groups,
    )


def operations(rows: Iterable[Row]) -> tuple[float, float]:
    """Floating-point operations of an update without a refresh, and of one with a refresh of every basis."""
    plain = renewed = 0.0
    known: dict[int, tuple[float, float]] = {}  # by frame: parameters of one shape share theirs
    for row in rows:
        for block, frame in row.splits if not row.entry.frozen else ():
            if id(frame) not in known:
                known[id(frame)] = flops(frame)
            between, refresh = known[id(frame)]
            always = frame.opens and frame.pipeline.selector.every == 1
            plain += block.count * (between + (refresh if always else 0.0))
            renewed += block.count * (between + refresh)
    return plain, renewed


def _group(group: Group, rows: list[Row], peaks: Peaks, placed: PlacedPlan | None) -> GroupCosts:
    plain, renewed = operations(rows)
    step, refresh = (found[group].most + found[group].copies if group in found else 0 for found in (peaks.step, peaks.refresh))
    costs = GroupCosts(
        role=group[0],
        pipeline=group[1],
        tensors=len(rows),
        parameters=sum(row.entry.numel for row in rows),
        state_bytes=sum(row.state_bytes for row in rows),
        adamw_bytes=sum(adamw_bytes(row.entry) for row in rows),
        step_temporaries=step,
        refresh_temporaries=refresh,
        step_flops=plain,
        refresh_flops=renewed,
    )
    if placed is None:
        return costs
    sent, at_refresh = (sum(found) / placed.mesh.ranks for found in (placed.bytes_sent, placed.bytes_sent_at_refresh))
    return replace(costs, sent=sent, sent_at_refresh=at_refresh)


def _part(placed: PlacedPlan | None, numbers: list[int]) -> PlacedPlan | None:
    """Some parameters of a plan on a mesh."""
    if placed is None:
        return None
    rows = tuple(placed.plan.rows[i] for i in numbers)
    axes, shardings = tuple(placed.axes[i] for i in numbers), tuple(placed.shardings[i] for i in numbers)
    return PlacedPlan(placed.mesh, replace(placed.plan, rows=rows), axes, shardings)
