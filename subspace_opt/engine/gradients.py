"""One look at all gradients before anything changes: are they finite, can they be squared, is there any?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .work import Nonfinite, Work

LARGE = 2**16  # entries from which a scalar product is quicker than a norm, its call included


class NonFiniteGradient(FloatingPointError):  # noqa: N818  the gradient is what is wrong
    """A gradient holds NaN or infinity; nothing has been changed."""


def survey(work: list[Work], policy: Nonfinite) -> tuple[list[Work], list[str]]:
    """Look at the size of every gradient once.

    Returns what is to be updated, and the names of parameters skipped for non-finite gradients. With policy `propagate` only parameters
    without an update yet are looked at: a later gradient passes unseen, and no host waits for a device.

    Raises:
        NonFiniteGradient: with policy `raise`; nothing has been changed.
    """
    seen = [item for item in work if policy != "propagate" or item.count == 0]
    bad = judged(zip(seen, _peaks(seen), strict=True))
    if bad and policy == "raise":
        raise nonfinite(bad)
    if policy == "skip":
        return [item for item in work if item.name not in set(bad)], bad
    return work, []


def judged(sizes: Iterable[tuple[Work, float]]) -> list[str]:
    """Scale what is too large, mark what has no gradient but 0 yet, and name what is not finite."""
    bad = []
    for item, peak in sizes:
        if not math.isfinite(peak):
            bad.append(item.name)
            continue
        limit = largest(item.row.compute_dtype)
        item.scale = limit / peak if peak > limit else 1.0
        if item.count == 0 and peak == 0.0:
            # A parameter starts with its first gradient that is not zero: until then there is nothing to take a basis from and
            # nothing to average, and a checkpoint that initialises state by a step with zero gradients changes nothing.
            item.count = -1
    return bad


def nonfinite(names: list[str]) -> NonFiniteGradient:
    """The error for gradients that are not finite."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return NonFiniteGradient(
        f"the gradient of {shown} holds NaN or infinity; nothing was changed. Look for its cause, lower lr, clip, or build with "
        "nonfinite='skip' to leave such parameters alone for the step"
    )


def _peaks(work: list[Work]) -> list[float]:
    """The size of each gradient: its Frobenius norm, or its entry of largest magnitude where the norm says too little. NaN where there is
    one. One transfer a device, and one more where the largest entry had to be found.
    """
    norms = transferred([item.grad for item in work], norms=True)
    # A norm in range bounds every entry. One of 0 or infinity may be that of squares that left the range, in the gradient's own dtype.
    unsure = [i for i, item in enumerate(work) if not 0.0 < norms[i] <= largest(item.row.compute_dtype)]
    for i, peak in zip(unsure, transferred([work[i].grad for i in unsure], norms=False), strict=True):
        norms[i] = peak
    return norms


def transferred(grads: list[Tensor], *, norms: bool) -> list[float]:
    """The Frobenius norm of each gradient, or its entry of largest magnitude, by one transfer a device."""
    out = [0.0] * len(grads)
    for device in {grad.device for grad in grads}:
        there = [i for i, grad in enumerate(grads) if grad.device == device]
        # Not the infinity norm: on a CPU it takes twenty times as long as the entry of largest magnitude.
        found = _norms([grads[i] for i in there]) if norms else [grads[i].abs().amax() for i in there]
        dtype = torch.float64 if any(f.dtype == torch.float64 for f in found) else torch.float32
        if len({f.dtype for f in found}) > 1:
            found = [f.to(dtype) for f in found]
        for i, size in zip(there, torch.stack(list(found)).tolist(), strict=True):
            out[i] = size
    return out


def _norms(grads: list[Tensor]) -> list[Tensor]:
    """Frobenius norms. On a CPU those of large gradients by a scalar product, which runs at the speed of memory."""
    large = [g.numel() >= LARGE and g.device.type == "cpu" and g.dtype == torch.float32 and g.is_contiguous() for g in grads]
    others = [g for g, is_large in zip(grads, large, strict=True) if not is_large]
    found = iter(torch._foreach_norm(others) if others else [])
    return [_by_product(g.view(-1)) if is_large else next(found) for g, is_large in zip(grads, large, strict=True)]


def _by_product(flat: Tensor) -> Tensor:
    return torch.dot(flat, flat).sqrt_()


def largest(dtype: torch.dtype) -> float:
    """The largest entry a gradient may have: sums of squares, and their squares in a covariance, stay finite."""
    return float(torch.finfo(dtype).max ** (1 / 3))
