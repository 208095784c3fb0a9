"""Figures without a display, and the colour, marker and dash of each run in all pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import LabError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which can be told apart with any colour vision. Markers and dashes tell the runs apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Look:
    """The appearance of one run, in matplotlib's notation."""

    colour: str
    marker: str
    dash: str
    hue: int  # position in `COLOURS`


def look(number: int) -> Look:
    """The appearance of the run at a position, counted from 0. The first 49 runs have different pairs of colour and marker."""
    hue = number % len(COLOURS)
    return Look(COLOURS[hue], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)], DASHES[number % len(DASHES)], hue)


def new_figure(width: float, height: float, *, canvas: Literal["png", "svg"] = "png") -> Figure:
    """An empty figure, in inches, with a canvas of its own: it needs no display and leaves the state of pyplot alone.

    Raises:
        LabError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LabError("picture: matplotlib is not installed. Run: pip install 'subspace-opt[lab]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    (FigureCanvasAgg if canvas == "png" else FigureCanvasSVG)(figure)
    return figure
