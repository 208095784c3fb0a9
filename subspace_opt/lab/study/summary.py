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

# (heading, field of `Row`, terminal width from which the column is shown)
_COLUMNS = (
    ("optimizer", "label", 0),
    ("tuned", "tuned", 100),
    ("final loss", "loss", 0),
    ("to best", "to_best", 0),
    ("in seeds", "to_best_seeds", 110),
    ("to {}", "to_reference", 150),
    ("tokens", "tokens", 0),
    ("seconds", "seconds", 100),
    ("state", "measured", 0),
    ("step ms", "median", 0),
    ("95 %", "p95", 140),
    ("worst", "worst", 140),
    ("optimizer", "share", 140),
)
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
        from rich.text import Text

        width = options.max_width
        hidden = set() if self.reference else {"to_reference", "tokens", "seconds"}
        shown = [column for column in _COLUMNS if column[2] <= width and column[1] not in hidden]
        yield self._table(shown, label_width=16 if width < 120 else 24)
        yield Text(self._legend({field for _, field, _ in shown}), style="dim")

    def _table(self, shown: list[tuple[str, str, int]], label_width: int) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for heading, field, _ in shown:
            name = heading.format(shorten(self.reference, label_width))
            table.add_column(name, justify="left" if field in _LEFT else "right", no_wrap=field != "tuned", overflow="fold")
        for line in self.lines:
            cells = row(line, has_reference=bool(self.reference))
            texts = [getattr(cells, field) for _, field, _ in shown]
            texts[0] = shorten(texts[0], label_width)
            table.add_row(*map(Text, texts), style="bold green" if line is self.lines[0] and line.loss.count else None)
        return table

    def _legend(self, shown: set[str]) -> str:
        ratios = "tokens, seconds" if "seconds" in shown else "tokens"
        to_reference = f"; {ratios}: to {self.reference}'s final loss, relative to {self.reference}'s" if "tokens" in shown else ""
        return f"loss: nats per token, with 95 % intervals over seeds; to best: paired by seed{to_reference}; step: median"
