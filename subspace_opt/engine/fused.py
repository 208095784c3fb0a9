"""PyTorch's fused optimizer kernels, for parameters whose whole update is one rule that has a kernel."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from .. import linalg
from . import strategies
from .work import Work


def update_by_kernels(work: list[Work]) -> list[Work]:
    """Update in place the parameters that a kernel can update; return the others."""
    left: list[Work] = []
    batches: dict[Any, list[Work]] = defaultdict(list)
    for item in work:
        if fits_kernel(item):
            rate = id(item.lr) if isinstance(item.lr, Tensor) else item.lr
            pipeline = id(item.row.splits[0][1].pipeline), item.values
            batches[(pipeline, item.count, rate, item.weight_decay, item.param.device, item.param.dtype)].append(item)
        else:
            left.append(item)
    for items in batches.values():
        _run(items)
    return left


def fits_kernel(item: Work) -> bool:
    """True if one rule makes the whole update and has a kernel, and the storage is contiguous and in the dtype of computation."""
    row = item.row
    if item.count < 0 or item.scale != 1.0 or item.outbox is not None or row.converts:
        return False
    if len(row.splits) != 1 or strategies.fused(item.splits[0][1]) is None:
        return False
    p, g = item.param, item.grad
    alike = p.dtype == g.dtype == row.compute_dtype and p.device == g.device and p.device.type in linalg.FUSED
    return alike and p.is_contiguous() and g.is_contiguous() and not row.view.transposed


def _run(items: list[Work]) -> None:
    first, frame = items[0], items[0].splits[0][1]
    found = strategies.fused(frame)
    assert found is not None
    key, rule, kernel = found
    states = {name: [_shaped(item.state[f"{key}.{name}"], item.param) for item in items] for name in rule.slots(frame.rows, frame.cols)}
    kernel([item.param for item in items], [item.grad for item in items], states, first.count + 1, first.lr, first.weight_decay)


def _shaped(value: Tensor, param: Tensor) -> Tensor:
    return value if value.shape == param.shape else value.view(param.shape)
