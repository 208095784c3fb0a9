"""The update of a parameter computed a second time, from copies taken before the step, with its intermediate results recorded.

The run's own update keeps no trace of its parts, and recording them would cost every step. The second update is the plain `Frame.update`
on copies: it writes to no tensor of the run, and its random draws depend on parameter and step alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..algebra.core import Basis, Coords, State, Step
from ..algebra.frame import Frame, Opened
from ..algebra.guards import silence_round_off
from ..algebra.linear import Linear
from ..engine import lowbit
from ..engine.gradients import survey
from ..engine.homes import Memory, gather
from ..engine.moment import step_of
from ..engine.stacking import grouped
from ..engine.work import Options, Phase, Piece, Stack, Work, allocate


@dataclass
class Before:
    """A parameter before a step. `work` has copies of its weights and, if it opens a subspace, of its state."""

    work: Work
    param: Tensor
    maximize: bool

    @classmethod
    def of(cls, work: Work, param: Tensor, state: dict[str, Any] | None, *, maximize: bool) -> Before:
        """Copy the weights and the state. A parameter without state gets zeros, as its first step does."""
        work.param = param.detach().clone()
        if opens(work):
            if state:
                work.state = {key: _copied(value) for key, value in state.items()}
            else:
                allocate(work.row, work.param, work.state)
        return cls(work, param, maximize)

    def with_gradient(self, options: Options) -> bool:
        """Take the gradient that the step used. Returns False if the step left the parameter out, because it is not finite."""
        grad = self.param.grad
        assert grad is not None
        self.work.grad = -grad if self.maximize else grad
        return bool(survey([self.work], options.nonfinite)[0])


def opens(work: Work) -> bool:
    """True if a part of the parameter has a subspace."""
    return any(frame.opens for _, frame in work.splits)


def _copied(value: Tensor) -> Tensor:
    return value.clone() if lowbit.found(value) is None else lowbit.copied(value, value.device)


def pieces(work: Work, options: Options) -> Iterator[Stack]:
    """The matrices of a parameter as stacks of one piece each: matrices of one block and of one phase."""
    if not opens(work):  # its state was not copied, and no update is computed
        phase = Phase.WAITING if work.count < 0 else Phase.BEGUN
        for index, (block, frame) in enumerate(work.splits):
            yield Stack(frame, phase, False, [Piece(work, index, 0, block.count)])
        return
    together = replace(options, stacking="always", batch_bytes=2**62)
    for stack in grouped([work], together, Memory()):
        yield from (replace(stack, pieces=[piece]) for piece in stack.pieces)


@dataclass
class Recorded:
    """Intermediate results of one update, in the working orientation."""

    signal: Tensor | None = None  # (B, m, n), as it enters the subspace
    coords: Coords | None = None
    basis: Basis | None = None
    inside: Tensor | None = None  # the part of the update made inside, lifted and weighted
    complement: Tensor | None = None  # that of the complement, weighted
    silent: Tensor | None = None  # Boolean (B,): the residual is only round-off
    refresh_seconds: float | None = None


@dataclass(frozen=True)
class Recorder(Frame):
    """A frame whose `update` records its parts."""

    @cached_property
    def seen(self) -> Recorded:
        return Recorded()

    def _mixed(self, x: Tensor, g: Tensor, coords: Coords, basis: Basis, new: State, step: Step) -> Linear:
        seen, mix = self.seen, self.pipeline.mix
        seen.signal, seen.coords, seen.basis = x.clone(), coords, basis
        if self.pipeline.inside and mix.inside > 0:
            seen.inside = (self._lifted(coords.update, basis) * mix.inside).dense().clone()
        return super()._mixed(x, g, coords, basis, new, step)

    def _outside(self, x: Tensor, g: Tensor, coords: Coords, basis: Basis, new: State, step: Step) -> Linear:
        if self._guards_residual:
            residual = (Linear.of(x) - self._lifted(coords.signal, basis)).dense()
            self.seen.silent = (residual != 0).flatten(1).any(1) & ~(silence_round_off(residual, coords.signal) != 0).flatten(1).any(1)
        update = super()._outside(x, g, coords, basis, new, step)
        self.seen.complement = (update * self.pipeline.mix.complement).dense().clone()
        return update

    def _refresh(self, sources: dict[str, Tensor | None], new: State, step: Step) -> Opened:
        _wait(sources)
        began = time.perf_counter()
        opened = super()._refresh(sources, new, step)
        _wait(sources)
        self.seen.refresh_seconds = time.perf_counter() - began
        return opened


def _wait(sources: dict[str, Tensor | None]) -> None:
    """Wait for the device, so that a clock measures its work."""
    device = next(x.device for x in sources.values() if x is not None)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass
class Replay:
    """The second update of one piece."""

    recorded: Recorded = field(default_factory=Recorded)
    update: Tensor | None = None  # (B, rows, cols) in the weight's own orientation; a displacement with rules in `apply`
    age: int = 1
    failed: bool = False


def replayed(stack: Stack, options: Options) -> Replay:
    """Compute the update of a stack of one piece again. A failed decomposition is reported as `failed`, as the step did."""
    frame, piece = stack.frame, stack.pieces[0]
    if stack.phase is Phase.WAITING:
        return Replay()
    recorder = Recorder(frame.pipeline, frame.rows, frame.cols, frame.turned)
    step = step_of(stack, options, {})
    state, _ = gather(stack, Memory())
    grad = gradient(piece)
    weight = weights(piece) if frame.needs_weight else None
    result = Replay(recorder.seen, age=int(step.age))
    try:
        if step.first and frame.primes:
            recorder.prime(grad, weight, state, step)
        else:
            result.update = recorder.update(grad, weight, state, step)[0].dense()
    except torch.linalg.LinAlgError:
        return Replay(failed=True)
    return result


def gradient(piece: Piece) -> Tensor:
    """Gradients `(B, rows, cols)` in the dtype of computation, scaled into range."""
    grad = piece.of(piece.work.grads).to(piece.work.row.compute_dtype)
    return grad if piece.work.scale == 1.0 else grad * piece.work.scale


def weights(piece: Piece) -> Tensor:
    """Weights `(B, rows, cols)` before the step, with what Kahan's rounding has cut off if rules in `apply` see them."""
    dtype, lost = piece.work.row.compute_dtype, piece.work.compensations
    value = piece.of(piece.work.weights).to(dtype)
    return value if lost is None or not piece.frame.pipeline.apply else value + piece.of(lost).to(dtype)
