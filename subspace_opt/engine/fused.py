"""PyTorch's fused optimizer kernels, for parameters whose whole update is one rule that has a kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from . import strategies
from .flags.gate import blocked
from .work import Options, Work

SCALED = 2**28  # bytes of gradients that are copied at a time, to be scaled by numbers that only the device knows


def update_by_kernels(work: list[Work], options: Options) -> list[Work]:
    """Update in place the parameters that a kernel can update; return the others."""
    left: list[Work] = []
    batches: dict[Any, list[Work]] = defaultdict(list)
    for item in work:
        if fits_kernel(item):
            rate = id(item.lr) if isinstance(item.lr, Tensor) else item.lr
            pipeline = id(item.row.splits[0][1].pipeline), item.values
            gate = None if item.gate is None else id(item.gate)
            batches[(pipeline, item.count, rate, item.weight_decay, item.param.device, item.param.dtype, gate)].append(item)
        else:
            left.append(item)
    for items in batches.values():
        _run(items, items[0].state["step"] + 1 if options.capturable else None)
    return left


def fits_kernel(item: Work) -> bool:
    """True if one rule makes the whole update and has a kernel, and the storage is contiguous and in the dtype of computation."""
    row = item.row
    if item.count < 0 or (item.gate is None and item.scale != 1.0) or item.outbox is not None or row.converts:
        return False
    if len(row.splits) != 1 or strategies.fused(item.splits[0][1]) is None:
        return False
    if item.gate is not None and not strategies.can_be_blocked(item.splits[0][1]):
        return False
    p, g = item.param, item.grad
    alike = p.dtype == g.dtype == row.compute_dtype and p.device == g.device and p.device.type in linalg.FUSED
    return alike and p.is_contiguous() and g.is_contiguous() and not row.view.transposed


def _run(items: list[Work], t: Tensor | None) -> None:
    first, frame = items[0], items[0].splits[0][1]
    found = strategies.fused(frame)
    assert found is not None
    key, rule, kernel = found
    states = {name: [_shaped(item.state[f"{key}.{name}"], item.param) for item in items] for name in rule.slots(frame.rows, frame.cols)}
    numbers = first.count + 1 if t is None else t, first.lr, first.weight_decay
    if first.gate is None:
        kernel([item.param for item in items], [item.grad for item in items], states, *numbers)
        return
    stop = blocked(first.gate)
    for start, beyond in _runs(items):
        some = items[start:beyond]
        grads = torch._foreach_mul([item.grad for item in some], [torch.as_tensor(item.scale) for item in some])
        own = {name: values[start:beyond] for name, values in states.items()}
        kernel([item.param for item in some], list(grads), own, *numbers, blocked=stop)


def _runs(items: list[Work]) -> Iterator[tuple[int, int]]:
    """Neighbours whose gradients have about `SCALED` bytes, as (start, stop)."""
    start, size = 0, 0
    for i, item in enumerate(items):
        own = item.grad.numel() * item.grad.itemsize
        if i > start and size + own > SCALED:
            yield start, i
            start, size = i, 0
        size += own
    yield start, len(items)


def _shaped(value: Tensor, param: Tensor) -> Tensor:
    return value if value.shape == param.shape else value.view(param.shape)
