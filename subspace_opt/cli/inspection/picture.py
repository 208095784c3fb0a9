"""The picture of `inspect`: spectra, captured energy and bytes of state. matplotlib is imported here only."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint import CheckpointError
from ...diagnostics.saved import PLACES, SavedLayer
from ...lab.report import readable_bytes
from ..tables import split_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which can be told apart with any colour vision.
VERDICTS = {"fits": "#009E73", "too small": "#E69F00", "wasted": "#56B4E9", None: "#999999"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_BARS = 40
KINDS = (".svg", ".png", ".html")


def check_picture(path: Path) -> None:
    """Raise CheckpointError unless the picture can be written: its kind is known and matplotlib is installed."""
    if path.suffix not in KINDS:
        raise CheckpointError(f"--out {path}: the name should end in {', '.join(KINDS)}")
    if not path.parent.is_dir():
        raise CheckpointError(f"--out {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise CheckpointError("the picture needs matplotlib, which is not installed; run: pip install 'subspace-opt[lab]'")


def write_picture(layers: Sequence[SavedLayer], path: Path, *, title: str) -> None:
    """Draw the spectra, the captured energy and the bytes of a state, as SVG, PNG, or a page with the SVG inside."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = by_group(layers)
    captured = [name for name, some in groups if any(layer.captured_momentum is not None for layer in some)]
    height = max(4.5, 1.5 + 0.24 * len(groups))
    with rc_context({"svg.hashsalt": "inspect", "svg.fonttype": "none"}):
        figure = Figure(figsize=(15 if captured else 11, height), layout="constrained")
        FigureCanvasAgg(figure)  # a canvas of its own needs no display and leaves the state of pyplot alone
        axes = figure.subplots(1, 3 if captured else 2, squeeze=False, width_ratios=(1.4, 1, 1) if captured else (1.4, 1))[0]
        figure.suptitle(title)
        _draw_spectra(axes[0], layers)
        if captured:
            _draw_captured(axes[1], [(name, some) for name, some in groups if name in captured])
        _draw_bytes(axes[-1], groups)
        stream = io.BytesIO()
        kind = "png" if path.suffix == ".png" else "svg"
        figure.savefig(stream, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    content = stream.getvalue()
    try:
        path.write_bytes(_page(content.decode(), title).encode() if path.suffix == ".html" else content)
    except OSError as error:
        raise CheckpointError(f"--out {path} cannot be written: {error.strerror}; choose another place") from error


def by_group(layers: Sequence[SavedLayer]) -> list[tuple[str, list[SavedLayer]]]:
    """The layers by themselves, or by block of the model if there are more than `MOST_BARS`; then the largest blocks."""
    if len(layers) <= MOST_BARS:
        return [(layer.name.removesuffix(".weight"), [layer]) for layer in layers]
    groups = [(name, list(some)) for name, some in groupby(layers, key=lambda layer: split_name(layer.name)[0])]
    if len(groups) <= MOST_BARS:
        return groups
    kept = sorted(groups, key=lambda group: -sum(layer.state_bytes for layer in group[1]))[:MOST_BARS]
    return [group for group in groups if group in kept]


def _draw_spectra(axes: Axes, layers: Sequence[SavedLayer]) -> None:
    """Energy of each direction relative to their mean, against the place of the direction. Every curve ends at its rank."""
    seen: set[str | None] = set()
    for layer in layers:
        if len(layer.spectrum) > 1:
            r = len(layer.spectrum)
            label = None if layer.verdict in seen else layer.verdict or "no verdict"
            seen.add(layer.verdict)
            axes.plot(
                range(1, r + 1), [max(p * r, 1e-12) for p in layer.spectrum], color=VERDICTS[layer.verdict], lw=1, alpha=0.7, label=label
            )
    if seen:
        axes.set(xscale="log", yscale="log", xlabel="direction", ylabel="energy, relative to the mean")
        axes.set_ylim(bottom=max(1e-6, axes.get_ylim()[0]))
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "the state holds no spectrum", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
    axes.set_title("spectra inside the subspace")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_captured(axes: Axes, groups: Sequence[tuple[str, list[SavedLayer]]]) -> None:
    """The share of the momentum that the subspace captures, and a mark for the best subspace of its rank."""
    names = [name for name, _ in groups]
    axes.barh(names, [_mean(some, "captured_momentum") for _, some in groups], color=COLOURS[0], height=0.6, label="captured")
    best = [(name, _mean(some, "captured_momentum_best")) for name, some in groups]
    axes.plot([value for _, value in best], [name for name, _ in best], "|", color="#000000", markersize=9, label="best of this rank")
    axes.set(xlim=(0, 1.02), title="momentum captured")
    _bare(axes)


def _mean(layers: Sequence[SavedLayer], name: str) -> float:
    known = [value for layer in layers if (value := getattr(layer, name)) is not None]
    return sum(known) / len(known) if known else float("nan")


def _draw_bytes(axes: Axes, groups: Sequence[tuple[str, list[SavedLayer]]]) -> None:
    """Bytes of state by place of the pipeline, one bar for each layer."""
    names, left = [name for name, _ in groups], [0.0] * len(groups)
    for place, colour in zip(PLACES, COLOURS, strict=True):
        sizes = [float(sum(layer.bytes_by_place.get(place, 0) for layer in some)) for _, some in groups]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, height=0.6, label=place)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_title("bytes of state")
    axes.xaxis.set_major_formatter(lambda value, _: readable_bytes(value))
    tick = 2 ** max(0, math.ceil(math.log2(max(*left, 1) / 2.5)))
    axes.set_xticks([tick * i for i in range(int(max(left) / tick) + 1)])
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncol=4)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def _page(svg: str, title: str) -> str:
    """One file with the picture inside. The picture keeps a white ground on a dark page."""
    drawn = svg[svg.index("<svg") :]
    style = (
        "body{margin:1.5rem;font:16px system-ui,sans-serif;color-scheme:light dark}figure{margin:0;background:#fff;overflow-x:auto}"
        "svg{max-width:100%;height:auto}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{style}</style><h1>{escape(title)}</h1><figure>{drawn}</figure></html>\n"
    )
