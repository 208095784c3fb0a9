"""Pictures as inline SVG that takes its colours from the page, so that one picture is right in light and dark.

Matplotlib writes fixed colours. Pictures are drawn in placeholder colours, and `render` replaces each by a CSS variable.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ...drawing import COLOURS, look, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, RULE, PAPER, ALERT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
_VARIABLES = {INK: "--ink", FAINT: "--faint", RULE: "--rule", PAPER: "--paper", ALERT: "--alert"}
_VARIABLES |= {f"#0a0c{hue:02x}": f"--series-{hue}" for hue in range(len(COLOURS))}

_STYLE: dict[str, Any] = {
    "font.size": 12,
    "font.family": "DejaVu Sans",  # comes with matplotlib; wider than most fonts of a page, so that labels have room
    "text.color": INK,
    "text.parse_math": False,  # a label may contain $
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 11,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: it can be selected, and it has the font of the page
}


@dataclass(frozen=True)
class Picture:
    """One picture of the report."""

    title: str
    svg: str
    caption: str = ""


def series(number: int) -> str:
    """The placeholder colour of an optimizer, for `render`."""
    return f"#0a0c{look(number).hue:02x}"


def render(name: str, draw: Callable[[Axes], None], *, width: float, height: float, description: str) -> str:
    """Draw on axes of `width` x `height` CSS pixels and return the `<svg>` element. Names must differ within a page.

    Raises:
        LabError: matplotlib is not installed.
    """
    figure = new_figure(width / 72, height / 72, canvas="svg")
    from matplotlib import rc_context

    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.set_dpi(72)  # one point of the figure is one unit of the SVG, so `pareto` can measure labels
        figure.patch.set_alpha(0)
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", dpi=72, metadata={"Date": None})
    return _inline(out.getvalue(), name, width, height, description)


def _inline(text: str, name: str, width: float, height: float, description: str) -> str:
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    words = escape(description, quote=True)
    head = (
        f'<svg class="picture" role="img" aria-label="{words}" viewBox="0 0 {width:g} {height:g}" style="max-width: {1.3 * width:.0f}px">'
    )
    return head + body[body.index(">") + 1 :].strip()
