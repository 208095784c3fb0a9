"""`Frame.update` through `torch.compile`: one graph for each pipeline, size of stack, and kind of step.

A graph is never compiled again, because the numbers that change from step to step (count, learning rate, weight decay) enter as tensors.
These updates run plain: the first one of a matrix, refreshes that come at intervals, pipelines that read the count on the host
(`host_clock`), and pipelines with numbers from a schedule or a parameter group.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...algebra.core import State, Step
from ...algebra.frame import Frame
from ...algebra.linear import Lift, Linear, Sum
from ...linalg import polar
from ..strategies import has_host_clock
from ..work import Options, Phase, Stack

Update = Callable[[Tensor, Tensor | None, State, Step], tuple[Linear, State]]
SIZES = 4  # sizes of stacks that are compiled for a pipeline and shape; refreshes spread over the steps make more, which run plain


def update_of(stack: Stack, step: Step, options: Options) -> tuple[Update, Step]:
    """`Frame.update` for a stack, compiled if the options ask for it and the update allows it, and the step to call it with."""
    frame = stack.frame
    if options.compile is None or not _is_compiled(stack, step):
        return frame.update, step
    known: dict[Any, Update] = frame.memo.setdefault("compiled", {})
    work = stack.pieces[0].work
    key = (sum(stack.sizes), step.refresh, work.param.device, stack.dtype, options.compile)
    if key not in known:
        if len({size for size, *_ in known} | {key[0]}) > SIZES:
            return frame.update, step
        known[key] = _compiled(frame, options.compile)
    # The state is written once, after the graph: in-place writes would only be undone and done again by the compiler.
    decay = _tensor(step.decay) if step.decay != 0 else 0.0
    return known[key], step._replace(in_place=False, on_device=True, lr=_tensor(step.lr), decay=decay)


def _is_compiled(stack: Stack, step: Step) -> bool:
    frame = stack.frame
    at_every_step = frame.opens and frame.pipeline.selector.every == 1 and "every" not in frame.pipeline.selector.schedules
    begun = stack.phase is Phase.BEGUN and not step.first and (at_every_step or not step.refresh)
    return begun and not stack.pieces[0].work.values and not frame.codes and not has_host_clock(frame)


def _tensor(number: float | Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)


def _compiled(frame: Frame, backend: str) -> Update:
    """`frame.update`, compiled. It returns the same expression: lifts are multiplied into the weight after the graph."""

    def parts(grad: Tensor, weight: Tensor | None, state: State, step: Step) -> tuple[Any, ...]:
        update, new = frame.update(grad, weight, state, step)
        s = update.sum
        lifts = tuple((part.coords, part.basis, part.weight) for part in s.lifts)
        return (s.dense, s.weight, lifts, s.rows, s.cols), update.factor, update.number, new

    for function in polar.CONSTANT:
        torch.compiler.assume_constant_result(function)
    # A code object of its own: torch.compile counts the graphs of all functions that share one, and gives up after eight.
    own = types.FunctionType(parts.__code__.replace(), parts.__globals__, "update", closure=parts.__closure__)
    graph = torch.compile(own, backend=backend, dynamic=False)
    traced = False

    def update(grad: Tensor, weight: Tensor | None, state: State, step: Step) -> tuple[Linear, State]:
        nonlocal traced
        if not traced:
            traced = True
            with warnings.catch_warnings():  # every cached function here is pure
                warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
                return update(grad, weight, state, step)
        (dense, scale, lifts, rows, cols), factor, number, new = graph(grad, weight, state, step)
        return Linear(Sum(rows, cols, dense, scale, tuple(Lift(*part) for part in lifts)), factor, number), new

    return update
