"""Measure the gain of every optional hint of a rule or a selector: steps with and without the hint alternate in one run.

A hint is an optional declaration of a plugin that makes a step faster without changing its result. Each row trains one preset twice on the
same gradients, once with the hint and once with its safe default. A ratio is taken within a round; the table gives
its median and quartiles. A hint that gains less than 5 % everywhere does not pay for its place in the contract.

Example: python benchmarks/hints.py --steps 15
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import subspace_opt.rules
import subspace_opt.selectors
from subspace_opt import Refreshed, Rule, Selector, SubspaceOptimizer, build
from subspace_opt.registry import kinds

Without = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Hint:
    """A hint, the preset that shows it, and the context in which the hint has its safe default."""

    name: str
    preset: str
    without: Without
    head: bool = False  # with an embedding of 32,000 rows
    refresh: bool = False  # steps that refresh every basis
    nonfinite: str = "raise"


@dataclass(frozen=True)
class Gain:
    """Milliseconds of a step with the hint, and the ratio of steps without and with it (lower quartile, median, upper quartile)."""

    hint: str
    preset: str
    milliseconds: float
    ratio: tuple[float, float, float]


@contextlib.contextmanager
def trait(family: type[Rule] | type[Selector], **safe: Any) -> Iterator[None]:
    """Give all kinds of a family the safe defaults of some traits."""
    with contextlib.ExitStack() as stack:
        for cls in {owner for kind in kinds(family.family).values() for owner in kind.__mro__ if "traits" in vars(owner)}:
            own = vars(cls)["traits"]
            stack.enter_context(mock.patch.object(cls, "traits", lambda self, *sides, own=own: own(self, *sides)._replace(**safe)))
        yield


@contextlib.contextmanager
def no_kernel() -> Iterator[None]:
    with mock.patch.object(subspace_opt.rules.adaptive.Adam, "kernel", lambda self: None):  # type: ignore[attr-defined]  # noqa: PT008 -- a Mock is slow
        yield


@contextlib.contextmanager
def no_coords() -> Iterator[None]:
    svd = subspace_opt.selectors.svd.Svd  # type: ignore[attr-defined]
    own = svd.refresh
    with mock.patch.object(svd, "refresh", lambda *args: Refreshed(own(*args).state)):
        yield


@contextlib.contextmanager
def no_atoms() -> Iterator[None]:
    fft = subspace_opt.selectors.fft.Fft  # type: ignore[attr-defined]
    own = fft.basis
    with mock.patch.object(fft, "basis", lambda *args: own(*args)._replace(atoms=None)):
        yield


@contextlib.contextmanager
def no_spare() -> Iterator[None]:
    with mock.patch("subspace_opt.algebra.frame.same_storage", lambda a, b: True):  # noqa: PT008
        yield


@contextlib.contextmanager
def not_in_place() -> Iterator[None]:
    with mock.patch("subspace_opt.engine.step.fails_first", lambda frame, *, refresh: False):  # noqa: PT008
        yield


HINTS = (
    Hint("reads_grad=False", "cosmos", lambda: trait(Rule, reads_grad=True)),
    Hint("reads_grad=False", "fira", lambda: trait(Rule, reads_grad=True)),
    Hint("lazy", "sumo", lambda: trait(Rule, lazy=False, measures=False)),
    Hint("lazy", "galore", lambda: trait(Rule, lazy=False, measures=False)),
    Hint("lazy", "fira", lambda: trait(Rule, lazy=False, measures=False)),
    Hint("lazy", "apollo", lambda: trait(Rule, lazy=False, measures=False)),
    Hint("elementwise", "muon", lambda: trait(Rule, elementwise=False, by_rows=False), head=True),
    Hint("elementwise", "galore", lambda: trait(Rule, elementwise=False, by_rows=False), head=True),
    Hint("by_rows", "adam-sn", lambda: trait(Rule, by_rows=False), head=True),
    Hint("by_rows", "powerstep", lambda: trait(Rule, by_rows=False, elementwise=False), head=True),
    Hint("kernel", "adamw", no_kernel, head=True),
    Hint("step.in_place", "galore", not_in_place),
    Hint("step.in_place", "muon", not_in_place),
    Hint("step.in_place", "adam-snsm", not_in_place),
    Hint("step.spare", "adam-snsm", no_spare),
    Hint("step.spare", "adam-sn", no_spare),
    Hint("decomposes=False", "trion", lambda: trait(Selector, decomposes=True)),
    Hint("decomposes=False", "dct-adamw", lambda: trait(Selector, decomposes=True)),
    Hint("coords of a refresh", "galore", no_coords, refresh=True),
    Hint("atoms of a basis", "dct-adamw", no_atoms),
)


def make_model(width: int, layers: int, head: bool) -> nn.ModuleDict:
    """The hidden matrices of LLaMA layers and, if asked for, an embedding."""
    wide = int(width * 8 / 3) // 16 * 16
    sides = [(width, width)] * 4 + [(wide, width)] * 2 + [(width, wide)]
    model = nn.ModuleDict({f"layer{i}": nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in sides) for i in range(layers)})
    if head:
        model["embedding"] = nn.Embedding(32_000, width)
    return model


def measure(hint: Hint, width: int, layers: int, steps: int) -> Gain:
    """Measure steps with and without a hint in turns, in CPU time of this thread."""
    contexts: dict[bool, Without] = {True: contextlib.nullcontext, False: hint.without}
    runs: dict[bool, tuple[list[Tensor], SubspaceOptimizer]] = {}
    for has_hint, context in contexts.items():
        with context():
            torch.manual_seed(0)
            model = make_model(width, layers, hint.head)
            runs[has_hint] = list(model.parameters()), build(hint.preset, model, nonfinite=hint.nonfinite)
    pool = [[torch.randn(p.shape) for p in runs[True][0]] for _ in range(2)]
    taken: dict[bool, list[float]] = {True: [], False: []}
    for step in range(steps + 3):
        for has_hint in random.sample([True, False], 2):
            params, optimizer = runs[has_hint]
            for p, grad in zip(params, pool[step % 2], strict=True):
                p.grad = grad
            if hint.refresh:
                optimizer.refresh_bases()
            with contexts[has_hint]():
                start = time.thread_time()
                optimizer.step()
                taken[has_hint].append(1e3 * (time.thread_time() - start))
    ratios = [without / having for without, having in zip(taken[False][3:], taken[True][3:], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return Gain(hint.name, hint.preset, median(taken[True][3:]), (low, middle, high))


def main(
    width: Annotated[int, typer.Option(help="Width of the model.")] = 512,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 1,
    steps: Annotated[int, typer.Option(help="Timed steps of each kind.")] = 15,
    only: Annotated[str, typer.Option(help="Hints whose name contains this word.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the gain of every optional hint."""
    torch.set_num_threads(1)
    gains = [measure(hint, width, layers, steps) for hint in HINTS if only in hint.name]
    if as_json:
        print(json.dumps([asdict(gain) for gain in gains], indent=1))
        return
    table = Table("hint", "preset", "step ms", "without / with", "quartiles")
    for gain in gains:
        low, middle, high = gain.ratio
        table.add_row(gain.hint, gain.preset, f"{gain.milliseconds:.1f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
