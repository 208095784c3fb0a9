"""The output of `scaling.py`: tables, the plot, and the record as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth import LAYER_WIDTH, RANK_WIDTH, Fit, Point, Quartiles
from rich import box
from rich.console import Console
from rich.table import Table

from subspace_opt.lab.report import readable_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours can be told apart with any colour vision. Markers tell the presets apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def show(context: dict[str, Any], points: Sequence[Point], fits: Sequence[Fit]) -> None:
    """Print the settings, the points and the exponents."""
    out = Console(highlight=False, width=None if Console().is_terminal else 140)
    out.print(", ".join(f"{key} {value}" for key, value in context.items()), soft_wrap=True)
    out.print()
    show_points(points, out)
    if fits:
        show_fits(fits, out)


def show_points(points: Sequence[Point], out: Console) -> None:
    """Print all points: one table for each axis, sorted by preset."""
    numbers = ("step ms", "quartiles", "refresh ms", "quartiles", "state", "planned", "temporaries", "at a refresh")
    for axis in dict.fromkeys(p.place.axis for p in points):
        table = _aligned(Table("preset", axis, *numbers, title=heading(axis), title_justify="left", box=None, padding=(0, 2, 0, 0)))
        own = [p for p in points if p.place.axis == axis]
        for preset in dict.fromkeys(p.preset for p in own):
            for p in (p for p in own if p.preset == preset):
                later = "-" if p.refresh_temporaries is None else readable_bytes(p.refresh_temporaries)
                sizes = (readable_bytes(p.state), readable_bytes(p.cost.state), readable_bytes(p.temporaries), later)
                table.add_row(preset, str(p.place.at), *_times(p.step), *_times(p.refresh), *sizes)
        out.print(table)
        out.print()


def show_fits(fits: Sequence[Fit], out: Console) -> None:
    """Print the exponents as a Markdown table, ready for a page."""
    numbers = ("step", "last two", "in theory", "refresh", "in theory", "state", "in theory", "temporaries")
    table = _aligned(Table("axis", "preset", "points", *numbers, box=box.MARKDOWN))
    for fit in fits:
        times = (fit.step, fit.step_last, fit.step_theory, fit.refresh, fit.refresh_theory)
        table.add_row(fit.axis, fit.preset, str(fit.points), *map(_number, (*times, fit.state, fit.state_theory, fit.temporaries)))
    out.print(table)


def heading(axis: str) -> str:
    """The name of an axis, and the values that are constant along it."""
    kept = {"width": "1 layer", "layers": f"width {LAYER_WIDTH}", "rank": f"width {RANK_WIDTH}, 1 layer"}
    return f"{axis} ({kept[axis]})"


def _aligned(table: Table) -> Table:
    for column in table.columns:
        column.no_wrap = True
        if column.header not in ("preset", "axis"):
            column.justify = "right"
    return table


def _times(times: Quartiles | None) -> tuple[str, str]:
    if times is None:
        return "-", "-"
    digits = 0 if times[1] >= 100 else 1 if times[1] >= 10 else 2
    return f"{times[1]:.{digits}f}", f"{times[0]:.{digits}f}-{times[2]:.{digits}f}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def draw(points: Sequence[Point], fits: Sequence[Fit], path: Path) -> None:
    """Plot the times of steps without a refresh: one panel for each axis, both scales logarithmic, with the fitted lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(p.place.axis for p in points))
    presets = list(dict.fromkeys(p.preset for p in points))
    figure = Figure(figsize=(1 + 4 * len(axes), 5.2 + 0.2 * len(presets)), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: needs no display and leaves the state of pyplot unchanged
    for axis, panel in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        _panel(panel, axis, presets, [p for p in points if p.place.axis == axis], [fit for fit in fits if fit.axis == axis])
    figure.savefig(path, dpi=1200 / 13)  # 1200 pixels wide for three panels


def _panel(panel: Axes, axis: str, presets: Sequence[str], points: Sequence[Point], fits: Sequence[Fit]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    for number, preset in enumerate(presets):
        own = [p for p in points if p.preset == preset]
        fit = next((fit for fit in fits if fit.preset == preset), None)
        if not own:
            continue
        at, low, middle, high = zip(*((p.place.at, *p.step) for p in own), strict=True)
        bars = [[m - lo for lo, m in zip(low, middle, strict=True)], [hi - m for m, hi in zip(middle, high, strict=True)]]
        label = preset if fit is None else f"{preset}: {_number(fit.step)} ({_number(fit.step_theory)})"
        look: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
            "capsize": 3,
        }
        panel.errorbar(at, middle, yerr=bars, linestyle="none", label=label, **look)
        if fit is not None:
            panel.plot(at, _line(at, middle, fit.step), color=look["color"], linewidth=1.1, alpha=0.8)
    ticks = sorted({p.place.at for p in points})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter("")
    panel.set_title(heading(axis), fontsize=11)
    panel.set_xlabel(axis)
    panel.set_ylabel("step(), ms")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(title="exponent (in theory)", loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=9)


def _line(at: Sequence[float], values: Sequence[float], slope: float) -> list[float]:
    """The fitted line at the same places; it passes through the mean of the logarithms."""
    centre = sum(math.log(y) - slope * math.log(x) for x, y in zip(at, values, strict=True)) / len(at)
    return [math.exp(centre + slope * math.log(x)) for x in at]


def record(context: dict[str, Any], points: Sequence[Point], fits: Sequence[Fit]) -> str:
    """All results as JSON. Missing values are `null`."""
    rows = [{key: None if isinstance(v, float) and math.isnan(v) else v for key, v in asdict(fit).items()} for fit in fits]
    return json.dumps({**context, "points": [asdict(p) for p in points], "fits": rows}, indent=1) + "\n"
