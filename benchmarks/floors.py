"""A lower bound for the time of a step: its operations and bytes, divided by the rates of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from subspace_opt import SubspaceOptimizer
from subspace_opt.lab.run.device import clock
from subspace_opt.linalg import cpu_has_bfloat16
from subspace_opt.plan.costs import flops
from subspace_opt.rules.orthogonal import Orthogonalize


@dataclass(frozen=True)
class Machine:
    """The rates of this machine, measured with plain PyTorch operations."""

    float32: float  # operations a second, in products of 1024 x 1024
    quick: float  # the same in the dtype of Newton-Schulz
    bandwidth: float  # bytes read and written a second, in an in-place addition to 256 MiB


def measure(device: torch.device) -> Machine:
    """Measure the rates, as medians of a few repetitions."""
    bfloat16 = device.type != "cpu" or cpu_has_bfloat16()
    rates = [
        2 * 1024**3 / _seconds(_product(dtype, device), device) for dtype in (torch.float32, torch.bfloat16 if bfloat16 else torch.float32)
    ]
    large = torch.zeros(64 * 2**20, device=device)
    return Machine(rates[0], rates[1], 2 * large.numel() * 4 / _seconds(lambda: large.add_(1.0), device))


def floor(optimizer: SubspaceOptimizer, machine: Machine) -> float:
    """The bound in milliseconds without a refresh: products at full rate, each byte of weight, gradient and state moved once."""
    quick = total = moved = 0.0
    for row in optimizer.plan.rows:
        moved += row.entry.numel * row.entry.dtype.itemsize * 3 + 2 * row.state_bytes  # weight read and written, gradient read
        for block, frame in row.splits:
            iterated = sum(
                rule.flops(rows, cols) for _, rule, rows, cols in frame.places() if isinstance(rule, Orthogonalize) and rule.method != "svd"
            )
            every = frame.pipeline.selector.every if frame.opens else None
            total += block.count * (flops(frame)[0] + (flops(frame)[1] if every == 1 else 0.0))
            quick += block.count * iterated
    return 1e3 * ((total - quick) / machine.float32 + quick / machine.quick + moved / machine.bandwidth)


def _product(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a = torch.randn(1024, 1024, device=device).to(dtype)
    return lambda: a @ a


def _seconds(work: Callable[[], object], device: torch.device, times: int = 7) -> float:
    work()
    taken = []
    for _ in range(times):
        start = clock(device)
        work()
        taken.append(clock(device) - start)
    return median(taken)
