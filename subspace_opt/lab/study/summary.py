"""The outcome of a study on a console: a table as wide as the terminal allows, and sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .statistics import Line, find_reference, summarize
from .table import row
from .words import costs_and_savings, difference, headline, shorten, warnings

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

    from .records import Study

# field of `Row`: heading
_COLUMNS = {
    "label": "optimizer",
    "tuned": "tuned",
    "loss": "final loss",
    "to_best": "to best",
    "to_best_seeds": "in seeds",
    "to_reference": "to {}",
    "tokens": "tokens",
    "seconds": "seconds",
    "reached_seeds": "reached",
    "measured": "state",
    "median": "step ms",
    "p95": "95 %",
    "worst": "worst",
    "share": "optimizer",
}
# Columns that are left out one by one until the table fits; the report has them all.
_DROPPED = ("p95", "worst", "share", "to_reference", "to_best_seeds", "reached_seeds", "seconds", "tuned", "tokens", "median", "measured")
_LEFT = {"label", "tuned", "to_best_seeds"}


def summary(study: Study) -> list[RenderableType]:
    """Renderables for rich: the table, the verdict, the paired differences from the best's side, and the warnings."""
    from rich.padding import Padding
    from rich.text import Text

    lines, reference = summarize(study), find_reference(study)
    parts: list[RenderableType] = [_Results(lines, reference.label if reference else ""), "", Text(headline(lines), style="bold")]
    pairs = [difference(line.to_best.turned()) for line in lines if line.to_best is not None and line.to_best.seeds]
    parts += [Padding(Text(pair), (0, 0, 0, 2), expand=False) for pair in pairs]
    savings, limits = costs_and_savings(study, lines), warnings(study, lines)
    parts += [Text(" ".join(savings))] if savings else []
    parts += ["", *(Text.assemble(("note: ", "yellow"), text) for text in limits)] if limits else []
    return parts


class _Results:
    """The table of a study. It leaves out columns that the terminal has no room for."""

    def __init__(self, lines: list[Line], reference: str) -> None:
        self.lines, self.reference = lines, reference

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.measure import Measurement
        from rich.text import Text

        label_width = 16 if options.max_width < 120 else 24
        hidden = set() if self.reference else {"to_reference", "tokens", "seconds"}
        if not any(row(line, has_reference=True).reached_seeds for line in self.lines):
            hidden.add("reached_seeds")
        shown = [field for field in _COLUMNS if field not in hidden]
        table = self._table(shown, label_width)
        for field in _DROPPED:
            if Measurement.get(console, options.update(width=1000), table).maximum <= options.max_width:
                break
            shown = [other for other in shown if other != field]
            table = self._table(shown, label_width)
        yield table
        yield Text(self._legend(set(shown)), style="dim")

    def _table(self, shown: list[str], label_width: int) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for field in shown:
            name = _COLUMNS[field].format(shorten(self.reference, label_width))
            table.add_column(name, justify="left" if field in _LEFT else "right", no_wrap=True, overflow="fold")
        for line in self.lines:
            cells = row(line, has_reference=bool(self.reference))
            texts = [getattr(cells, field) for field in shown]
            texts[0] = shorten(texts[0], label_width)
            table.add_row(*map(Text, texts), style="bold green" if line is self.lines[0] and line.loss.count else None)
        return table

    def _legend(self, shown: set[str]) -> str:
        ratios = "tokens, seconds" if "seconds" in shown else "tokens"
        to_reference = f"; {ratios}: to {self.reference}'s final loss, relative to {self.reference}'s" if "tokens" in shown else ""
        return f"loss: nats per token, with 95 % intervals over seeds; to best: paired by seed{to_reference}; step: median"
