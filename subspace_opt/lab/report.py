"""Report a comparison as a table, as JSON, or as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import look, new_figure
from .errors import LabError
from .run.events import Curve, Result, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


def table(results: Sequence[Result]) -> Table:
    """A table with one row for each run, in the order of the runs; the best validation loss is bold."""
    from rich.table import Table

    columns = ("planned state", "measured state", "optimizer ms", "step ms", "bytes/s")
    shown = Table("run", "lr", "validation loss", "bits/byte", *columns, title="after the last validation")
    for column in shown.columns[1:]:
        column.justify = "right"
    best = min((r.validation_loss for r in results if not math.isnan(r.validation_loss)), default=math.nan)
    for r in results:
        name = r.run if r.status == "finished" else f"{r.run} (interrupted at {r.step})"
        planned = "-" if r.planned_state_bytes is None else readable_bytes(r.planned_state_bytes)
        shown.add_row(
            name,
            f"{r.lr:.3g}",
            f"{r.validation_loss:.4f}",
            f"{r.bits_per_byte:.3f}",
            planned,
            readable_bytes(r.measured_state_bytes),
            f"{r.optimizer_ms:.1f}",
            f"{r.step_ms:.1f}",
            f"{r.tokens_per_second:,.0f}",
            style="bold" if r.validation_loss == best else None,
        )
    return shown


def to_json(results: Sequence[Result]) -> str:
    """All measurements as JSON; missing and non-finite values are `null`."""
    rows = [{**asdict(r), "validation_loss": r.validation_loss, "bits_per_byte": r.bits_per_byte} for r in results]
    return json.dumps(finite(rows), indent=2)


def write_picture(results: Sequence[Result], path: str | Path, *, title: str = "") -> Path:
    """Draw the loss curves, the memory and the time of each run, write them as a PNG, and return its path.

    Raises:
        LabError: matplotlib is not installed, or the file cannot be written.
    """
    figure = new_figure(11, 5.5)
    grid = figure.add_gridspec(2, 2, width_ratios=(2.6, 1))
    _curves(figure.add_subplot(grid[:, 0]), results, title)
    memory = [r.measured_state_bytes for r in results]
    _bars(figure.add_subplot(grid[0, 1]), results, memory, "optimizer state", readable_bytes)
    _bars(figure.add_subplot(grid[1, 1]), results, [r.optimizer_ms for r in results], "optimizer.step(), median", _ms)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise LabError(f"picture: {path} cannot be written: {error.strerror}. Choose another place") from error
    return path


def readable_bytes(count: float) -> str:
    """A number of bytes in units of 1024 with one decimal, such as 512 B or 3.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _curves(axes: Axes, results: Sequence[Result], title: str) -> None:
    """Draw the loss curves on a logarithmic scale: all runs fall steeply at first and differ at the end."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for number, r in enumerate(results):
        style = look(number)
        label = f"{r.run}: {r.validation_loss:.3f} nats, {r.bits_per_byte:.2f} bits per byte"
        axes.plot(*_xy(smooth(r.train)), color=style.colour, linestyle=style.dash, linewidth=1.2, alpha=0.75)
        axes.plot(*_xy(r.validation), color=style.colour, linestyle="none", marker=style.marker, markersize=6, label=label)
    axes.set_title(title or "the same model on the same text")
    axes.set_xlabel("update")
    axes.set_ylabel("nats per byte (lines: training, smoothed; markers: validation)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _bars(axes: Axes, results: Sequence[Result], values: Sequence[float], title: str, words: Any) -> None:
    """Draw one bar for each run, from the top, with its value beside it."""
    colours = [look(number).colour for number in range(len(results))]
    bars = axes.barh([r.run for r in results], [0 if math.isnan(v) else v for v in values], color=colours, height=0.6)
    axes.bar_label(bars, labels=[words(v) for v in values], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_title(title)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def smooth(curve: Curve) -> Curve:
    """The running mean over a fiftieth of the run. At the start it covers fewer steps, so the first loss is unchanged."""
    width = max(1, len(curve) // 50)
    losses = [loss for _, loss in curve]
    windows = [losses[max(0, at - width + 1) : at + 1] for at in range(len(losses))]
    return tuple((step, sum(window) / len(window)) for (step, _), window in zip(curve, windows, strict=True))


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]


def _ms(value: float) -> str:
    return f"{value:.1f} ms"
