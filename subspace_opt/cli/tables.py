"""Tables of kinds, plans and results, as wide as the terminal."""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..lab import Result
from ..lab.report import readable_bytes
from ..plan import Plan, Row, adamw_bytes, said

if TYPE_CHECKING:
    from ..testing.trajectories.parity import Parity

PIPE_WIDTH = 160  # width if the output is a file or pipe: wide, so that `grep` finds whole rows


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal or $COLUMNS, or `PIPE_WIDTH` if there is neither."""
    stream = sys.stderr if stderr else sys.stdout
    free = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, highlight=False, width=PIPE_WIDTH if free else None)


def make_table(*columns: str, right: Collection[str] = (), fold: str = "") -> Table:
    """A table with two spaces between columns. If the table is too wide, only the column `fold` wraps."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column != fold, overflow="fold")
    return table


# -------------------------------------------------------------------------------------------------------------- parity


def show_parity(measured: Sequence[Parity], out: Console) -> None:
    """One line for each trajectory, and below them the parameters that are left out."""
    table = make_table("preset", "file", "tolerance", "error", "", right=("tolerance", "error"))
    for row in measured:
        error = f"{row.error:.1e}" if row.compared else "-"
        verdict = "" if row.holds else "exceeded"
        table.add_row(row.preset, row.file, f"{row.tolerance:.0e}", error, verdict)
    out.print(table)
    out.print(f"\n{sum(row.holds for row in measured)} of {len(measured)} trajectories within their tolerance")
    defects = {why for row in measured for why in row.left_out.values()}
    if defects:
        out.print("left out because of defects of the reference code, which tests reproduce:")
        for why in sorted(defects):
            names = ", ".join(row.file for row in measured if why in row.left_out.values())
            out.print(f"  {why}: {names}", soft_wrap=True)
    rounded = [row for row in measured if row.rounded]
    if rounded:
        out.print("compared from the second update on, because round-off decides the first one:")
        for why in sorted({row.rounded for row in rounded}):
            out.print(f"  {why}: {', '.join(row.file for row in rounded if row.rounded == why)}", soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------- list


def show_catalogue(catalogue: Mapping[str, Any], out: Console) -> None:
    """One table each for presets, selectors, rules, weight rules and plugins."""
    presets = make_table("preset", "source", fold="source")
    for preset in catalogue["presets"]:
        words = escape(", ".join(preset["source"])) if preset["error"] is None else _failed(preset["error"])
        presets.add_row(preset["name"], words + _origin(preset["package"]))
    out.print(presets)
    for family in ("selectors", "rules", "weight_rules"):
        kinds = make_table(family.removesuffix("s").replace("_", " "), "what it does", fold="what it does")
        for kind in catalogue[family]:
            kinds.add_row(", ".join(kind["names"]), escape(kind["doc"]) + _origin(kind["plugin"]))
        out.print()
        out.print(kinds)
    plugins = make_table("plugin", "from", "gives", fold="gives")
    for plugin in catalogue["plugins"]:
        gives = ", ".join(plugin["gives"]) or "nothing"
        words = gives if plugin["error"] is None else _failed(f"failed to import: {plugin['error']}")
        plugins.add_row(escape(plugin["name"]), escape(plugin["package"]), words)
    out.print()
    out.print(plugins if catalogue["plugins"] else "no plugins installed")


def _origin(name: str | None) -> str:
    return f" [dim]{escape(f'[{name}]')}[/dim]" if name else ""


def _failed(why: str) -> str:
    return f"[red]{escape(why)}[/red]"


# ------------------------------------------------------------------------------------------------------- explain, plan


@dataclass(frozen=True)
class Layer:
    """The sums of one layer: parameters, and bytes of state."""

    name: str
    parameters: int
    state_bytes: int
    adamw_bytes: int


def split_name(name: str) -> tuple[str, str]:
    """(layer, rest) of a parameter's name. The layer ends with the first number; without a number it is the module."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:end]) or name, ".".join(parts[end:])


def layers(plan: Plan) -> list[Layer]:
    """The plan's bytes by layer, in the order of the model."""
    out = []
    for name, rows in groupby(plan, key=lambda row: split_name(row.entry.name)[0]):
        mine = list(rows)
        parameters, state = sum(r.entry.numel for r in mine), sum(r.state_bytes for r in mine)
        out.append(Layer(name, parameters, state, sum(adamw_bytes(r.entry) for r in mine)))
    return out


def show_layers(plan: Plan, out: Console) -> None:
    """Bytes of state by layer, next to AdamW's. Consecutive layers with equal numbers share a row."""
    numbers = ("layers", "parameters each", "state each", "AdamW's each", "ratio")
    table = make_table("layer", *numbers, right=numbers, fold="layer")
    for alike in _alike(layers(plan)):
        first = alike[0]
        ratio = f"{first.state_bytes / first.adamw_bytes:.2f}" if first.adamw_bytes else "-"
        sizes = (readable_bytes(first.state_bytes), readable_bytes(first.adamw_bytes), ratio)
        table.add_row(_span([layer.name for layer in alike]), str(len(alike)), f"{first.parameters:,}", *sizes)
    out.print()
    out.print(table)


def _alike(all_layers: list[Layer]) -> Iterator[list[Layer]]:
    """Consecutive layers that differ only in their number."""
    for _, run in groupby(all_layers, key=lambda x: (re.sub(r"\d+$", "", x.name), x.parameters, x.state_bytes, x.adamw_bytes)):
        yield list(run)


def _span(names: Sequence[str]) -> str:
    """`model.layers.0-7` for a list of consecutive layers."""
    return names[0] if len(names) == 1 else f"{names[0]}-{names[-1].rpartition('.')[2]}"


def _show_total(plan: Plan, out: Console) -> None:
    ours, theirs, tables = plan.total_bytes, plan.adamw_bytes, sum(plan.constants.values())
    table = make_table("total", "bytes", "", " ", right=("bytes", ""), fold=" ")
    table.add_row("state", f"{ours:,}", readable_bytes(ours), f"{ours / theirs:.2f} of AdamW's" if theirs else "")
    table.add_row("AdamW's", f"{theirs:,}", readable_bytes(theirs))
    if tables:
        table.add_row("tables", f"{tables:,}", readable_bytes(tables), "shared by layers, not saved")
    out.print()
    out.print(table)


def show_explained(plan: Plan, title: str, out: Console) -> None:
    """One row for each parameter, and below the table the routes and roles that decided."""
    full = _explained(plan)
    fits = out.measure(full, options=out.options.update(width=10_000)).maximum <= out.width
    out.print(title, end="\n\n", markup=False, soft_wrap=True)
    out.print(full if fits else _explained_by_layer(plan))
    routes = make_table("why", "pipeline", "lr x", "decay", right=("lr x", "decay"), fold="why")
    for route in dict.fromkeys((row.why.partition(";")[0], row.pipeline, f"{row.lr_scale:g}", f"{row.decay:g}") for row in plan):
        routes.add_row(*map(escape, route))
    roles = make_table("parameters", "role", "by", right=("parameters",), fold="by")
    for (name, why), number in Counter((row.role.name, row.role.why) for row in plan).items():
        roles.add_row(str(number), name, escape(why))
    for below in (routes, roles):
        out.print()
        out.print(below)
    _show_total(plan, out)


def _explained(plan: Plan) -> Table:
    numbers = ("rank", "lr x", "decay", "state bytes")
    stored = any(row.stored for row in plan)
    table = make_table("parameter", "shape", "role", "pipeline", *numbers, *(["stored"] if stored else []), "why", right=numbers)
    for row in plan:
        rates = (f"{row.lr_scale:g}", f"{row.decay:g}")
        how = [said(row)] if stored else []
        name, role, state = escape(row.entry.name), row.role.name, f"{row.state_bytes:,}"
        table.add_row(name, _seen(row), role, _pipeline(row), _rank(row), *rates, state, *how, _cause(row))
    return table


def _explained_by_layer(plan: Plan) -> Table:
    """The same for a narrow terminal: the name of a layer has a row of its own, and lr and decay are only in the table of routes."""
    table = make_table(
        "parameter",
        "shape",
        "pipeline",
        "rank",
        "state bytes",
        "route",
        right=("rank", "state bytes"),
        fold="parameter",
    )
    for layer, rows in groupby(plan, key=lambda row: split_name(row.entry.name)[0]):
        mine = list(rows)
        if len(mine) > 1:
            table.add_row(escape(layer))
        for row in mine:
            name = f"  {split_name(row.entry.name)[1]}" if len(mine) > 1 else row.entry.name
            cause = _cause(row).removeprefix("routes.")
            table.add_row(escape(name), _seen(row), _pipeline(row), _rank(row), f"{row.state_bytes:,}", cause)
    return table


def _pipeline(row: Row) -> str:
    return row.pipeline + (" (frozen)" if row.entry.frozen else "")


def _rank(row: Row) -> str:
    return "/".join(map(str, dict.fromkeys(row.ranks))) or "-"


def _cause(row: Row) -> str:
    """The name of the route: `routes.2` of `routes.2: min_dims 2`."""
    return row.why.partition(":")[0]


def _seen(row: Row) -> str:
    """The shape, and its view if that differs. `64x192/3` is cut into three parts."""
    shape, view = "x".join(map(str, row.entry.shape)) or "scalar", row.view
    turned = ", transposed" if view.transposed else ""
    if len(view.blocks) > 1:
        return f"{shape}/{len(view.blocks)}{turned}"
    if str(view) == f"{view.rows}x{view.cols}, stored transposed":
        return shape + turned
    return shape if shape == str(view) or len(row.entry.shape) < 2 else f"{shape} as {view}"


# ------------------------------------------------------------------------------------------------------------- results


def show_results(results: Sequence[Result], out: Console) -> None:
    """One row for each run, in order; the row with the best validation loss is green."""
    numbers = ("lr", "loss", "bits/byte", "state", "step() ms", "update ms", "tokens/s")
    table = make_table("run", *numbers, right=numbers, fold="run")
    best = min((r.validation_loss for r in results if not math.isnan(r.validation_loss)), default=math.nan)
    for r in results:
        losses = (f"{r.validation_loss:.4f}", f"{r.bits_per_byte:.3f}")
        times = (f"{r.optimizer_ms:.1f}", f"{r.step_ms:.1f}", f"{r.tokens_per_second:,.0f}")
        style = "bold green" if len(results) > 1 and r.validation_loss == best else None
        table.add_row(escape(r.run), f"{r.lr:.3g}", *losses, readable_bytes(r.measured_state_bytes), *times, style=style)
    out.print()
    out.print(table)
    out.print("loss: validation loss in nats per byte; times: medians; an update includes its step()", style="dim")
    out.print()
