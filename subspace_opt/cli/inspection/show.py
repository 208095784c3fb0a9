"""The table of `inspect`, and the sentences below it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...diagnostics.saved import CAPTURED, FLAT, HELD, WASTED, SavedLayer
from ...lab.report import readable_bytes
from ..tables import make_table, split_name

NARROW = 104  # below this width the table has fewer columns, and a layer's name has a row of its own
STYLES = {"too small": "yellow", "wasted": "cyan"}
NAMED = 12  # layers named in one sentence


def show_layers(path: Path, layers: Sequence[SavedLayer], out: Console) -> None:
    """One row for each matrix with a subspace, a row for each pipeline of the others, and the verdicts."""
    total = sum(layer.state_bytes for layer in layers)
    step = max(layer.step for layer in layers)
    out.print(f"{path}, after {step:,} updates: {readable_bytes(total)} of state", end="\n\n", markup=False, soft_wrap=True)
    opened = [layer for layer in layers if has_subspace(layer)]
    if opened:
        out.print(_narrow(opened) if out.width < NARROW else _wide(opened))
        out.print()
    others = [layer for layer in layers if not has_subspace(layer)]
    if others:
        out.print(_others(others))
        out.print()
    _show_verdicts(opened, out)


def has_subspace(layer: SavedLayer) -> bool:
    """True if the state shows a basis or a spectrum."""
    return layer.rank is not None or bool(layer.spectrum)


def _wide(layers: Sequence[SavedLayer]) -> Table:
    numbers = ("rank", "effective", f"hold {HELD:.0%}", "tail", "captured", "best", "state")
    table = make_table("layer", "matrix", *numbers, "verdict", right=numbers, fold="layer")
    for layer in layers:
        cells = (*_spectrum(layer), _number(layer.tail), _share(layer.captured_momentum), _share(layer.captured_momentum_best))
        own = (escape(layer.name.removesuffix(".weight")), _matrix(layer), *cells, readable_bytes(layer.state_bytes))
        table.add_row(*own, layer.verdict or "-", style=STYLES.get(layer.verdict or ""))
    return table


def _narrow(layers: Sequence[SavedLayer]) -> Table:
    numbers = ("rank", "effective", f"hold {HELD:.0%}", "captured", "state")
    table = make_table("layer", *numbers, "verdict", right=numbers, fold="layer")
    for group, some in groupby(layers, key=lambda layer: split_name(layer.name)[0]):
        mine = list(some)
        if len(mine) > 1:
            table.add_row(escape(group))
        for layer in mine:
            name = (f"  {split_name(layer.name)[1]}" if len(mine) > 1 else layer.name).removesuffix(".weight")
            cells = (*_spectrum(layer), _share(layer.captured_momentum), readable_bytes(layer.state_bytes))
            table.add_row(escape(name), *cells, layer.verdict or "-", style=STYLES.get(layer.verdict or ""))
    return table


def _spectrum(layer: SavedLayer) -> tuple[str, str, str]:
    rank = "full" if layer.rank is None else str(layer.rank)
    if layer.effective_rank is None:
        return rank, "-", "-"
    return rank, f"{layer.effective_rank:.1f}", f"{layer.directions} of {len(layer.spectrum)}"


def _matrix(layer: SavedLayer) -> str:
    """The sizes in the orientation of the basis; `?` for one that the state does not tell."""
    sizes = "x".join("?" if size is None else str(size) for size in (layer.rows, layer.cols))
    return sizes if layer.matrices == 1 else f"{layer.matrices} of {sizes}"


def _others(layers: Sequence[SavedLayer]) -> Table:
    """Parameters without a subspace, by pipeline."""
    table = make_table("without a subspace", "parameters", "state", right=("parameters", "state"))
    number, size = Counter[str](), Counter[str]()
    for layer in layers:
        name = layer.pipeline or "unknown pipeline"
        number[name] += 1
        size[name] += layer.state_bytes
    for name in number:
        table.add_row(escape(name), str(number[name]), readable_bytes(size[name]))
    return table


def _show_verdicts(layers: Sequence[SavedLayer], out: Console) -> None:
    small = [layer for layer in layers if layer.verdict == "too small"]
    wasted = [layer for layer in layers if layer.verdict == "wasted"]
    judged = [layer for layer in layers if layer.verdict is not None]
    if small:
        out.print(
            f"rank too small in {len(small)} of {len(judged)}: the last tenth of the directions hold more than {FLAT:g} of the mean energy "
            f"of a direction, so the spectrum goes on beyond the cut, and no momentum shows that {CAPTURED:.0%} is captured. "
            f"Try a higher rank: {_names(small)}",
            markup=False,
        )
    if wasted:
        most = max(layer.directions or 0 for layer in wasted)
        out.print(
            f"rank wasted in {len(wasted)} of {len(judged)}: {HELD:.0%} of the energy lies in at most {WASTED:.0%} of the directions. "
            f"Rank {most} holds it in each of them: {_names(wasted)}",
            markup=False,
        )
    if judged and not small and not wasted:
        out.print(f"the rank fits in all {len(judged)} judged layers", markup=False)
    if not judged:
        out.print("no verdict: every basis is full or random, or the state holds no spectrum", markup=False)


def _names(layers: Sequence[SavedLayer]) -> str:
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return ", ".join(layer.name for layer in layers[:NAMED]) + more


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
