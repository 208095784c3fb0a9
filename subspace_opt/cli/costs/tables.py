"""Totals of a plan, its costs by role and pipeline, and the steps of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from ...forecast import Costs, Fitted
from ...lab.report import readable_bytes
from ..tables import make_table

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_costs(costs: Costs, out: Console) -> None:
    """Totals, then two tables by role and pipeline: bytes, and operations with the bytes sent."""
    _show_totals(costs, out)
    numbers = ("tensors", "state", "AdamW's", "temporaries", "at refresh")
    table = make_table("role", "pipeline", *numbers, right=numbers, fold="pipeline")
    for group in costs.groups:
        sizes = (group.state_bytes, group.adamw_bytes, group.step_temporaries, group.refresh_temporaries)
        table.add_row(group.role, escape(group.pipeline), f"{group.tensors:,}", *map(readable_bytes, sizes))
    out.print()
    out.print(table)
    sends = any(group.sent is not None for group in costs.groups)
    numbers = ("FLOP of a step", "of a refresh step", *(("sent", "at refresh") if sends else ()))
    table = make_table("role", "pipeline", *numbers, right=numbers, fold="pipeline")
    for group in costs.groups:
        cells = [_with_prefix(group.step_flops), _with_prefix(group.refresh_flops)]
        cells += [readable_bytes(round(size)) for size in (group.sent, group.sent_at_refresh) if size is not None]
        table.add_row(group.role, escape(group.pipeline), *cells)
    out.print()
    out.print(table)


def _show_totals(costs: Costs, out: Console) -> None:
    table = make_table("total", "bytes", "", " ", right=("bytes", ""), fold=" ")
    share = f"{costs.state_bytes / costs.adamw_bytes:.2f} of AdamW's" if costs.adamw_bytes else ""
    lines = [("state", costs.state_bytes, share), ("AdamW's", costs.adamw_bytes, "")]
    lines += [("tables", costs.table_bytes, "shared by layers, not saved")] if costs.table_bytes else []
    lines += [("weights", costs.weight_bytes, ""), ("gradients", costs.gradient_bytes, "")]
    lines.append(("temporaries", costs.step_temporaries, "peak of a step, on an accelerator"))
    if costs.refresh_temporaries != costs.step_temporaries:
        lines.append(("at refresh", costs.refresh_temporaries, "peak of a step that refreshes every basis"))
    lines.append(("training", costs.training_bytes, "without activations"))
    for name, size, remark in lines:
        table.add_row(name, f"{size:,}", readable_bytes(size), remark)
    out.print(table)
    work = f"products and decompositions: {_with_prefix(costs.step_flops)}FLOP a step"
    if costs.refresh_flops != costs.step_flops:
        work += f", {_with_prefix(costs.refresh_flops)}FLOP with a refresh of every basis"
    out.print(f"\n{work}", markup=False, soft_wrap=True)


def _with_prefix(number: float) -> str:
    """`1.23 T` for 1.23e12; `-` for 0."""
    if not number:
        return "-"
    size, prefix = next(((size, prefix) for size, prefix in PREFIXES if number >= size), (1.0, ""))
    return f"{number / size:.3g} {prefix}"


# ---------------------------------------------------------------------------------------------------------------- search


def show_fitted(fitted: Fitted, out: Console) -> None:
    """The steps of the search, each with the sizes after it and its settings."""
    if not fitted.turns:
        out.print(f"'{fitted.spec.name}' fits as it is\n", markup=False, soft_wrap=True)
        return
    numbers = ("state", "training")
    table = make_table("step", *numbers, "set", right=numbers, fold="set")
    table.add_row("start", readable_bytes(fitted.start.held_bytes), readable_bytes(fitted.start.training_bytes), "")
    for turn in fitted.turns:
        sizes = readable_bytes(turn.costs.held_bytes), readable_bytes(turn.costs.training_bytes)
        table.add_row(turn.what, *sizes, escape(", ".join(_settings(turn.before, turn.after))))
    out.print(table)
    out.print()


def _settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [f"{path.removeprefix('pipelines.')} {before[path]} -> {value}" for path, value in after.items()]


def fitted_to_dict(fitted: Fitted) -> dict[str, Any]:
    """The steps of the search and the spec, for JSON."""
    steps = [
        {
            "step": turn.what,
            "set": {path.removeprefix("pipelines."): value for path, value in turn.after.items()},
            "before": {path.removeprefix("pipelines."): value for path, value in turn.before.items()},
            "state_bytes": turn.costs.held_bytes,
            "training_bytes": turn.costs.training_bytes,
        }
        for turn in fitted.turns
    ]
    start = {"state_bytes": fitted.start.held_bytes, "training_bytes": fitted.start.training_bytes}
    return {"start": start, "steps": steps, "spec": fitted.spec.model_dump(mode="json")}
