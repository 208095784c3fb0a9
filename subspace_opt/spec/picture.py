"""A pipeline as a picture: an SVG with a box for each place, from the gradient at the top to the weight at the bottom.

Lines and text take the colour of the page (`currentColor`), so one picture serves light and dark pages. It is 340 units wide, and it can
be read at that many pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from ..algebra.core import Rule, Selector
from ..algebra.pipeline import Pipeline
from ..algebra.shaped import Shaped
from ..algebra.weight_rule import WeightRule
from ..registry import kind_of
from .model import Spec

WIDTH, GAP, LINE, PAD, JOIN = 340.0, 18.0, 15.0, 7.0, 20.0
CHARACTERS = 0.163  # of a character's width to the picture's, at 11 units: lines are cut to fit
LARGE = 1 << 20  # sides of a matrix larger than any rank
INSIDE, OUTSIDE = "#d97706", "#0e7490"


class Box(NamedTuple):
    """A labelled box; `lines`: a heading and what stands below it."""

    lines: tuple[str, ...]
    colour: str = ""  # of the fill; none for most places
    dashed: bool = False

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + 2 * PAD


def pipeline_svg(pipeline: Pipeline, name: str = "pipeline") -> str:
    """The picture of a pipeline as one `<svg>` element without blank lines; `name`: its title for screen readers."""
    parts: list[str] = []
    y = _word(parts, 12.0, "gradient")
    for box in _before(pipeline):
        y = _below(parts, y, box)
    shaped = Shaped.of(pipeline, LARGE, LARGE)
    y = _split(parts, y, shaped) if shaped.opens else _below(parts, y, Box(("rule", *_words(pipeline.complement)), OUTSIDE))
    for box in _after(pipeline):
        y = _below(parts, y, box)
    parts.append(_arrow(WIDTH / 2, y, y + GAP))
    y = _word(parts, y + GAP + 13.0, "weight")
    style = 'font-family="inherit" font-size="11" fill="none" stroke="currentColor" stroke-width="1"'
    top = f'<svg class="pipeline" viewBox="0 0 {WIDTH:g} {y:g}" width="{WIDTH:g}" height="{y:g}" role="img" {style}>'
    return "\n".join([top, f"<title>{escape(name)}: from gradient to weight</title>", *parts, "</svg>"])


def hidden_pipeline(spec: Spec) -> Pipeline:
    """The pipeline of a spec's hidden matrices."""
    return spec.pipelines.get("matrix") or next(iter(spec.pipelines.values()))


def is_whole(shaped: Shaped) -> bool:
    """True if the basis spans the whole space, so nothing lies outside."""
    return shaped.inner[0].size * shaped.inner[1].size == shaped.rows.size * shaped.cols.size


# ---------------------------------------------------------------------------------------------------------------- the text in boxes


def _before(p: Pipeline) -> Iterable[Box]:
    if p.feedback is not None:
        yield Box(
            ("error feedback", "+ what the last update left out" if not p.feedback else f"+ the rest, + {p.feedback:g} of the update")
        )
    if p.momentum:
        yield Box(("momentum, full space", *_words(p.momentum)))


def _after(p: Pipeline) -> Iterable[Box]:
    if p.finish:
        yield Box(("finish", *_words(p.finish)))
    if p.apply:
        yield Box(("apply to the weight", *_words(p.apply)))
    if p.decay != "before":
        yield Box(("decay", {"after": "of the weight, after the update", "coupled": "added to the gradient"}[p.decay]))


def _selector(p: Pipeline) -> Box:
    selector = p.selector
    when = "on call" if selector.every is None else "every update" if selector.every == 1 else f"every {selector.every} updates"
    parts = [getattr(selector, name, None) for name in ("first", "then")]
    named = f"{kind_of(type(selector))}: {' then '.join(map(_sized, filter(None, parts)))}" if all(parts) else _sized(selector)
    return Box((f"selector {named}", f"from {selector.source}, {when}"))


def _sized(selector: Selector) -> str:
    size = getattr(selector, "rank", None)
    rank = "" if size is None else f", rank {size:g}" if size >= 1 else f", {size:.0%} of the side"
    return kind_of(type(selector)) + rank


def _words(rules: Sequence[Rule | WeightRule]) -> list[str]:
    """A line for each rule: its kind and the numbers that differ from its defaults."""
    return [_call(rule) for rule in rules]


def _call(rule: Rule | WeightRule) -> str:
    given = rule.model_dump(exclude_defaults=True)
    given.pop("kind", None)
    return " ".join([kind_of(type(rule)), *(f"{key} {_short(value)}" for key, value in given.items() if _is_short(value))])


def _is_short(value: Any) -> bool:
    return not isinstance(value, dict | list | tuple) or (isinstance(value, dict) and "schedule" in value)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return str(value["schedule"])
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------------------- shapes


def _split(parts: list[str], y: float, shaped: Shaped) -> float:
    """The selector, the two columns under it, and where they meet."""
    p = shaped.pipeline
    y = _below(parts, y, _selector(p))
    if is_whole(shaped):
        return _below(parts, y, Box(("in this basis", *_words(p.inside)), INSIDE))
    inside = _column("inside the subspace", p.inside, bool(p.inside), INSIDE)
    columns = inside, _column("outside", p.complement, shaped.has_complement, OUTSIDE)
    half = (WIDTH - GAP) / 2
    top = y + GAP
    join = top + max(box.height for box in columns) + JOIN
    for x, box, weight in zip((0.0, half + GAP), columns, (p.mix.inside, p.mix.complement), strict=True):
        middle = x + half / 2
        parts.append(_arrow(middle, y, top))
        _box(parts, x, top, half, box)
        if box.dashed:
            continue
        if weight:
            parts.append(_path(f"M{middle:g} {top + box.height:g}V{join:g}H{WIDTH / 2:g}"))
        if weight != 1:
            number = f"x {weight:g}" if weight else "only measured"
            parts.append(_text(middle + 6, top + box.height + 13, number, anchor="start" if weight else "middle"))
    parts.append(_path(f"M{WIDTH / 2:g} {join:g}V{join + 4:g}"))
    return join + 4


def _column(title: str, rules: tuple[Rule, ...], used: bool, colour: str) -> Box:
    return Box((title, *_words(rules)), colour) if used else Box((title, "left out"), dashed=True)


def _below(parts: list[str], y: float, box: Box) -> float:
    """An arrow and a box as wide as the picture; returns the lower edge."""
    parts.append(_arrow(WIDTH / 2, y, y + GAP))
    _box(parts, 0.0, y + GAP, WIDTH, box)
    return y + GAP + box.height


def _box(parts: list[str], x: float, y: float, width: float, box: Box) -> None:
    fill = f'fill="{box.colour}" fill-opacity="0.14"' if box.colour and not box.dashed else ""
    dashes = ' stroke-dasharray="4 3" stroke-opacity="0.6"' if box.dashed else ""
    parts.append(f'<rect x="{x + 0.5:g}" y="{y:g}" width="{width - 1:g}" height="{box.height:g}" rx="5" {fill}{dashes}/>')
    for i, line in enumerate(box.lines):
        most = int(width * CHARACTERS)
        text = line if len(line) <= most else line[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
        parts.append(_text(x + width / 2, y + PAD + 11 + i * LINE, text, strong=i == 0))


def _word(parts: list[str], y: float, text: str) -> float:
    parts.append(_text(WIDTH / 2, y, text))
    return y + 5.0


def _text(x: float, y: float, text: str, *, anchor: str = "middle", strong: bool = False) -> str:
    weight = ' font-weight="600"' if strong else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="currentColor" stroke="none"{weight}>{escape(text)}</text>'


def _arrow(x: float, start: float, end: float) -> str:
    return _path(f"M{x:g} {start:g}V{end:g}M{x - 3.5:g} {end - 5:g}L{x:g} {end - 0.5:g}L{x + 3.5:g} {end - 5:g}")


def _path(d: str) -> str:
    return f'<path d="{d}"/>'
