"""What an optimizer's state costs, counted on the tensors themselves and not on the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def measured_bytes(optimizer: Optimizer) -> int:
    """What the tensors in `optimizer.state` occupy; views of one storage count once."""
    storages = {}
    for tensor in _tensors(dict(optimizer.state)):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def planned_bytes(optimizer: Optimizer) -> int | None:
    """What the plan said before there was a tensor; None for an optimizer without one, such as torch's own."""
    plan = getattr(optimizer, "plan", None)
    return None if plan is None else int(plan.total_bytes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
