"""The parameters of a step, and the inspection of their gradients before anything changes: finite? in range? all 0?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..algebra.pipeline import Values
from ..plan import Row
from ..plan.numbers import numbers_of
from .flags.gate import listed
from .flags.watch import NonFiniteGradient, Watch, is_deferred
from .homes import Memory
from .work import Nonfinite, Work

LARGE = 2**16  # entries from which a scalar product is faster than a norm, including its call


def work_of(
    group: Mapping[str, Any],
    p: Tensor,
    row: Row,
    state: dict[str, Any] | None,
    given: Mapping[str, Values],
    memory: Memory,
    failures: Mapping[str, int],
    *,
    capturable: bool = False,
) -> Work:
    """One parameter in this step, with the numbers of its group. `state`: None if it has none yet; `given`: the group's values.

    Raises:
        RuntimeError: The gradient is sparse.
    """
    grad, name = p.grad, row.entry.name
    if grad is not None and grad.is_sparse:
        raise RuntimeError(
            f"'{name}' has a sparse gradient, which cannot be projected to a subspace; build the embedding with sparse=False"
        )
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and not capturable:
        lr = lr.item()
    count = updates_so_far(name, state, memory) if state else 0
    last = number_of(name, state["refreshed"], memory.marks) if capturable and state and "refreshed" in state else None
    numbers = numbers_of(group, row, count, given)
    return Work(
        row=row,
        param=p,
        grad=p if grad is None else grad,
        lr=lr * numbers.lr_scale,
        weight_decay=float(group["weight_decay"]) * numbers.decay_scale,
        state=state or {},
        values=numbers.values,
        refresh=group["refresh"] or name in failures or name in memory.watch.again,
        count=count,
        last_refresh=last,
    )


def updates_so_far(name: str, state: dict[str, Any], memory: Memory) -> int:
    """Updates made so far."""
    return number_of(name, state["step"], memory.counts)


def number_of(name: str, counter: Tensor, known_numbers: dict[str, tuple[Tensor, int, int]]) -> int:
    """The value of a counter in the state. It is read only if the counter is new or was written to."""
    known = known_numbers.get(name)
    if known is None or known[0] is not counter or known[1] != counter._version:
        known = known_numbers[name] = (counter, counter._version, int(counter.item()))
    return known[2]


def survey(work: list[Work], policy: Nonfinite, watch: Watch | None = None) -> tuple[list[Work], list[str]]:
    """Measure every gradient once.

    With policy `propagate` only parameters without an update yet are measured: a later gradient passes unseen. If all gradients are on
    devices for which a host would wait, `watch` guards the update of parameters that have begun, and no host waits for them.

    Returns:
        The parameters to update, and the names of those skipped for non-finite gradients.

    Raises:
        NonFiniteGradient: with policy `raise`; nothing has been changed.
    """
    guarding = watch is not None and policy != "propagate" and bool(work) and all(is_deferred(item.grad.device) for item in work)
    seen = [item for item in work if (policy != "propagate" and not guarding) or item.count == 0]
    bad = judged(zip(seen, _peaks(seen), strict=True))
    if bad and policy == "raise":
        raise nonfinite(bad)
    if policy == "skip":
        work = [item for item in work if item.name not in set(bad)]
    if guarding and watch is not None and work:
        watch.guard(work, policy, {item.row.compute_dtype: largest(item.row.compute_dtype) for item in work})
    return work, bad if policy == "skip" else []


def judged(sizes: Iterable[tuple[Work, float]]) -> list[str]:
    """Scale gradients that are too large, mark parameters whose gradients were all 0 so far, and name non-finite ones."""
    bad = []
    for item, peak in sizes:
        if not math.isfinite(peak):
            bad.append(item.name)
            continue
        limit = largest(item.row.compute_dtype)
        item.scale = limit / peak if peak > limit else 1.0
        if item.count == 0 and peak == 0.0:
            # A parameter begins with its first gradient that is not 0. Until then no basis can be taken from it, and a checkpoint that
            # initialises state by a step with zero gradients changes nothing.
            item.count = -1
    return bad


def nonfinite(names: list[str]) -> NonFiniteGradient:
    """The error for gradients that are not finite."""
    return NonFiniteGradient(
        f"the gradient of {listed(names)} holds NaN or infinity; nothing was changed. Look for its cause, lower lr, clip, or build with "
        "nonfinite='skip' to leave such parameters alone for the step"
    )


def _peaks(work: list[Work]) -> list[float]:
    """The size of each gradient: its Frobenius norm, or its largest magnitude if the norm leaves the range; NaN if it holds NaN.

    One transfer per device, and one more if the largest magnitude was needed.
    """
    norms = transferred([item.grad for item in work], norms=True)
    # A norm in range bounds every entry. A norm of 0 or infinity may only mean that squares left the range of the gradient's dtype.
    unsure = [i for i, item in enumerate(work) if not 0.0 < norms[i] <= largest(item.row.compute_dtype)]
    for i, peak in zip(unsure, transferred([work[i].grad for i in unsure], norms=False), strict=True):
        norms[i] = peak
    return norms


def transferred(grads: list[Tensor], *, norms: bool) -> list[float]:
    """The Frobenius norm of each gradient, or its largest magnitude, by one transfer per device."""
    out = [0.0] * len(grads)
    for device in {grad.device for grad in grads}:
        there = [i for i, grad in enumerate(grads) if grad.device == device]
        if device.type == "meta":  # no numbers: gradients count as ordinary ones
            for i in there:
                out[i] = 1.0
            continue
        # `abs().amax()`: on a CPU `vector_norm(ord=inf)` is 20x slower.
        found = _norms([grads[i] for i in there]) if norms else [grads[i].abs().amax() for i in there]
        dtype = torch.float64 if any(f.dtype == torch.float64 for f in found) else torch.float32
        if len({f.dtype for f in found}) > 1:
            found = [f.to(dtype) for f in found]
        for i, size in zip(there, torch.stack(list(found)).tolist(), strict=True):
            out[i] = size
    return out


def _norms(grads: list[Tensor]) -> list[Tensor]:
    """Frobenius norms. On a CPU large gradients take a scalar product, which runs at the speed of memory."""
    large = [g.numel() >= LARGE and g.device.type == "cpu" and g.dtype == torch.float32 and g.is_contiguous() for g in grads]
    others = [g for g, is_large in zip(grads, large, strict=True) if not is_large]
    found = iter(torch._foreach_norm(others) if others else [])
    return [_by_product(g.view(-1)) if is_large else next(found) for g, is_large in zip(grads, large, strict=True)]


def _by_product(flat: Tensor) -> Tensor:
    return torch.dot(flat, flat).sqrt_()


def largest(dtype: torch.dtype) -> float:
    """The largest entry a gradient may have: sums of squares, and their squares in a covariance, stay finite."""
    return float(torch.finfo(dtype).max ** (1 / 3))
