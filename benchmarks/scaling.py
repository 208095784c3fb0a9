"""Measure how the cost of `step()` grows with width, layers and rank: time, state and temporaries, and the exponents of their growth.

Each axis is a series of models with the hidden matrices of a LLaMA, as in `step_time.py`. At each point a preset is timed in steps without
a refresh (the schedule is postponed, so that none comes by chance) and in steps that refresh all bases. An exponent is the slope of the
least-squares line through the logarithms. The table also shows the exponent of the planner's operations and bytes at the same points.

Example: python benchmarks/scaling.py --widths 256,512,1024 --layers "" --plot scaling.png --json scaling.json
"""

from __future__ import annotations

import gc
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from growth import (
    LAYER_WIDTH,
    RANK_WIDTH,
    Cost,
    Effort,
    Place,
    Point,
    fit_exponents,
    has_rank,
    hidden,
    overrides_of,
    periodic,
    places,
    predict,
)
from growth_report import draw, record, show
from rich.console import Console
from step_time import make_gradients, now, quartiles, settle_allocator
from torch import nn

from subspace_opt import SpecError, SubspaceOptimizer, build
from subspace_opt.lab.errors import LabError
from subspace_opt.lab.report import readable_bytes
from subspace_opt.lab.run.device import choose_device
from subspace_opt.lab.run.measure import measured_bytes, peak_temporaries
from subspace_opt.spec import load_spec

LR = 1e-5  # small, so that the weights hardly change; they do not affect the time
NEVER = 10**9  # a period that no run reaches, because some selectors do not accept null
LEAST = 3  # number of timed steps even if they are slow


def measure(
    presets: Sequence[str], where: Iterable[Place], bound: float, effort: Effort, device: torch.device, say: Callable[[str], None]
) -> Iterator[Point]:
    """Measure every preset at every place that fits into `bound` bytes. The presets of a place share its weights and gradients."""
    for place in where:
        costs = {preset: predict(preset, place) for preset in presets if place.rank is None or has_rank(preset)}
        for preset, cost in costs.items():
            if cost.needed > bound:
                needed, most = readable_bytes(cost.needed), readable_bytes(bound)
                say(f"{preset}, {place.axis} {place.at}: skipped: state, weights and gradients need {needed}, --memory allows {most}")
        fitting = {preset: cost for preset, cost in costs.items() if cost.needed <= bound}
        if not fitting:
            continue
        model = hidden(place, device)
        own = list(model.parameters())
        for p, gradient in zip(own, make_gradients(own), strict=True):
            p.grad = gradient
        for preset, cost in fitting.items():
            point = measure_point(preset, place, cost, model, effort, device)
            say(f"{preset}, {place.axis} {place.at}: {point.step[1]:.1f} ms")
            yield point
            gc.collect()  # free the state before the next one


def measure_point(preset: str, place: Place, cost: Cost, model: nn.Module, effort: Effort, device: torch.device) -> Point:
    """Measure one point."""
    optimizer = build_without_schedule(preset, model, overrides_of(place))

    def timed() -> float:
        start = now(device)
        optimizer.step()
        return 1e3 * (now(device) - start)

    def renewed() -> float:
        optimizer.refresh_bases()
        return timed()

    for _ in range(2):  # the first step computes the basis; some presets start with their second gradient
        timed()
    steps = repeat(timed, effort.steps, effort.seconds)
    temporaries = peak_temporaries(optimizer.step, device)
    refreshes, refresh_temporaries = None, None
    if cost.refresh_flops is not None:
        optimizer.refresh_bases()
        refresh_temporaries = peak_temporaries(optimizer.step, device)  # also a warm-up of the refresh
        refreshes = quartiles(repeat(renewed, effort.refreshes, effort.seconds))
    held = measured_bytes(optimizer)
    return Point(preset, place, cost, quartiles(steps), refreshes, len(steps), held, temporaries, refresh_temporaries)


def build_without_schedule(preset: str, model: nn.Module, overrides: dict[str, Any]) -> SubspaceOptimizer:
    """Build the preset so that it refreshes only on request. With spread refreshes, every step would have one."""
    seldom = periodic(build(preset, model, overrides=overrides).plan)
    return build(preset, model, lr=LR, overrides=overrides | {f"{pipeline}.selector.every": NEVER for pipeline in seldom})


def repeat(once: Callable[[], float], most: int, seconds: float) -> list[float]:
    """Times of `most` calls; fewer, but at least `LEAST`, if they take more than `seconds`."""
    times: list[float] = []
    while len(times) < most and (len(times) < LEAST or sum(times) < 1e3 * seconds):
        times.append(once())
    return times


def machine_name(device: torch.device) -> str:
    """The name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def parse_numbers(text: str, option: str, least: int, most: int | None = None) -> list[int]:
    """Parse a list of numbers separated by commas; sorted, without duplicates.

    Raises:
        typer.BadParameter: an entry is not a whole number in the range.
    """
    words = sorted({part.strip() for part in text.split(",") if part.strip()})
    wrong = [word for word in words if not word.isdecimal() or int(word) < least or (most is not None and int(word) > most)]
    if wrong:
        span = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise typer.BadParameter(f"'{wrong[0]}' is not a whole number {span}; give a list such as 256,512", param_hint=option)
    return sorted({int(word) for word in words})


def parse_presets(presets: str) -> list[str]:
    """Parse a list of presets and load each once.

    Raises:
        typer.BadParameter: the list is empty, or a preset cannot be loaded.
    """
    names = list(dict.fromkeys(name.strip() for name in presets.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("the list is empty; give presets such as muon,cosmos", param_hint="--presets")
    for name in names:
        try:
            load_spec(name)
        except SpecError as error:
            raise typer.BadParameter(str(error), param_hint="--presets") from None
    return names


def choose_measurable_device(device: str) -> torch.device:
    """The device, which must be one on which temporaries can be measured.

    Raises:
        typer.BadParameter: the device is missing, or torch does not report allocations on it.
    """
    try:
        found = choose_device(device)
    except (LabError, KeyError) as error:
        raise typer.BadParameter(
            str(error) if isinstance(error, LabError) else f"'{device}' is not a device; use cpu or cuda", param_hint="--device"
        ) from None
    if found.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"temporaries cannot be measured on {found.type}; use cpu or cuda", param_hint="--device")
    return found


def check_writable(path: Path | None, option: str) -> None:
    """Check before the measurement that a file can be written.

    Raises:
        typer.BadParameter: its folder cannot be created, or matplotlib is missing for a plot.
    """
    if path is None:
        return
    if option == "--plot" and find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib is not installed; run: pip install 'subspace-opt[lab]'", param_hint=option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written ({error.strerror}); choose another path", param_hint=option) from None


def main(
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "muon,cosmos,soap,galore,adamw",
    widths: Annotated[str, typer.Option(help="Hidden widths, with one layer each. An empty list skips the axis.")] = "256,512,1024,2048",
    layers: Annotated[str, typer.Option(help=f"Numbers of layers, at width {LAYER_WIDTH}.")] = "1,2,4,8",
    ranks: Annotated[str, typer.Option(help=f"Ranks, of one layer of width {RANK_WIDTH}.")] = "16,32,64,128,256",
    steps: Annotated[int, typer.Option(min=2, help="Timed steps without a refresh at each point.")] = 10,
    refreshes: Annotated[int, typer.Option(min=2, help="Timed steps with a refresh at each point.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help=f"Time limit in seconds for each point; at least {LEAST} steps are timed.")] = 60.0,
    memory: Annotated[float, typer.Option(min=0, help="GiB for state, weights and gradients. Larger points are left out.")] = 12.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on a CPU.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    json_to: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="File for all results.")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", metavar="PATH", help="File for a plot of the times, as PNG.")] = None,
) -> None:
    """Measure how the cost of `step()` grows with width, layers and rank."""
    names, where = parse_presets(presets), choose_measurable_device(device)
    axes = (parse_numbers(widths, "--widths", 16), parse_numbers(layers, "--layers", 1), parse_numbers(ranks, "--ranks", 1, RANK_WIDTH))
    wanted = places(*axes)
    check_writable(json_to, "--json")
    check_writable(plot_to, "--plot")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences messages of the profiler on stderr
    torch.set_num_threads(threads)
    settle_allocator()
    torch.manual_seed(0)
    context: dict[str, Any] = {"torch": torch.__version__, "device": str(where), "machine": machine_name(where), "threads": threads}
    context |= {"steps": steps, "command": shlex.join(["python", *sys.argv])}
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    points: list[Point] = []
    for point in measure(names, wanted, memory * 2**30, Effort(steps, refreshes, seconds), where, progress.print):
        points.append(point)
        if json_to is not None:  # after each point, so that an interrupted run keeps its results
            json_to.write_text(record(context, points, fit_exponents(points)))
    if not points:
        raise typer.BadParameter("no point is left to measure; give widths, layers or ranks that fit into --memory")
    fits = fit_exponents(points)
    show(context, points, fits)
    if plot_to is not None:
        draw(points, fits, plot_to)


if __name__ == "__main__":
    typer.run(main)
