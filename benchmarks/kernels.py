"""Compare implementations of the parts of a step: time and accuracy on this device.

Symmetric products by PyTorch and by the Triton kernel; Newton-Schulz on a stack with and without the kernel, on its matrices one by one,
and in torch's Muon; orthonormal columns from Householder reflections and from
Cholesky factors; a leading subspace from a sketch and from an exact decomposition. Implementations take turns. A ratio compares with the
first one.

Example: python benchmarks/kernels.py --width 512 --stack 4
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from step_time import device_name, hidden_matrices, now, quartiles, settle_allocator
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from subspace_opt import linalg
from subspace_opt.lab.run.device import choose_device
from subspace_opt.linalg import kernels, polar

KELLER = polar.schedule("keller", 5)
Way = tuple[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Row:
    """The result of one implementation. `ratio`: lower quartile, median, upper quartile. `off`: the error, see `off`."""

    shape: str
    what: str
    way: str
    ms: float
    ratio: tuple[float, float, float]
    off: float


def without_triton() -> str | None:
    """The reason why the Triton kernel cannot run on a device; None if it can."""
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    return None if kernels.has_triton() else "Triton is not installed: pip install 'subspace-opt[triton]'"


def plainly(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same without the Triton kernel."""

    def plain() -> Tensor:
        with kernels.triton_from(None):
            return work()

    return plain


def by_triton(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same with the Triton kernel for symmetric products of any size."""

    def ours() -> Tensor:
        with kernels.triton_from(1):
            return work()

    return ours


def symmetric(x: Tensor) -> list[Way]:
    """`X X'` of `(B, m, n)` in bfloat16, on the short side."""
    y = (x if x.size(-2) <= x.size(-1) else x.mT).to(torch.bfloat16)
    ways: list[Way] = [("PyTorch", lambda: torch.bmm(y, y.mT)), ("subspace_opt", plainly(lambda: linalg.symmetric(y, y.mT)))]
    return ways if without_triton() else [*ways, ("Triton", by_triton(lambda: linalg.symmetric(y, y.mT)))]


def newton_schulz(x: Tensor) -> list[Way]:
    """Five Newton-Schulz steps in bfloat16 on `(B, m, n)`."""
    triton: list[Way] = [("stack, Triton", by_triton(lambda: polar.newton_schulz(x, KELLER, dtype=torch.bfloat16)))]
    return [
        ("stack", plainly(lambda: polar.newton_schulz(x, KELLER, dtype=torch.bfloat16))),
        *([] if without_triton() else triton),
        ("one by one", lambda: torch.cat([polar.newton_schulz(one, KELLER, dtype=torch.bfloat16) for one in x.split(1)])),
        ("torch Muon's", lambda: torch.stack([_zeropower_via_newtonschulz(one, KELLER[0], 5, 1e-7) for one in x])),
    ]


def orthonormal(x: Tensor, rank: int) -> list[Way]:
    """Orthonormal columns for the first `rank` columns of `(B, m, n)`."""
    y = x[..., :rank].contiguous()
    return [("Householder", lambda: torch.linalg.qr(y)[0]), ("Cholesky", lambda: linalg.cholesky_qr(y))]


def leading(x: Tensor, rank: int) -> list[Way]:
    """Leading right singular vectors of `(B, m, n)`."""
    start = torch.randn(x.size(0), x.size(-1), rank + 8, device=x.device)
    return [("sketch", lambda: linalg.sketched_right(x, rank, start)[0]), ("exact", lambda: linalg.leading_right(x, rank))]


def off(what: str, x: Tensor, out: Tensor) -> float:
    """The error of the first matrix.

    That is the distance to the product or to the polar factor, the deviation from orthonormality, or the fraction of energy lost against
    the best columns.
    """
    x, out = x[0].double(), out[0].double()
    if what == "orthonormal columns":
        return float((out.mT @ out - torch.eye(out.size(-1), device=x.device)).abs().max())
    if what == "symmetric product":
        exact = x.mT @ x if x.size(-1) < x.size(-2) else x @ x.mT
        return float((out - exact).norm() / exact.norm())
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    if what == "Newton-Schulz":
        return float((out - u @ vh).norm() / math.sqrt(min(x.shape)))
    return float(1 - (x @ out).square().sum() / values[: out.size(-1)].square().sum())


def race(ways: list[Way], rounds: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of each implementation; they take turns."""
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for times, (_, work) in zip(taken, ways, strict=True):
            start = now(device)
            work()
            if number:  # round 0 is a warm-up
                times.append(1e3 * (now(device) - start))
    return taken


def main(
    width: Annotated[int, typer.Option(min=16, help="Hidden width of the LLaMA whose shapes are used.")] = 512,
    stack: Annotated[int, typer.Option(min=1, help="Matrices of one shape in a stack.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Columns of a basis.")] = 64,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 9,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compare implementations of the parts of a step."""
    if rank > width:
        raise typer.BadParameter(
            f"{rank} is more than --width {width}; a matrix of that width has at most {width} orthonormal columns", param_hint="--rank"
        )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settle_allocator()
    where = choose_device(device)
    shapes = sorted({tuple(p.shape) for p in hidden_matrices(width, 1, torch.device("meta")).parameters()})
    found: list[Row] = []
    for rows, cols in shapes:
        noise = torch.randn(stack, rows, cols, device=where)
        x = noise + torch.randn(stack, rows, 8, device=where) @ torch.randn(stack, 8, cols, device=where)
        for what, ways in {
            "symmetric product": symmetric(x),
            "Newton-Schulz": newton_schulz(x),
            "orthonormal columns": orthonormal(x, rank),
            "leading subspace": leading(x, rank),
        }.items():
            times = race(ways, rounds, where)
            for (name, work), own in zip(ways, times, strict=True):
                ratio = quartiles([a / b for a, b in zip(own, times[0], strict=True)])
                found.append(Row(f"{stack} x {rows} x {cols}", what, name, median(own), ratio, off(what, x, work())))
    if as_json:
        context = {"device": device_name(where), "torch": torch.__version__, "rank": rank}
        typer.echo(json.dumps({**context, "rows": [asdict(row) for row in found]}, indent=2))
    else:
        reason = without_triton()
        note = f"\nthe Triton kernel was left out: {reason}" if reason else ""
        show(found, f"device {device_name(where)}, torch {torch.__version__}, rank {rank}{note}")


def show(found: list[Row], title: str) -> None:
    """Print the table."""
    table = Table("shape", "what", "way", "ms", "ratio", "quartiles", "off", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for row in found:
        low, middle, high = row.ratio
        table.add_row(row.shape, row.what, row.way, f"{row.ms:.2f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{row.off:.1e}")
    out = Console(highlight=False, width=None if Console().is_terminal else 120)
    out.print(f"{title}\n")
    out.print(table)


if __name__ == "__main__":
    typer.run(main)
