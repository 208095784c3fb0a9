"""Decay and update of weights: an expression is subtracted from the weight in the weight's own dtype, with a choice of rounding.

    W <- W (1 - lr wd) - lr U        or, with decay after the update:        W <- (W - lr U)(1 - lr wd)
    W <- W - D                       for the displacement D of a pipeline with rules in `apply`

Three ways compute the same: many weights in one operation, lifts multiplied straight into one weight, and the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import linalg
from ..algebra.linear import Lift, Linear
from ..algebra.pipeline import Pipeline
from ..algebra.projection import one_sided, picks
from .flags.gate import blocked, each, gated, silenced
from .rounding import Rounding, rounding_draw, stochastic
from .strategies import decomposes
from .work import Options, Piece, Stack


class Rates(NamedTuple):
    """The numbers for updating a weight: learning rate, decay, and a factor for the update."""

    lr: float | Tensor
    decay: float
    decay_after: bool = False
    factor: float = 1.0

    @classmethod
    def of(cls, pipeline: Pipeline, lr: float | Tensor, weight_decay: float, factor: float = 1.0) -> Rates:
        """The rates for the updates of a pipeline. A displacement contains lr and decay, and a coupled decay is part of the gradient."""
        if pipeline.apply:
            return cls(1.0, 0.0, factor=factor)
        return cls(lr, 0.0 if pipeline.decay == "coupled" else weight_decay, pipeline.decay == "after", factor)


def update_stack(stack: Stack, update: Linear | None, options: Options) -> None:
    """Decay and update the weights of a stack; without an update, decay alone."""
    if update is None:
        for piece, gate in zip(stack.pieces, _gates(stack), strict=True):
            _update_piece(piece, None, 1.0, options, gate)
        return
    if stack.gate is not None and update.number is not None:  # a number that a CPU reads must not be NaN
        update = Linear(update.sum, update.factor, silenced(stack.gate, update.number))
    if _takes_lifts(stack, update):
        _subtract_lifts(stack, update)
        return
    entries, factor = _settled(update)
    if _update_together(stack, entries, factor, options):
        return
    parts = [entries] if len(stack.pieces) == 1 else entries.split(stack.sizes)
    for piece, part, gate in zip(stack.pieces, parts, _gates(stack), strict=True):
        _update_piece(piece, part, factor, options, gate)


def _gates(stack: Stack) -> Sequence[Tensor | None]:
    """The gate of every piece: 0-d, or one for each of its matrices."""
    if stack.gate is None or stack.gate.dim() == 0:
        return [stack.gate] * len(stack.pieces)
    return list(stack.gate.split(stack.sizes))


def _settled(update: Linear) -> tuple[Tensor, float]:
    """Entries of the update, and a factor that is left to the update of the weight."""
    entries, factor, number = update.sum.value(), update.factor, update.number
    if number is None:
        return entries, factor
    if _is_readable(number):
        return entries, factor * number.item()
    return entries * number, factor


def _is_readable(number: Tensor) -> bool:
    """True if reading the number makes no host wait for a device."""
    return number.numel() == 1 and number.device.type == "cpu" and type(number) is Tensor


def _update_piece(piece: Piece, part: Tensor | None, factor: float, options: Options, gate: Tensor | None = None) -> None:
    work = piece.work
    if work.outbox is not None:  # the weights are on other ranks
        if part is not None:
            piece.of(work.outgoing).copy_(part * factor)
        return
    w = piece.of(work.weights)
    if part is None:
        part = torch.zeros(w.shape, dtype=work.row.compute_dtype, device=w.device)
    noise = None
    if w.dtype != part.dtype and options.rounding == "stochastic":
        noise = torch.empty_like(part)
        for i, one in enumerate(noise, piece.start):
            one.copy_(rounding_draw(work.key, piece.block, i, work.count, options.seed, one))
    compensation = piece.of(work.compensations) if work.compensations else None
    rates = _rates(piece, factor)
    update_weight(w, part, rates, rounding=options.rounding, compensation=compensation, noise=noise, gate=gate)


def _rates(piece: Piece, factor: float = 1.0) -> Rates:
    return Rates.of(piece.frame.pipeline, piece.work.lr, piece.work.weight_decay, factor)


# ----------------------------------------------------------------------------------------------------------- the plain way


def update_weight(
    w: Tensor,
    update: Tensor,
    rates: Rates,
    *,
    rounding: Rounding = "nearest",
    compensation: Tensor | None = None,
    noise: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Decay and update one weight `(..., rows, cols)`, or matrices `(B, rows, cols)`, in place.

    A weight of lower precision than the update is computed in the update's dtype and rounded once: to nearest, stochastically (`noise`:
    uniform draws in [0, 1)), or with the rounding error carried to the next update (`compensation`). Where `gate` is closed, weight and
    compensation stay.
    """
    same = w.dtype == update.dtype
    lr, decay, after, factor = rates
    if same and not isinstance(lr, Tensor):
        if gate is None or gate.dim() == 0:
            update_weights([w], [update], rates, gate)
        else:
            update_weights(list(w.unbind(0)), list(update.unbind(0)), rates, gate)
        return
    y = (w if gate is None else w.clone()) if same else w.to(update.dtype)
    if compensation is not None:
        y = y + compensation.to(update.dtype)
    if decay != 0 and not after:
        y = y.mul_(1 - lr * decay)
    y = y.sub_(update * (lr * factor)) if isinstance(lr, Tensor) else y.sub_(update, alpha=lr * factor)
    if decay != 0 and after:
        y = y.mul_(1 - lr * decay)
    if same and gate is None:
        return
    new = stochastic(y, w.dtype, noise) if not same and rounding == "stochastic" and noise is not None else y
    if gate is None:
        w.copy_(new)
        if compensation is not None:
            compensation.copy_(y - w.to(y.dtype))
        return
    if compensation is not None:
        compensation.copy_(gated(gate, y - y.to(w.dtype).to(y.dtype), compensation))
    w.copy_(gated(gate, new, w))


def update_weights(weights: list[Tensor], updates: list[Tensor], rates: Rates, gate: Tensor | None = None) -> None:
    """Decay and update weights of the updates' dtype in place.

    With decay, PyTorch's fused SGD on `U + (wd / factor) W` reads a weight once; decay and update apart read it twice.
    """
    lr, decay, after, factor = rates
    assert not isinstance(lr, Tensor)
    if gate is not None and gate.dim():
        for w, update, own in zip(weights, updates, each(gate, len(weights)), strict=True):
            update_weights([w], [update], rates, own)
        return
    kept = 1 - lr * decay
    rate = lr * factor * (kept if after else 1.0)
    if decay != 0 and rate != 0 and 1e-20 < abs(factor) < 1e20 and all(map(has_kernel, weights, updates)):
        torch._fused_sgd_(
            weights,
            updates,
            [],
            weight_decay=lr * decay / rate,
            momentum=0.0,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=None if gate is None else blocked(gate),
        )
        return
    if gate is not None and decay == 0:
        updates = [silenced(gate, update) for update in updates]
    elif gate is not None:
        made = [w.clone() for w in weights]
        update_weights(made, updates, rates)
        torch._foreach_copy_(weights, [gated(gate, new, w) for new, w in zip(made, weights, strict=True)])
        return
    if decay != 0:
        torch._foreach_mul_(weights, kept)
    torch._foreach_add_(weights, updates, alpha=-rate)


def has_kernel(w: Tensor, update: Tensor) -> bool:
    """True if PyTorch's fused SGD can update the weight."""
    return w.device.type in linalg.FUSED and w.is_contiguous() and update.is_contiguous()


# -------------------------------------------------------------------------------------------------- many weights in one operation


def _update_together(stack: Stack, update: Tensor, factor: float, options: Options) -> bool:
    """Update all weights of a stack in one operation if they are whole parameters with one dtype, lr and decay; else return False."""
    pieces = stack.pieces
    if len(pieces) < 2:
        return False
    first, rates = pieces[0].work, _rates(pieces[0], factor)
    if isinstance(rates.lr, Tensor) or any(p.work.outbox is not None for p in pieces):
        return False
    if not all(p.work.is_matrix and _rates(p, factor) == rates and p.work.param.dtype == first.param.dtype for p in pieces):
        return False
    low = first.param.dtype != update.dtype
    if low and options.rounding != "nearest":
        return False
    weights = [p.work.param for p in pieces]
    if low:
        before = torch.stack(weights)
        together = before.to(update.dtype)
        update_weight(together, update, rates)
        torch._foreach_copy_(weights, (together if stack.gate is None else gated(stack.gate, together, before)).unbind(0))
    else:
        update_weights(weights, list(update.unbind(0)), rates, stack.gate)
    return True


# ------------------------------------------------------------------------------------------------------ lifts into one weight


def _takes_lifts(stack: Stack, update: Linear) -> bool:
    """True if the lifts of an update can be multiplied into the weight, and computing the update over its dense matrix is not cheaper."""
    piece, s = stack.pieces[0], update.sum
    work = piece.work
    alone = len(stack.pieces) == 1 and piece.size == 1 and work.outbox is None
    if not alone or work.param.dtype != stack.dtype or isinstance(work.lr, Tensor) or not s.lifts:
        return False
    numbers = update.number is None or _is_readable(update.number)
    return numbers and (s.dense is None or not s.writable) and all(one_sided(part.basis) for part in s.lifts)


def _subtract_lifts(stack: Stack, update: Linear) -> None:
    """`W <- (1 - lr wd) W - lr (D + L(C, U) + ...)`, one pass over W for each term."""
    piece, gate, s = stack.pieces[0], stack.gate, update.sum
    factor = update.factor * (1.0 if update.number is None else update.number.item())
    lr, decay, after, _ = rates = _rates(piece)
    assert not isinstance(lr, Tensor)
    own = piece.of(piece.work.weights)
    kept = 1 - lr * decay
    alpha = -lr * factor * (kept if after else 1.0)
    lifts = s.lifts
    # Coordinates of 0 add nothing, unless the basis itself holds NaN. Then, and for the decay, a copy of the weight is updated.
    apart = gate is not None and (kept != 1.0 or stack.refresh or decomposes(stack.frame))
    weights = own.clone() if apart else own
    if gate is not None and not apart:
        lifts = tuple(part._replace(coords=silenced(gate, part.coords)) for part in lifts)
    if s.dense is not None:
        update_weight(weights, s.dense, rates._replace(factor=factor * s.weight), gate=None if apart else gate)
        kept = 1.0
    for part in lifts:
        _add_lift(weights[0], part, alpha * part.weight, kept)
        kept = 1.0
    if apart:
        own.copy_(gated(gate, weights, own))


def _add_lift(w: Tensor, part: Lift, alpha: float, kept: float) -> None:
    """`W <- kept W + alpha P C U'` of one weight in place; picked rows or columns are scattered into it."""
    (c,), basis = part.coords, part.basis
    side = basis.right if basis.left is None else basis.left
    assert isinstance(side, Tensor)
    if not picks(side):
        a, b = (c, side[0].mT) if basis.left is None else (side[0], c)
        w.addmm_(a, b, beta=kept, alpha=alpha)
        return
    if kept != 1.0:
        w.mul_(kept)
    if basis.left is not None:
        w.index_add_(0, side[0], c, alpha=alpha)
    else:  # index_add_ on columns is several times slower
        index = side.expand(w.size(0), -1)
        w.scatter_(1, index, w.gather(1, index).add_(c, alpha=alpha))
