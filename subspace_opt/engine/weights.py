"""The last move: decay and update a weight in its own dtype, with a choice of rounding."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from ..algebra import linalg

Rounding = Literal["nearest", "stochastic", "kahan"]

# dtype -> (bits of mantissa, exponent of the smallest positive number)
FORMATS = {torch.bfloat16: (7, -133), torch.float16: (10, -24)}


def update_weight(
    w: Tensor,
    update: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    *,
    factor: float = 1.0,
    decay_after: bool = False,
    rounding: Rounding = "nearest",
    compensation: Tensor | None = None,
    noise: Tensor | None = None,
) -> None:
    """`W <- W (1 - lr wd) - lr factor U`, in place; with `decay_after`, `W <- (W - lr factor U)(1 - lr wd)`.

    A weight of lower precision than the update is computed in the update's dtype and rounded once: to nearest, stochastically (the
    expectation is exact; `noise` uniform in [0, 1)), or with what rounding lost carried to the next update (`compensation`).
    """
    same = w.dtype == update.dtype
    if same and not isinstance(lr, Tensor):
        update_weights([w], [update], lr, weight_decay, factor=factor, decay_after=decay_after)
        return
    y = w if same else w.to(update.dtype)
    if compensation is not None:
        y = y + compensation.to(update.dtype)
    if weight_decay != 0 and not decay_after:
        y = y.mul_(1 - lr * weight_decay)
    y = y.sub_(update * (lr * factor)) if isinstance(lr, Tensor) else y.sub_(update, alpha=lr * factor)
    if weight_decay != 0 and decay_after:
        y = y.mul_(1 - lr * weight_decay)
    if same:
        return
    if rounding == "stochastic" and noise is not None:
        w.copy_(stochastic(y, w.dtype, noise))
        return
    w.copy_(y)
    if compensation is not None:
        compensation.copy_(y - w.to(y.dtype))


def update_weights(
    weights: list[Tensor], updates: list[Tensor], lr: float, weight_decay: float, *, factor: float, decay_after: bool
) -> None:
    """`update_weight` for many weights that have the dtype of their updates.

    Where there is decay, PyTorch's fused SGD on `U + (wd / factor) W` reads a weight once, and two operations twice.
    """
    kept = 1 - lr * weight_decay
    rate = lr * factor * (kept if decay_after else 1.0)
    if weight_decay != 0 and rate != 0 and 1e-20 < abs(factor) < 1e20 and all(map(_has_kernel, weights, updates)):
        decay = lr * weight_decay / rate
        torch._fused_sgd_(
            weights,
            updates,
            [],
            weight_decay=decay,
            momentum=0.0,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        return
    if weight_decay != 0:
        torch._foreach_mul_(weights, kept)
    torch._foreach_add_(weights, updates, alpha=-rate)


def _has_kernel(w: Tensor, update: Tensor) -> bool:
    return w.device.type in linalg.FUSED and w.is_contiguous() and update.is_contiguous()


def stochastic(y: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """`y` rounded to one of its two neighbours in `dtype`, the nearer more often, so that the expectation is y.

    What is in `dtype` already stays: a weight that is not updated does not wander.
    """
    bits, smallest = FORMATS[dtype]
    exponent = torch.frexp(y).exponent - 1  # y = 1.f * 2^exponent
    ulp = torch.ldexp(torch.ones_like(y), (exponent - bits).clamp_min(smallest))
    below = (y / ulp).floor()  # exact: a power of two divides, and what is left has few digits
    return ((below + (noise < y / ulp - below)) * ulp).to(dtype)


def generator(device: torch.device, *words: object) -> torch.Generator:
    """A private generator whose seed is a hash of `words`: the same on every rank and after every resume."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
