"""Measure the time of `step()` and the bytes of state: the presets and optimizers of other packages, in one run.

All optimizers hold the same weights and get the same gradients. They take turns: one step each in a round, in a new order every round, so
that other load on the machine affects all of them. A ratio is computed within a round; the table shows its median and quartiles.

If a selector refreshes its basis every k steps, both kinds of step are timed. `step` is a step without a refresh, `refresh` a step that
refreshes all bases, and `mean` the average cost, (refresh + (k - 1) step) / k. If k is so small that the timed steps contain their share of
refreshes, `mean` is their mean. Presets spread refreshes over the steps. `x floor` compares a step with a lower bound: its operations and
bytes at the rates of this machine.

Example: python benchmarks/step_time.py --layers 2 --presets cosmos,muon,soap
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Annotated, Any, Literal

import torch
import typer
from floors import floor, measure
from peers import ADAMW, GALORE, LR, MUON, MUON32, SOAPS, peers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from subspace_opt import SubspaceOptimizer, build
from subspace_opt.lab.report import readable_bytes
from subspace_opt.lab.run.device import choose_device, clock
from subspace_opt.lab.run.measure import measured_bytes
from subspace_opt.linalg import cpu_has_bfloat16
from subspace_opt.spec import preset_names

EVERY = dict.fromkeys(SOAPS, 10) | {GALORE: 200}  # steps between two refreshes of the peers
POOL = 4  # sets of gradients, computed before the rounds


@dataclass
class Timed:
    """One optimizer and its times."""

    name: str
    optimizer: Optimizer
    floor: float | None = None
    first: float = math.nan
    steps: list[float] = field(default_factory=list)
    refreshes: list[float] = field(default_factory=list)

    def step(self, device: torch.device) -> float:
        """Milliseconds of one step."""
        start = now(device)
        self.optimizer.step()
        return 1e3 * (now(device) - start)


@dataclass(frozen=True)
class Row:
    """The result of one optimizer. Times in milliseconds; triples are (lower quartile, median, upper quartile)."""

    name: str
    state_bytes: int
    step: tuple[float, float, float]
    to_adamw: tuple[float, float, float]  # ratio within a round
    to_muon: tuple[float, float, float]
    every: int | None  # steps between refreshes; None without refreshes, or with one at every step
    refresh: float | None
    mean: float
    first: float
    worst: float  # the slowest step after the first, divided by the median
    floor: float | None  # None for peers


def now(device: torch.device) -> float:
    """Seconds. With one thread on a CPU this is the CPU time of the thread, so that other processes are not counted."""
    return time.thread_time() if device.type == "cpu" and torch.get_num_threads() == 1 else clock(device)


def device_name(device: torch.device) -> str:
    """The name of the device, for records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def hidden_matrices(width: int, layers: int, device: torch.device) -> nn.Module:
    """The matrices of a LLaMA's hidden layers: four of attention and three of the MLP in each."""
    inner = math.ceil(8 * width / 3 / 16) * 16  # 1376 for 512, as in the papers
    sides = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
    sides |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    return nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(cols, rows, bias=False, device=device) for name, (rows, cols) in sides.items()})
        for _ in range(layers)
    )


def model_of(width: int, layers: int, vocabulary: int, device: torch.device) -> nn.Module:
    """The hidden matrices, with an embedding and a head if `vocabulary` is not 0."""
    model = hidden_matrices(width, layers, device)
    if vocabulary:
        head = nn.Linear(width, vocabulary, bias=False, device=device)
        model = nn.ModuleDict({"embedding": nn.Embedding(vocabulary, width, device=device), "hidden": model, "lm_head": head})
    return model


def settle_allocator() -> None:
    """Allocate and free 31 MiB, as the activations of a training step do. After that, the allocator of glibc keeps freed memory.

    Before, it returns every temporary of a few MiB to the system, and zeroing the new pages takes longer than the arithmetic.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(1)


def make_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as noise plus a few strong directions, which resembles real gradients for a selector."""
    made = []
    for p in parameters:
        rows, cols = p.shape
        strong = torch.randn(rows, 8, device=p.device) @ torch.randn(8, cols, device=p.device)
        made.append((1e-3 * (strong + torch.randn(rows, cols, device=p.device))).to(p.dtype))
    return made


def build_contestants(model: nn.Module, presets: Sequence[str], wanted: Sequence[str], note: Callable[[str], None]) -> list[Timed]:
    """The peers and the presets, all on the same parameters.

    A preset's name may end in `@` and a rank, and in `!`, which turns off the check for NaN. The peers have no such check.
    """
    machine = measure(next(model.parameters()).device)
    note(
        f"measured rates: {machine.float32 / 1e9:.0f} GFLOP/s in float32 products, {machine.quick / 1e9:.0f} in those of Newton-Schulz, "
        f"{machine.bandwidth / 1e9:.0f} GB/s"
    )
    timed = [Timed(name, optimizer) for name, optimizer in peers(list(model.parameters()), wanted, note)]
    for name in presets:
        blind = name.endswith("!")
        preset, _, rank = name.rstrip("!").partition("@")
        overrides = {"matrix.selector.rank": int(rank)} if rank else None
        optimizer = build(preset, model, lr=LR, overrides=overrides, nonfinite="propagate" if blind else "raise")
        timed.append(Timed(name, optimizer, floor(optimizer, machine)))
    return timed


def period(optimizer: Optimizer) -> int | None:
    """The number of steps between two refreshes of the basis, or None if there is none or one at every step."""
    if not isinstance(optimizer, SubspaceOptimizer):
        return None
    frame = optimizer.plan.rows[0].splits[0][1]
    every = frame.pipeline.selector.every if frame.opens else None
    return every if every is not None and every > 1 else None


def race(timed: Sequence[Timed], model: nn.Module, steps: int, refreshes: int, device: torch.device) -> None:
    """Time all optimizers."""
    parameters = list(model.parameters())
    pool = [make_gradients(parameters) for _ in range(POOL)]
    order = random.Random(0)

    def turns(number: int) -> Iterator[Timed]:
        for one in order.sample(list(timed), len(timed)):
            for p, gradient in zip(parameters, pool[number % POOL], strict=True):
                p.grad = gradient.clone()  # a new copy for each, because some peers overwrite or drop it
            yield one

    for one in turns(0):
        one.first = one.step(device)
    for one in turns(1):
        one.step(device)  # a second warm-up, for optimizers that start with their second gradient
    for number in track(range(steps), description="steps", console=Console(stderr=True), transient=True):
        for one in turns(number):
            one.steps.append(one.step(device))
    for number in range(refreshes):
        for one in turns(number):
            if force_refresh(one, number + 1):
                one.refreshes.append(one.step(device))


def force_refresh(one: Timed, times: int) -> bool:
    """Let the next step refresh all bases; return False if the optimizer has none with a period. `times`: the number of this call."""
    if isinstance(one.optimizer, SubspaceOptimizer):
        one.optimizer.refresh_bases()
        return period(one.optimizer) is not None
    if one.name == GALORE:  # refreshes if its count is a multiple of the period
        for state in one.optimizer.state.values():
            state["step"] = 200 * times
        return True
    return False


def report(timed: Sequence[Timed]) -> list[Row]:
    """The results, fastest first."""
    steps = {one.name: one.steps for one in timed}
    muon = MUON if MUON in steps else MUON32
    rows = []
    for one in timed:
        every, step = period(one.optimizer) or EVERY.get(one.name), quartiles(one.steps)
        refresh = median(one.refreshes) if one.refreshes else None
        mean = step[1] if refresh is None or every is None else (refresh + (every - 1) * step[1]) / every
        if every is not None and every <= len(one.steps) // 2:  # the timed steps contain their share of refreshes
            mean = sum(one.steps) / len(one.steps)
        worst = max(one.steps) / step[1]
        to_adamw, to_muon = (quartiles([x / y for x, y in zip(one.steps, steps[name], strict=True)]) for name in (ADAMW, muon))
        rows.append(
            Row(one.name, measured_bytes(one.optimizer), step, to_adamw, to_muon, every, refresh, mean, one.first, worst, one.floor)
        )
    return sorted(rows, key=lambda row: row.mean)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def show(rows: Sequence[Row], context: dict[str, Any], notes: Sequence[str]) -> None:
    """Print the table, after the settings and the notes."""
    out = Console(highlight=False, width=None if Console().is_terminal else 140)
    out.print(", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in context.items()))
    for line in notes:
        out.print(line, soft_wrap=True)
    out.print()
    ratios = ("x AdamW", "quartiles", "x Muon", "quartiles")
    numbers = ("state", "x AdamW", "step ms", "x floor", *ratios, "refresh ms", "every", "mean ms", "first", "worst")
    table = Table("optimizer", *numbers, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    adamw = next(row.state_bytes for row in rows if row.name == ADAMW)
    for row in rows:
        refresh = ("-", "-") if row.refresh is None else (f"{row.refresh:.1f}", str(row.every))
        above = "-" if row.floor is None else f"{row.step[1] / row.floor:.2f}"
        times = (f"{row.step[1]:.1f}", above, *_words(row.to_adamw), *_words(row.to_muon), *refresh, f"{row.mean:.1f}")
        state = (readable_bytes(row.state_bytes), f"{row.state_bytes / adamw:.3f}")
        table.add_row(row.name, *state, *times, f"{row.first / row.step[1]:.1f}", f"{row.worst:.1f}")
    out.print(table)


def _words(ratio: tuple[float, float, float]) -> tuple[str, str]:
    digits = 1 if ratio[1] >= 10 else 2
    return f"{ratio[1]:.{digits}f}", f"{ratio[0]:.{digits}f}-{ratio[2]:.{digits}f}"


def main(
    width: Annotated[int, typer.Option(min=16, help="Hidden width; 512 is LLaMA-60M.")] = 512,
    layers: Annotated[int, typer.Option(min=1, help="Hidden layers, seven matrices each; LLaMA-60M has 8.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on a CPU.")] = 1,
    vocabulary: Annotated[int, typer.Option(min=0, help="Rows of an embedding and a head; 0: only hidden matrices.")] = 0,
    steps: Annotated[int, typer.Option(min=2, help="Timed rounds, after two rounds of warm-up.")] = 20,
    refreshes: Annotated[int, typer.Option(min=0, help="Rounds with a refresh of the basis.")] = 3,
    presets: Annotated[
        str, typer.Option(help="Presets, separated by commas; default: all. NAME@RANK sets the rank, NAME! skips the check for NaN.")
    ] = "",
    peer: Annotated[list[str] | None, typer.Option(help="A peer to run, besides AdamW and Muon; default: all peers.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of weights and gradients.")] = "float32",
    precision: Annotated[
        Literal["highest", "high", "medium"], typer.Option(help="Precision of float32 products, for all optimizers.")
    ] = "highest",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Time `step()` of the presets and of other optimizers on the hidden matrices of a LLaMA."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.manual_seed(0)
    where = choose_device(device)
    settle_allocator()
    model = model_of(width, layers, vocabulary, where).to(getattr(torch, dtype))
    stand_in = [] if where.type != "cpu" or cpu_has_bfloat16() else [MUON32]
    wanted = [ADAMW, MUON, *stand_in, *peer] if peer else []
    notes: list[str] = []
    timed = build_contestants(model, [name.strip() for name in presets.split(",")] if presets else preset_names(), wanted, notes.append)
    race(timed, model, steps, refreshes, where)
    context: dict[str, Any] = {"width": width, "layers": layers, "vocabulary": vocabulary, "threads": threads, "steps": steps}
    context |= {"dtype": dtype, "precision": precision, "device": device_name(where), "torch": torch.__version__}
    context["parameters"] = sum(p.numel() for p in model.parameters())
    rows = report(timed)
    if as_json:
        typer.echo(json.dumps({**context, "notes": notes, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows, context, notes)


if __name__ == "__main__":
    typer.run(main)
