"""Run stacks of gradients through the mathematics of a pipeline, without an optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra import Selector, State, Step
from ..algebra.frame import Frame
from ..algebra.pipeline import Pipeline
from .models import stack
from .probe import Notes, is_fake, probed
from .subject import Testable

SHAPES = ((6, 4), (4, 7), (5, 5), (1, 6))
DTYPES = (torch.float64, torch.float32)
LR, DECAY = 0.05, 0.1  # of pipelines with rules in `apply`


@dataclass(frozen=True)
class Trace:
    """The update and the state of every step. An update is None if the first gradient only sets the basis."""

    updates: list[Tensor | None]
    states: list[State]


def drive(frame: Frame, grads: list[Tensor], notes: Notes, *, where: str = "", twins: bool = False) -> Trace:
    """Run gradients `(B, m, n)` through a pipeline, from a state of zeros.

    Args:
        twins: Matrices 0 and 2 of the stack are copies and get the same draws and the same position.
    """
    first = grads[0]
    state = {k: first.new_zeros(first.size(0), *s.shape, dtype=s.dtype or first.dtype) for k, s in frame.slots.items()}
    weight = _weights(first, twins) if frame.needs_weight else None
    trace = Trace([], [])
    for call, grad in enumerate(grads, 1):
        notes.where = f"{where}update {call} of {grad.size(0)} matrices {grad.size(1)} x {grad.size(2)}, {grad.dtype}"
        step = moment(frame, call, grad, twins)
        update: Tensor | None = None
        if step.first and frame.primes:
            new = frame.prime(grad, weight, state, step)
        else:
            expression, new = frame.update(grad, weight, state, step)
            update = expression.dense()
            if frame.pipeline.apply:
                assert weight is not None
                weight = weight - update
        state = {key: new[key] for key in frame.slots}
        trace.updates.append(update)
        trace.states.append(state)
    notes.where = ""
    return trace


def _weights(like: Tensor, twins: bool) -> Tensor:
    return like if is_fake(like) else stack(tuple(like.shape), like.dtype, 99, twins=twins).to(like.device)


def moment(frame: Frame, call: int, grad: Tensor, twins: bool) -> Step:
    """The `Step` that the engine would pass to a stack with its gradient number `call`."""
    selector, one = frame.pipeline.selector, torch.ones((), dtype=torch.float64)
    t = call - 1 if frame.primes else call
    places = torch.arange(grad.size(0))
    if twins and grad.size(0) > 2:
        places[2] = 0
    refresh = frame.opens and (call == 1 or selector.refreshes(t))
    tables = selector.constants(frame.rows, frame.cols) if frame.opens else {}
    lr, decay = (LR, DECAY) if frame.pipeline.apply else (1.0, 0.0)
    return Step(
        t=one * t,
        age=one * selector.age(max(t, 1)),
        first=call == 1,
        refresh=refresh,
        lr=lr,
        decay=decay,
        rows=frame.rows,
        cols=frame.cols,
        position=torch.stack([places, torch.full_like(places, 4)], dim=1),
        noise=_draws(frame, call, grad, twins) if refresh else None,
        constants={name: make().to(grad.device, grad.dtype) for name, make in tables.items()},
    )


def _draws(frame: Frame, call: int, grad: Tensor, twins: bool) -> Tensor | None:
    selector = frame.pipeline.selector
    shape = selector.draws(frame.rows, frame.cols, call, call == 1)
    if shape is None:
        return None
    if is_fake(grad):
        return grad.new_zeros(grad.size(0), *shape)
    return stack((grad.size(0), *shape), grad.dtype, 1000 + call, twins=twins)


def placed(pipeline: Pipeline, component: Testable, notes: Notes) -> Pipeline:
    """The pipeline with a probe in place of the component."""
    if isinstance(component, Selector):
        return pipeline.model_copy(update={"selector": probed(pipeline.selector, notes)})
    kind = type(component)
    return pipeline.model_copy(
        update={
            place: tuple(probed(rule, notes) if type(rule) is kind else rule for rule in getattr(pipeline, place))
            for place in ("momentum", "inside", "complement", "finish", "apply")
        }
    )
