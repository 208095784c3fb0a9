"""How the cost of `step()` grows with width, layers and rank: time, state and temporaries, and the exponents of their growth.

Each axis is a series of models, made of the hidden matrices of a LLaMA as in `step_time.py`. At each point a preset is timed in steps
without a refresh of any basis (the schedule is put off, so that a refresh does not come by chance) and in steps where all are refreshed.
An exponent is the slope of the least-squares line through logarithms; beside it stands the one that the planner's own operations and
bytes have over the same points.

Example: python benchmarks/scaling.py --widths 256,512,1024 --layers "" --plot scaling.png --json scaling.json
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from step_time import gradients, hidden_matrices, now, settle_allocator, spread
from torch import nn

from subspace_opt import SpecError, SubspaceOptimizer, build
from subspace_opt.lab.errors import LabError
from subspace_opt.lab.report import readable_bytes
from subspace_opt.lab.run.device import choose_device
from subspace_opt.lab.run.measure import measured_bytes, peak_temporaries
from subspace_opt.plan import Plan
from subspace_opt.plan.costs import flops
from subspace_opt.spec import load_spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LR = 1e-5  # the weights hardly move, and what they are makes no difference to the time
NEVER = 10**9  # a period that no run reaches; some selectors do not take null
LEAST = 3  # steps that are timed even where one takes long
LAYER_WIDTH, RANK_WIDTH = 256, 512  # of the two axes on which the width stays
RANK = "matrix.selector.rank"

# Okabe and Ito's colours, told apart with any colour vision; markers tell the presets apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Quartiles = tuple[float, float, float]  # lower quartile, median, upper quartile


@dataclass(frozen=True)
class Place:
    """A model on an axis."""

    axis: str  # width, layers or rank
    at: int
    width: int
    layers: int
    rank: int | None  # None: the preset's own


@dataclass(frozen=True)
class Cost:
    """What the planner says, before there is a tensor."""

    state: int  # bytes
    weights: int  # bytes
    tables: int  # bytes, shared by matrices
    flops: float  # of a step; with the refresh where every step has one
    refresh_flops: float | None  # of a step in which all bases are refreshed; None where no step differs from others by that

    @property
    def needed(self) -> int:
        """Bytes of everything that stays: state, weights and gradients."""
        return self.state + self.tables + 2 * self.weights

    @property
    def work(self) -> float:
        """What the time should be proportional to: operations or, where all is entry by entry, bytes that are moved."""
        return self.flops or float(self.state + 3 * self.weights)


@dataclass(frozen=True)
class Effort:
    """How long a point may take."""

    steps: int
    refreshes: int
    seconds: float


@dataclass(frozen=True)
class Point:
    """One preset at one place. Times in milliseconds, sizes in bytes."""

    preset: str
    place: Place
    cost: Cost
    step: Quartiles
    refresh: Quartiles | None
    steps: int  # that were timed
    state: int
    temporaries: int
    refresh_temporaries: int | None


@dataclass(frozen=True)
class Fit:
    """Exponents of one preset along one axis, measured and in theory; None where there is nothing to fit."""

    preset: str
    axis: str
    points: int
    step: float
    step_last: float  # between the two largest points alone
    step_theory: float
    refresh: float | None
    refresh_theory: float | None
    state: float
    state_theory: float
    temporaries: float | None


# ------------------------------------------------------------------------------------------------------------------------- plan


def hidden(place: Place, device: torch.device) -> nn.Module:
    """The model of a place."""
    return hidden_matrices(place.width, place.layers, device)


def overrides_of(place: Place) -> dict[str, Any]:
    """What a place changes in a preset."""
    return {} if place.rank is None else {RANK: place.rank}


def planned(preset: str, place: Place) -> Cost:
    """What a point will cost, by the plan of a model on the meta device."""
    model = hidden(place, torch.device("meta"))
    plan = build(preset, model, overrides=overrides_of(place)).plan
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    plain = refresh = 0.0
    for row in plan.rows:
        for block, split in row.splits:
            between, renewed = flops(split)
            always = split.opens and split.pipeline.selector.every == 1
            plain += block.count * (between + (renewed if always else 0.0))
            refresh += block.count * (between + renewed)
    return Cost(plan.total_bytes, weights, sum(plan.constants.values()), plain, refresh if periodic(plan) else None)


def periodic(plan: Plan) -> list[str]:
    """The pipelines in use that refresh their basis at some steps and not at others."""
    return sorted({row.pipeline for row in plan.rows for _, split in row.splits if split.opens and split.pipeline.selector.every != 1})


def has_rank(preset: str) -> bool:
    """Whether the pipeline `matrix` has a selector with a rank."""
    pipeline = load_spec(preset).pipelines.get("matrix")
    return pipeline is not None and getattr(pipeline.selector, "rank", None) is not None


def places(widths: Sequence[int], layers: Sequence[int], ranks: Sequence[int]) -> list[Place]:
    """All models, axis by axis, the smallest first."""
    return [
        *(Place("width", width, width, 1, None) for width in widths),
        *(Place("layers", count, LAYER_WIDTH, count, None) for count in layers),
        *(Place("rank", rank, RANK_WIDTH, 1, rank) for rank in ranks),
    ]


# ---------------------------------------------------------------------------------------------------------------------- measure


def measure(
    presets: Sequence[str], where: Iterable[Place], bound: float, effort: Effort, device: torch.device, say: Callable[[str], None]
) -> Iterator[Point]:
    """Every preset at every place that fits into `bound` bytes; the presets of a place share its weights and gradients."""
    for place in where:
        costs = {preset: planned(preset, place) for preset in presets if place.rank is None or has_rank(preset)}
        for preset, cost in costs.items():
            if cost.needed > bound:
                needed, most = readable_bytes(cost.needed), readable_bytes(bound)
                say(f"{preset}, {place.axis} {place.at}: left out, state, weights and gradients take {needed} of {most} (--memory)")
        fitting = {preset: cost for preset, cost in costs.items() if cost.needed <= bound}
        if not fitting:
            continue
        model = hidden(place, device)
        own = list(model.parameters())
        for p, gradient in zip(own, gradients(own), strict=True):
            p.grad = gradient
        for preset, cost in fitting.items():
            point = measured(preset, place, cost, model, effort, device)
            say(f"{preset}, {place.axis} {place.at}: {point.step[1]:.1f} ms")
            yield point
            gc.collect()  # one state at a time


def measured(preset: str, place: Place, cost: Cost, model: nn.Module, effort: Effort, device: torch.device) -> Point:
    """One point."""
    optimizer = without_schedule(preset, model, overrides_of(place))

    def timed() -> float:
        start = now(device)
        optimizer.step()
        return 1e3 * (now(device) - start)

    def renewed() -> float:
        optimizer.refresh_bases()
        return timed()

    for _ in range(2):  # the first sets the basis; what starts with its second gradient starts with the second
        timed()
    steps = repeated(timed, effort.steps, effort.seconds)
    temporaries = peak_temporaries(optimizer.step, device)
    refreshes, refresh_temporaries = None, None
    if cost.refresh_flops is not None:
        optimizer.refresh_bases()
        refresh_temporaries = peak_temporaries(optimizer.step, device)  # and a warm-up of the refresh
        refreshes = spread(repeated(renewed, effort.refreshes, effort.seconds))
    held = measured_bytes(optimizer)
    return Point(preset, place, cost, spread(steps), refreshes, len(steps), held, temporaries, refresh_temporaries)


def without_schedule(preset: str, model: nn.Module, overrides: dict[str, Any]) -> SubspaceOptimizer:
    """The preset with refreshes only where they are asked for: with those of many matrices spread, no step would be without one."""
    seldom = periodic(build(preset, model, overrides=overrides).plan)
    return build(preset, model, lr=LR, overrides=overrides | {f"{pipeline}.selector.every": NEVER for pipeline in seldom})


def repeated(once: Callable[[], float], most: int, seconds: float) -> list[float]:
    """Times of `most` calls; fewer, but `LEAST`, where they take more than `seconds`."""
    times: list[float] = []
    while len(times) < most and (len(times) < LEAST or sum(times) < 1e3 * seconds):
        times.append(once())
    return times


# -------------------------------------------------------------------------------------------------------------------------- fit


def exponent(at: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The slope of log value against log place, by least squares; None where a value is missing or 0, or there is one point."""
    positive = [value for value in values if value]
    if len(at) < 2 or len(positive) < len(at):
        return None
    return linear_regression([math.log(x) for x in at], [math.log(y) for y in positive]).slope


def fitted(points: Sequence[Point]) -> list[Fit]:
    """Exponents of every preset along every axis on which it has two points or more."""
    fits = []
    for axis, preset in dict.fromkeys((p.place.axis, p.preset) for p in points):
        own = [p for p in points if (p.place.axis, p.preset) == (axis, preset)]
        at = [p.place.at for p in own]

        def slope(of: Callable[[Point], float | None], own: list[Point] = own, at: list[int] = at) -> float | None:
            return exponent(at, [of(p) for p in own])

        def sure(value: float | None) -> float:
            return math.nan if value is None else value

        if len(own) < 2:
            continue
        fits.append(
            Fit(
                preset,
                axis,
                len(own),
                step=sure(slope(lambda p: p.step[1])),
                step_last=sure(slope(lambda p: p.step[1], own[-2:], at[-2:])),
                step_theory=sure(slope(lambda p: p.cost.work)),
                refresh=slope(lambda p: None if p.refresh is None else p.refresh[1]),
                refresh_theory=slope(lambda p: p.cost.refresh_flops),
                state=sure(slope(lambda p: p.state)),
                state_theory=sure(slope(lambda p: p.cost.state)),
                temporaries=slope(lambda p: p.temporaries),
            )
        )
    return fits


# ------------------------------------------------------------------------------------------------------------------------- show


def show_points(points: Sequence[Point], out: Console) -> None:
    """All that was measured, one axis after another and within it preset by preset."""
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
    """The exponents, as a table of Markdown, so that a page can take it as it is."""
    numbers = ("step", "last two", "in theory", "refresh", "in theory", "state", "in theory", "temporaries")
    table = _aligned(Table("axis", "preset", "points", *numbers, box=box.MARKDOWN))
    for fit in fits:
        times = (fit.step, fit.step_last, fit.step_theory, fit.refresh, fit.refresh_theory)
        table.add_row(fit.axis, fit.preset, str(fit.points), *map(_number, (*times, fit.state, fit.state_theory, fit.temporaries)))
    out.print(table)


def heading(axis: str) -> str:
    """What an axis is, and what stays as it is along it."""
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


# ------------------------------------------------------------------------------------------------------------------------- draw


def draw(points: Sequence[Point], fits: Sequence[Fit], path: Path) -> None:
    """Times of steps without a refresh, a panel an axis, both scales logarithmic; the lines are the fits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(p.place.axis for p in points))
    presets = list(dict.fromkeys(p.preset for p in points))
    figure = Figure(figsize=(1 + 4 * len(axes), 5.2 + 0.2 * len(presets)), layout="constrained")
    FigureCanvasAgg(figure)  # its own canvas: no display, no state of pyplot's touched
    for axis, panel in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        _panel(panel, axis, presets, [p for p in points if p.place.axis == axis], [fit for fit in fits if fit.axis == axis])
    figure.savefig(path, dpi=1200 / 13)  # 1200 pixels wide with three panels


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
    """The fitted line at the same places: it goes through the mean of the logarithms."""
    centre = sum(math.log(y) - slope * math.log(x) for x, y in zip(at, values, strict=True)) / len(at)
    return [math.exp(centre + slope * math.log(x)) for x in at]


# ---------------------------------------------------------------------------------------------------------------------- command


def record(context: dict[str, Any], points: Sequence[Point], fits: Sequence[Fit]) -> str:
    """Everything as JSON; a number that is not there is null."""
    rows = [{key: None if isinstance(v, float) and math.isnan(v) else v for key, v in asdict(fit).items()} for fit in fits]
    return json.dumps({**context, "points": [asdict(p) for p in points], "fits": rows}, indent=1) + "\n"


def machine(device: torch.device) -> str:
    """The name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def numbers(text: str, option: str, least: int, most: int | None = None) -> list[int]:
    """A comma list, sorted, each number once.

    Raises:
        typer.BadParameter: what is no number of that range.
    """
    words = sorted({part.strip() for part in text.split(",") if part.strip()})
    wrong = [word for word in words if not word.isdecimal() or int(word) < least or (most is not None and int(word) > most)]
    if wrong:
        span = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise typer.BadParameter(f"'{wrong[0]}' is no whole number {span}; give a list such as 256,512", param_hint=option)
    return sorted({int(word) for word in words})


def checked(presets: str) -> list[str]:
    """The presets named, each of which can be loaded.

    Raises:
        typer.BadParameter: there is none, or one cannot be used.
    """
    names = list(dict.fromkeys(name.strip() for name in presets.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("names no preset; give a list such as muon,cosmos", param_hint="--presets")
    for name in names:
        try:
            load_spec(name)
        except SpecError as error:
            raise typer.BadParameter(str(error), param_hint="--presets") from None
    return names


def usable(device: str) -> torch.device:
    """The device, where temporaries can be measured on it.

    Raises:
        typer.BadParameter: it is not here, or torch does not tell what a step allocates there.
    """
    try:
        found = choose_device(device)
    except (LabError, KeyError) as error:
        raise typer.BadParameter(str(error) if isinstance(error, LabError) else f"'{device}' is no device", param_hint="--device") from None
    if found.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"temporaries cannot be measured on {found.type}; use cpu or cuda", param_hint="--device")
    return found


def writable(path: Path | None, option: str) -> None:
    """Learn before the measurement, not after it, that a file cannot be written.

    Raises:
        typer.BadParameter: its folder cannot be made, or matplotlib is missing where it is a plot.
    """
    if path is None:
        return
    if option == "--plot" and find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib is not installed; run: pip install 'subspace-opt[lab]'", param_hint=option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint=option) from None


def main(
    presets: Annotated[str, typer.Option(help="Names with commas between.")] = "muon,cosmos,soap,galore,adamw",
    widths: Annotated[str, typer.Option(help="Hidden widths, one layer each; an empty list leaves the axis out.")] = "256,512,1024,2048",
    layers: Annotated[str, typer.Option(help=f"Numbers of layers, at width {LAYER_WIDTH}.")] = "1,2,4,8",
    ranks: Annotated[str, typer.Option(help=f"Ranks, of one layer of width {RANK_WIDTH}.")] = "16,32,64,128,256",
    steps: Annotated[int, typer.Option(min=2, help="Steps without a refresh that are timed at each point.")] = 10,
    refreshes: Annotated[int, typer.Option(min=2, help="Steps with a refresh that are timed at each point.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help=f"Time fewer, but {LEAST}, where a point's steps take more than that.")] = 60.0,
    memory: Annotated[float, typer.Option(min=0, help="GiB for state, weights and gradients; larger points are left out.")] = 12.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on a CPU.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    json_to: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Where to write every number.")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", metavar="PATH", help="Where to draw the times, as a PNG.")] = None,
) -> None:
    """Measure how the cost of `step()` grows with width, layers and rank."""
    names, where = checked(presets), usable(device)
    wanted = places(numbers(widths, "--widths", 16), numbers(layers, "--layers", 1), numbers(ranks, "--ranks", 1, RANK_WIDTH))
    writable(json_to, "--json")
    writable(plot_to, "--plot")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its starts and stops on stderr
    torch.set_num_threads(threads)
    settle_allocator()
    torch.manual_seed(0)
    context: dict[str, Any] = {"torch": torch.__version__, "device": str(where), "machine": machine(where), "threads": threads}
    context |= {"steps": steps, "command": shlex.join(["python", *sys.argv])}
    told = Console(stderr=True, highlight=False, soft_wrap=True)
    points: list[Point] = []
    for point in measure(names, wanted, memory * 2**30, Effort(steps, refreshes, seconds), where, told.print):
        points.append(point)
        if json_to is not None:  # after each, so that a run that is stopped leaves what it has
            json_to.write_text(record(context, points, fitted(points)))
    if not points:
        raise typer.BadParameter("nothing is left to measure: give widths, layers or ranks that fit into --memory")
    fits = fitted(points)
    out = Console(highlight=False, width=None if Console().is_terminal else 140)
    out.print(", ".join(f"{key} {value}" for key, value in context.items()), soft_wrap=True)
    out.print()
    show_points(points, out)
    if fits:
        show_fits(fits, out)
    if plot_to is not None:
        draw(points, fits, plot_to)


if __name__ == "__main__":
    typer.run(main)
