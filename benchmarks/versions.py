"""Compare two versions of this package in one run: the time of a step, the dispatched operations, and the largest difference of a weight.

The other version is a checkout in a folder. Both train the same weights on the same gradients, and they take turns in random order. A
ratio is taken within a round; the table gives the ratio of medians, and the quartiles of the rounds' ratios. Operations are counted in the
second step.

Example: git worktree add ../before v0.1.0 && python benchmarks/versions.py ../before --steps 15
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = "subspace_opt"


class Version:
    """One version of the package. Its modules are in `sys.modules` only while it is in use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.modules: dict[str, ModuleType] = {}
        with self.in_use():
            sys.path.insert(0, str(self.folder))
            self.package: Any = importlib.import_module(PACKAGE)
            self.presets: list[str] = importlib.import_module(f"{PACKAGE}.spec").preset_names(installed=False)
            sys.path.pop(0)
        if not str(self.package.__file__).startswith(str(self.folder)):
            raise typer.BadParameter(f"{self.folder} has no package {PACKAGE}; give a checkout of this repository")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the context, imports find this version."""
        outside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE}
        sys.modules.update(self.modules)
        try:
            yield
        finally:
            self.modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE}
            sys.modules.update(outside)


class Count(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Run:
    """One version's optimizer, its parameters, and its steps in milliseconds."""

    version: Version
    parameters: list[Tensor]
    optimizer: Any
    steps: list[float] = field(default_factory=list)
    operations: int = 0


@dataclass(frozen=True)
class Comparison:
    """The result for one preset; `ratio`: this version by the other."""

    preset: str
    before_ms: float
    after_ms: float
    ratio: float
    quartiles: tuple[float, float, float]
    operations_before: int
    operations_after: int
    difference: float


def make_run(version: Version, preset: str, width: int, layers: int, stacking: str) -> Run:
    wide = int(width * 8 / 3) // 16 * 16
    sides = ([(width, width)] * 4 + [(wide, width)] * 2 + [(width, wide)]) * layers
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in sides)
    with version.in_use():
        return Run(version, list(model.parameters()), version.package.build(preset, model, lr=1e-3, stacking=stacking))


def take_step(run: Run, gradients: list[Tensor], number: int) -> None:
    """Step once; the first two steps are not timed, and the second is counted."""
    for p, grad in zip(run.parameters, gradients, strict=True):
        p.grad = grad
    with run.version.in_use():
        if number == 1:
            with Count() as count:
                run.optimizer.step()
            run.operations = count.operations
            return
        start = time.thread_time()
        run.optimizer.step()
        if number:
            run.steps.append(1e3 * (time.thread_time() - start))


def compare(preset: str, before: Version, after: Version, width: int, layers: int, steps: int, stacking: str) -> Comparison:
    """Train one preset with both versions in turns."""
    runs = [make_run(version, preset, width, layers, stacking) for version in (before, after)]
    pool = [[torch.randn(p.shape) for p in runs[0].parameters] for _ in range(3)]
    for number in range(steps + 2):
        for run in random.sample(runs, 2):
            take_step(run, pool[number % 3], number)
    old, new = runs
    low, middle, high = quantiles([b / a for a, b in zip(old.steps, new.steps, strict=True)], n=4)
    return Comparison(
        preset,
        median(old.steps),
        median(new.steps),
        median(new.steps) / median(old.steps),
        (low, middle, high),
        old.operations,
        new.operations,
        max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(old.parameters, new.parameters, strict=True)),
    )


def show(found: list[Comparison]) -> None:
    table = Table("preset", "before ms", "after ms", "ratio", "quartiles", "operations", "difference", box=None)
    for c in found:
        low, _, high = c.quartiles
        operations = f"{c.operations_before} -> {c.operations_after}"
        times = (f"{c.before_ms:.1f}", f"{c.after_ms:.1f}", f"{c.ratio:.3f}", f"{low:.2f}-{high:.2f}")
        table.add_row(c.preset, *times, operations, f"{c.difference:.0e}" if c.difference else "0")
    Console(width=120).print(table)


def main(
    before: Annotated[Path, typer.Argument(help="A checkout of the version to compare with.")],
    presets: Annotated[str, typer.Option(help="Presets, separated by commas; default: all that both versions have.")] = "",
    width: Annotated[int, typer.Option(min=16, help="Hidden width.")] = 512,
    layers: Annotated[int, typer.Option(min=1, help="Hidden layers, seven matrices each.")] = 1,
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each version.")] = 15,
    stacking: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare this version with another one, preset by preset."""
    torch.set_num_threads(1)
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(1)  # the allocator now keeps freed memory, as in a training run
    old, new = Version(before), Version(Path(__file__).parents[1])
    both = [name for name in new.presets if name in old.presets]
    names = [name.strip() for name in presets.split(",")] if presets else both
    found = [compare(name, old, new, width, layers, steps, stacking) for name in names]
    if as_json:
        print(json.dumps([asdict(c) for c in found], indent=1))
    else:
        show(found)


if __name__ == "__main__":
    typer.run(main)
