"""The `Step` that a stack's rules see: counts, draws, tables."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..algebra.core import Constants, Drawn, Step
from ..algebra.frame import Frame
from .capture.clock import device_clock, has_device_clock
from .rounding import generator
from .stacking import counted, refreshed
from .work import Options, Phase, Piece, Stack, Work


def step_of(stack: Stack, options: Options, tables: dict[Any, Tensor]) -> Step:
    """The step of a stack; `tables`: the selectors' constants made so far, to which it adds."""
    frame, pieces, refresh = stack.frame, stack.pieces, stack.refresh
    work, selector = pieces[0].work, frame.pipeline.selector
    call, t = work.count + 1, counted(work, frame)
    first = stack.phase is Phase.FIRST
    noise = None
    shape = selector.draws(frame.rows, frame.cols, call, first) if refresh else None
    if shape is not None:
        drawn = torch.cat([_noise(piece, call, shape, options.seed) for piece in pieces])
        noise = drawn.to(work.param.device, work.row.compute_dtype)
    on_device = options.capturable and has_device_clock(stack, options)
    clock = device_clock(stack) if on_device else (_clock(t), _clock(_age(work, frame, t, refresh)))
    return Step(
        t=clock[0],
        age=clock[1],
        on_device=on_device,
        first=first,
        refresh=refresh,
        decay=work.weight_decay,
        lr=_lr(stack) if frame.reads_lr else 1.0,
        rows=frame.rows,
        cols=frame.cols,
        turned=frame.turned,
        position=_positions(tuple(p.work.row.position for p in pieces for _ in range(p.size))),
        noise=noise,
        constants=_constants(frame, work, tables, options.seed) if frame.opens else {},
    )


def _lr(stack: Stack) -> float | Tensor:
    """The learning rate of a stack: a number, or `(B, 1, 1)` if the rates are tensors on a device."""
    rates = [piece.work.lr for piece in stack.pieces]
    if not isinstance(rates[0], Tensor):
        return rates[0]
    tensors = [rate.reshape(1).expand(size) for rate, size in zip(rates, stack.sizes, strict=True) if isinstance(rate, Tensor)]
    return torch.cat(tensors).to(stack.dtype).view(-1, 1, 1)


# Constant tensors, cached: making one takes longer than most operations on it.
@functools.lru_cache(maxsize=8)
def _clock(t: int) -> Tensor:
    return torch.tensor(float(t), dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _positions(places: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.tensor(places)


def _age(work: Work, frame: Frame, t: int, refresh: bool) -> int:
    """Updates since the last refresh, including this one; by the schedule if no slot resets at a refresh."""
    if refresh:
        return 1
    last = refreshed(work)
    return frame.pipeline.selector.age(max(t, 1), work.row.turn) if last is None else t - last + 1


def _noise(piece: Piece, call: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal draws `(matrices, *shape)` float32, which depend on (seed, parameter's key, block, update) alone."""
    words = (seed, piece.work.key, piece.block.name, call)
    draws = generator(torch.device("cpu"), *words)
    whole = torch.randn(piece.block.total, *shape, generator=draws, dtype=torch.float32)
    return whole[piece.block.first + piece.start : piece.block.first + piece.stop]


def _constants(frame: Frame, work: Work, tables: dict[Any, Tensor], seed: int) -> Constants:
    """The selector's tables, made once per device and dtype."""
    out: Constants = {}
    for name, make in frame.pipeline.selector.constants(frame.rows, frame.cols).items():
        key = (name, work.param.device, work.row.compute_dtype)
        if key not in tables:
            made = make(generator(torch.device("cpu"), seed, name)) if isinstance(make, Drawn) else make()
            tables[key] = made.to(work.param.device, work.row.compute_dtype)
        out[name] = tables[key]
    return out
