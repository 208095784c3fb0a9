"""Measure the memory of an optimizer on its tensors, independently of the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def measured_bytes(optimizer: Optimizer) -> int:
    """The bytes of all storages behind the tensors in `optimizer.state`; views of one storage count once."""
    storages = {}
    for tensor in _tensors(dict(optimizer.state)):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def planned_bytes(optimizer: Optimizer) -> int | None:
    """The bytes of state in the optimizer's plan; None if it has no plan, as the optimizers of torch."""
    plan = getattr(optimizer, "plan", None)
    return None if plan is None else int(plan.total_bytes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(value):  # a tensor made of others, such as codes and their scales
        yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def peak_temporaries(step: Callable[[], object], device: torch.device) -> int:
    """Call `step` once. Returns the peak of the memory allocated during the call, in bytes, less the memory allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    assert run.profiler is not None
    assert run.profiler.kineto_results is not None
    held = most = 0
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
