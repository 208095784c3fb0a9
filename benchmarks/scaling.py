"""How the cost of a step grows with width, layers and rank: time, a refresh, state, temporaries, and the exponents of their growth.

Each axis is a series of models of hidden matrices (those of a LLaMA, as in `step_time.py`). An exponent is the slope of a line through the
points in logarithms; beside it stands the one that the planner's own numbers have over the same points.

Example: python benchmarks/scaling.py --widths 256,512,1024 --plot docs/scaling.png --json benchmarks/records/scaling.json
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from step_time import gradients, hidden_matrices, period, spread
from torch import nn

from subspace_opt import SubspaceOptimizer, build
from subspace_opt.lab.device import choose_device, clock
from subspace_opt.lab.measure import measured_bytes, peak_temporaries
from subspace_opt.plan import Plan
from subspace_opt.spec import load_spec


@dataclass(frozen=True)
class Point:
    """One preset on one model. Times in milliseconds, (lower quartile, median, upper quartile)."""

    preset: str
    axis: str
    at: int
    step: tuple[float, float, float]
    refresh: float | None
    state: int
    temporaries: int
    weights: int  # bytes
    theory: float  # operations of a step or, where there are none but entry by entry, bytes moved
    theory_state: int


def point(preset: str, axis: str, at: int, model: nn.Module, steps: int, overrides: dict[str, Any]) -> Point:
    """Measure one."""
    own = list(model.parameters())
    device = own[0].device
    optimizer = build(preset, model, lr=1e-5, overrides=overrides)
    pool = [gradients(own) for _ in range(2)]

    def give(number: int) -> None:
        for p, gradient in zip(own, pool[number % 2], strict=True):
            p.grad = gradient

    def timed(number: int) -> float:
        give(number)
        start = clock(device)
        optimizer.step()
        return 1e3 * (clock(device) - start)

    for number in range(2):
        timed(number)
    times = [timed(number) for number in range(steps)]
    refreshes = []
    if period(optimizer):
        for number in range(2):
            optimizer.refresh_bases()
            refreshes.append(timed(number))
    give(0)
    temporaries = peak_temporaries(optimizer.step, device)
    weights = sum(p.numel() * p.itemsize for p in own)
    theory = _operations(optimizer) or 2.0 * optimizer.plan.total_bytes + 3.0 * weights
    held, planned = measured_bytes(optimizer), optimizer.plan.total_bytes
    refresh = median(refreshes) if refreshes else None
    return Point(preset, axis, at, spread(times), refresh, held, temporaries, weights, theory, planned)


def _operations(optimizer: SubspaceOptimizer) -> float:
    total = 0.0
    for row in optimizer.plan.rows:
        for block, split in row.splits:
            always = split.opens and split.pipeline.selector.every == 1
            total += block.count * (split.flops[0] + (split.flops[1] if always else 0.0))
    return total


def planned(preset: str, width: int, layers: int, overrides: dict[str, Any]) -> tuple[Plan, int]:
    """The plan of a model that is not made, and the bytes of its weights."""
    model = hidden_matrices(width, layers, torch.device("meta"))
    return build(preset, model, overrides=overrides).plan, sum(p.numel() * p.itemsize for p in model.parameters())


def exponent(at: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value against log place, by least squares."""
    x, y = [math.log(v) for v in at], [math.log(v) for v in values]
    across = sum((a - mean(x)) ** 2 for a in x)
    return sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y, strict=True)) / across


def show(points: Sequence[Point], out: Console) -> None:
    """All points, then the exponents."""
    table = Table(
        "preset", "axis", "at", "step ms", "quartiles", "refresh ms", "state / plan", "state / weights", "temporaries / weights", box=None
    )
    for p in points:
        low, middle, high = p.step
        refresh = "-" if p.refresh is None else f"{p.refresh:.1f}"
        parts = (f"{p.state / p.theory_state:.3f}", f"{p.state / p.weights:.2f}", f"{p.temporaries / p.weights:.2f}")
        table.add_row(p.preset, p.axis, str(p.at), f"{middle:.1f}", f"{low:.1f}-{high:.1f}", refresh, *parts)
    out.print(table)
    out.print()
    fitted = Table("preset", "axis", "time", "in theory", "state", "in theory", box=None)
    for preset, axis, own in series(points):
        at = [p.at for p in own]
        numbers = ([p.step[1] for p in own], [p.theory for p in own], [p.state for p in own], [p.theory_state for p in own])
        fitted.add_row(preset, axis, *(f"{exponent(at, values):.2f}" for values in numbers))
    out.print(fitted)


def series(points: Sequence[Point]) -> list[tuple[str, str, list[Point]]]:
    """Points by preset and axis, where there are two or more."""
    keys = dict.fromkeys((p.preset, p.axis) for p in points)
    grouped = [(preset, axis, [p for p in points if (p.preset, p.axis) == (preset, axis)]) for preset, axis in keys]
    return [one for one in grouped if len(one[2]) > 1]


def plot(points: Sequence[Point], path: Path) -> None:
    """Step times, one panel an axis, both scales logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(p.axis for p in points))
    presets = list(dict.fromkeys(p.preset for p in points))
    figure, panels = plt.subplots(1, len(axes), figsize=(4.2 * len(axes), 4.2), squeeze=False, layout="constrained")
    for preset, axis, own in series(points):
        panel, colour = panels[0][axes.index(axis)], f"C{presets.index(preset)}"
        at, times = [p.at for p in own], [p.step[1] for p in own]
        bars = [[p.step[1] - p.step[0] for p in own], [p.step[2] - p.step[1] for p in own]]
        panel.errorbar(at, times, yerr=bars, color=colour, marker="o", capsize=3, label=preset)
        panel.set(xscale="log", yscale="log", title=f"against {axis}", xlabel=axis, ylabel="ms a step")
        panel.set_xticks(at, [str(v) for v in at])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=110)


def main(
    presets: Annotated[str, typer.Option(help="Names with commas between.")] = "muon,cosmos,soap,galore,adamw",
    widths: Annotated[str, typer.Option(help="Hidden widths, one layer each.")] = "256,512,1024,2048",
    layers: Annotated[str, typer.Option(help="Numbers of layers, at width 256.")] = "1,2,4,8",
    ranks: Annotated[str, typer.Option(help="Ranks, of one layer of width 512.")] = "16,32,64,128,256",
    steps: Annotated[int, typer.Option(min=2, help="Steps that are timed at each point.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on a CPU.")] = 1,
    memory: Annotated[float, typer.Option(help="GiB for weights, gradients and state of a point; larger ones are left out.")] = 12.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "cpu",
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Where to draw the times.")] = None,
    json_to: Annotated[Path | None, typer.Option("--json", help="Where to write every number.")] = None,
) -> None:
    """Measure how the cost of a step grows with width, layers and rank."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where = choose_device(device)
    out = Console(highlight=False, width=None if Console().is_terminal else 140)
    points: list[Point] = []
    for preset in (name.strip() for name in presets.split(",")):
        ranked = "rank" in load_spec(preset).pipelines.get("matrix", load_spec("adamw").pipelines["all"]).selector.model_dump()
        wanted: list[tuple[str, int, int, int, dict[str, Any]]] = [
            *(("width", w, w, 1, {}) for w in _numbers(widths, "--widths")),
            *(("layers", n, 256, n, {}) for n in _numbers(layers, "--layers")),
            *(("rank", r, 512, 1, {"matrix.selector.rank": r}) for r in (_numbers(ranks, "--ranks") if ranked else [])),
        ]
        for axis, at, width, depth, overrides in wanted:
            plan, weights = planned(preset, width, depth, overrides)
            if plan.total_bytes + 4 * weights > memory * 2**30:
                out.print(f"{preset}: {axis} {at} left out, it takes more than {memory} GiB")
                continue
            points.append(point(preset, axis, at, hidden_matrices(width, depth, where), steps, overrides))
    context = {"torch": torch.__version__, "device": _device_name(where), "threads": threads, "command": shlex.join(["python", *sys.argv])}
    out.print(", ".join(f"{key} {value}" for key, value in context.items()))
    out.print()
    show(points, out)
    _write(json_to, lambda path: path.write_text(json.dumps({**context, "points": [asdict(p) for p in points]}, indent=1) + "\n"))
    _write(plot_to, lambda path: plot(points, path))


def _write(path: Path | None, write: Callable[[Path], object]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of whole numbers such as 256,512", param_hint=option) from None


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    )


if __name__ == "__main__":
    typer.run(main)
