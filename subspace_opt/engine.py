"""From gradients to weights: load stacks, apply the pure mathematics, settle the state, update. Boxes 3 to 6 of the walk.

Only this file and `update` know of devices, dtypes of parameters and storage. A *piece* is a run of matrices of one parameter; a *stack* is
pieces of equal shape, pipeline and age that are computed together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from . import linalg
from .algebra import Constants, Selector, Slot, State, Step
from .plan import COUNTERS, Row, state_key
from .split import Split
from .update import Rounding, generator, update_weight
from .views import Block

Nonfinite = Literal["raise", "skip", "propagate"]
Stacking = Literal["auto", "always", "never"]
MOST_FAILURES = 3  # decompositions of one parameter that may fail in a row
SMALL = 4096  # entries up to which a CPU gains from stacking


class NonFiniteGradient(FloatingPointError):  # noqa: N818  the gradient is what is wrong
    """A gradient holds NaN or infinity; nothing has been changed."""


@dataclass(frozen=True)
class Options:
    """What the engine is told beside the spec."""

    nonfinite: Nonfinite = "raise"
    rounding: Rounding = "nearest"
    stacking: Stacking = "auto"
    batch_bytes: int = 64 * 2**20
    seed: int = 0


@dataclass
class Work:
    """One parameter in one step."""

    row: Row
    param: Tensor
    grad: Tensor
    lr: float | Tensor
    weight_decay: float
    state: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0  # brings a gradient too large to be squared back into range
    refresh: bool = False  # asked for by a call, or to make up for one that failed
    count: int = 0  # updates before this one; -1: there was no gradient but 0 until now
    held: bool = False  # the first update came to nothing and is not counted
    weights: list[Tensor] = field(default_factory=list)  # per block, `(count, rows, cols)`
    grads: list[Tensor] = field(default_factory=list)
    compensations: list[Tensor] | None = None


@dataclass(frozen=True)
class Piece:
    """Matrices `start` to `stop` of one block of a parameter."""

    work: Work
    index: int
    start: int
    stop: int

    @property
    def block(self) -> Block:
        return self.work.row.splits[self.index][0]

    def slot(self, key: str) -> Tensor:
        """The piece of a state tensor, with a leading stack dimension."""
        value: Tensor = self.work.state[state_key(self.block, key)]
        return value.unsqueeze(0) if self.block.count == 1 else value[self.start : self.stop]


class Phase(Enum):
    """Where a matrix stands."""

    WAITING = "no gradient but 0 until now"
    FIRST = "its first gradient"
    BEGUN = "it has state"


@dataclass(frozen=True)
class Stack:
    """Pieces that are computed together."""

    split: Split
    phase: Phase
    pieces: list[Piece]


@dataclass
class Memory:
    """What the engine keeps between steps beside the state; all of it can be lost, and is found again."""

    tables: dict[Any, Tensor] = field(default_factory=dict)  # shared by matrices; by name, device and dtype
    begun: set[tuple[str, int]] = field(default_factory=set)  # (parameter, block) all of whose matrices have begun


def allocate(row: Row, param: Tensor, state: dict[str, Any]) -> None:
    """The parameter's state as the plan declares it, zeros, each tensor with a storage of its own."""
    for key, (shape, dtype) in row.state.items():
        device = torch.device("cpu") if key in COUNTERS else param.device
        state[key] = torch.zeros(shape, dtype=dtype, device=device)


def take_step(work: list[Work], options: Options, memory: Memory, failures: dict[str, int]) -> None:
    """Update every parameter of a surveyed list. `failures`: of decompositions in a row, by parameter, kept up to date.

    Raises:
        torch.linalg.LinAlgError: a decomposition failed `MOST_FAILURES` times in a row for one parameter; all others are updated by then.
    """
    # In an order of their own: round-off within a batched product depends on the place in it, and the order of parameters must not matter.
    work = sorted(work, key=lambda item: item.row.entry.name)
    for item in work:
        _open(item)
    errors: dict[str, Exception] = {}
    for stack in _stacks(work, options, memory):
        _advance(stack, options, memory, errors)
    for item in work:
        _close(item)
    _report(work, errors, failures)


# ------------------------------------------------------------------------------------------------------------------ survey


def survey(work: list[Work], policy: Nonfinite) -> tuple[list[Work], list[str]]:
    """Look at the largest entry of every gradient once: is it finite, can it be squared, is there any?

    Returns what is to be updated, and the names of parameters skipped for non-finite gradients.

    Raises:
        NonFiniteGradient: with policy `raise`; nothing has been changed.
    """
    peaks = _peaks([item.grad for item in work])
    bad = [item.row.entry.name for item, peak in zip(work, peaks, strict=True) if not math.isfinite(peak)]
    if bad and policy == "raise":
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NonFiniteGradient(
            f"the gradient of {names} holds NaN or infinity; nothing was changed. Look for its cause, lower lr, clip, or build with "
            "nonfinite='skip' to leave such parameters alone for the step"
        )
    kept = []
    for item, peak in zip(work, peaks, strict=True):
        if not math.isfinite(peak) and policy == "skip":
            continue
        limit = _largest(item.row.compute_dtype)
        item.scale = limit / peak if math.isfinite(peak) and peak > limit else 1.0
        if item.count == 0 and peak == 0.0:
            # A parameter starts with its first gradient that is not zero: until then there is nothing to take a basis from and
            # nothing to average, and a checkpoint that initialises state by a step with zero gradients changes nothing.
            item.count = -1
        kept.append(item)
    return kept, bad if policy == "skip" else []


def _peaks(grads: list[Tensor]) -> list[float]:
    """The largest magnitude in each, NaN where there is one; one transfer a device."""
    peaks = [0.0] * len(grads)
    for device in {grad.device for grad in grads}:
        there = [i for i, grad in enumerate(grads) if grad.device == device]
        # Not the infinity norm: on a CPU it takes twenty times as long as the entry of largest magnitude.
        tops = [grads[i].abs().amax() for i in there]
        wide = [top.to(torch.float64 if top.dtype == torch.float64 else torch.float32) for top in tops]
        for i, peak in zip(there, torch.stack(wide).tolist(), strict=True):
            peaks[i] = peak
    return peaks


def _largest(dtype: torch.dtype) -> float:
    """The largest entry a gradient may have: sums of squares, and their squares in a covariance, stay finite."""
    return float(torch.finfo(dtype).max ** (1 / 3))


# -------------------------------------------------------------------------------------------------------------------- load


def _open(item: Work) -> None:
    view = item.row.view
    item.weights = view.cut(view.whole(item.param.detach()))
    item.grads = view.cut(view.whole(item.grad))
    if item.row.compensated:
        item.compensations = view.cut(view.whole(item.state["compensation"]))


def _close(item: Work) -> None:
    """Count the update; write back a weight whose storage could not be viewed as matrices."""
    if item.count >= 0 and not item.held:
        item.state["step"].add_(1.0)
    view = item.row.view
    for stored, blocks in ((item.param.detach(), item.weights), (item.state.get("compensation"), item.compensations)):
        if stored is not None and blocks and blocks[0].untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
            stored.copy_(view.restore(blocks, stored.shape))


def _stacks(work: list[Work], options: Options, memory: Memory) -> Iterator[Stack]:
    """Pieces that may be computed together, cut so that one temporary of a stack stays within `batch_bytes`."""
    waiting: dict[Any, Stack] = {}
    for item in work:
        for index, (block, split) in enumerate(item.row.splits):
            most = _matrices_at_once(item, block, options)
            decay = item.weight_decay if split.pipeline.decay == "coupled" else None  # then rules see it
            for phase, start, stop in _runs(_phases(item, index, memory.begun), most):
                key = (id(split), phase, item.count, item.refresh, decay, item.row.compute_dtype, item.param.device, most)
                stack = waiting.setdefault(key, Stack(split, phase, []))
                if sum(p.stop - p.start for p in stack.pieces) + stop - start > most:
                    yield stack
                    stack = waiting[key] = Stack(split, phase, [])
                stack.pieces.append(Piece(item, index, start, stop))
    yield from waiting.values()


def _phases(item: Work, index: int, begun: set[tuple[str, int]]) -> list[Phase]:
    """The phase of every matrix of a block.

    Matrices of one parameter, such as experts, may get their first gradient at different times: one without must not be given a basis of
    round-off, nor wait for the next refresh when its gradient comes.
    """
    block, split = item.row.splits[index]
    name = (item.row.entry.name, index)
    if item.count < 0:
        return [Phase.WAITING] * block.count
    if (block.count == 1 and len(item.row.splits) == 1) or name in begun or not split.slots:
        return [Phase.BEGUN if item.count else Phase.FIRST] * block.count
    moved = item.grads[index].flatten(1).any(1)
    has = torch.zeros_like(moved)
    if item.count:
        for key in split.slots:
            value = item.state[state_key(block, key)]
            has |= (value.unsqueeze(0) if block.count == 1 else value).reshape(block.count, -1).any(1)
    phases = [
        Phase.BEGUN if state else Phase.FIRST if gradient else Phase.WAITING
        for state, gradient in zip(has.tolist(), moved.tolist(), strict=True)
    ]
    if all(phase is Phase.BEGUN for phase in phases):
        begun.add(name)
    return phases


def _runs(phases: list[Phase], most: int) -> Iterator[tuple[Phase, int, int]]:
    """Neighbours of one phase, at most `most` of them, as (phase, start, stop)."""
    start = 0
    for phase, group in groupby(phases):
        stop = start + len(list(group))
        for first in range(start, stop, most):
            yield phase, first, min(first + most, stop)
        start = stop


def _matrices_at_once(item: Work, block: Block, options: Options) -> int:
    """On a CPU large matrices run one by one, which is faster there than a batched product; elsewhere as many as fit."""
    together = options.stacking == "always" or (
        options.stacking == "auto" and (item.param.device.type != "cpu" or block.rows * block.cols <= SMALL)
    )
    if not together:
        return 1
    return max(1, options.batch_bytes // (block.rows * block.cols * item.row.compute_dtype.itemsize))


def _joined(parts: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    cast = [part.to(dtype) for part in parts]
    return cast[0] if len(cast) == 1 else torch.cat(cast)


# ------------------------------------------------------------------------------------------------------- apply, settle, update


def _advance(stack: Stack, options: Options, memory: Memory, errors: dict[str, Exception]) -> None:
    """Apply, update, settle. Where a decomposition fails, matrices go on with the basis they have, and `errors` is told whose."""
    split, pieces = stack.split, stack.pieces
    if stack.phase is Phase.WAITING:
        _update(pieces, None, split, options)
        return
    dtype = pieces[0].work.row.compute_dtype
    grad = _joined((_gradient(piece) for piece in pieces), dtype)
    old = {key: _stored(pieces, key, slot) for key, slot in split.slots.items()}
    weight = None
    if split.needs_weight:
        weight = _joined((p.work.weights[p.index][p.start : p.stop] for p in pieces), dtype)
    step = _step(stack, options, memory.tables)
    sound = options.nonfinite != "propagate"
    try:
        update, new = _run(split, grad, weight, old, step, sound)
    except torch.linalg.LinAlgError as error:
        if len(pieces) > 1:  # one by one, to learn whose fault it is and to spare the others
            for piece in pieces:
                _advance(Stack(split, stack.phase, [piece]), options, memory, errors)
            return
        name = pieces[0].work.row.entry.name
        errors[name] = error
        if step.first:  # there is no basis to go on with: it begins with the next gradient
            pieces[0].work.held = len(pieces[0].work.row.splits) == 1 and pieces[0].block.count == 1
            return
        if step.refresh and not split.pipeline.selector.keeps_basis:
            return
        try:
            kept = _without_refresh(split, old) if step.refresh else old
            update, new = _run(split, grad, weight, kept, step._replace(refresh=False), sound)
        except torch.linalg.LinAlgError:  # it was not the basis but a rule
            return
    if update is not None:
        _update(pieces, update, split, options)  # before the state is written: the update may be part of it
    _settle(pieces, split, old, new)
    if step.refresh and (stack.phase is Phase.BEGUN or not pieces[0].work.count):
        for piece in pieces:
            if "refreshed" in piece.work.state:
                piece.work.state["refreshed"].fill_(step.t)


def _run(split: Split, grad: Tensor, weight: Tensor | None, old: State, step: Step, sound: bool) -> tuple[Tensor | None, State]:
    """Update and new state; none yet where the first gradient only sets the basis."""
    if step.first and split.primes:
        return None, split.prime(grad, weight, old, step)
    update, new = split.apply(grad, weight, old, step)
    # A QR returns NaN where other decompositions raise.
    if sound and not linalg.all_finite(update):
        raise torch.linalg.LinAlgError("the update holds NaN or infinity although the gradient does not")
    return update, new


def _without_refresh(split: Split, old: State) -> State:
    """The state where a refresh was due and the basis stays: what begins anew with it still does, as its bias correction counts on it."""
    return {key: torch.zeros_like(v) if split.slots[key].transport == "reset" else v for key, v in old.items()}


def _gradient(piece: Piece) -> Tensor:
    work = piece.work
    grad = work.grads[piece.index][piece.start : piece.stop]
    return grad if work.scale == 1.0 else grad.to(work.row.compute_dtype) * work.scale


def _stored(pieces: list[Piece], key: str, slot: Slot) -> Tensor:
    parts = [piece.slot(key) for piece in pieces]
    if len(parts) > 1:
        return torch.cat(parts)
    part = parts[0]
    dtype = slot.dtype or pieces[0].work.row.compute_dtype
    return part.to(dtype)


def _step(stack: Stack, options: Options, tables: dict[Any, Tensor]) -> Step:
    split, pieces = stack.split, stack.pieces
    work, selector = pieces[0].work, split.pipeline.selector
    call = work.count + 1
    # Where the first gradient only primes the basis, updates are counted from the second.
    t = call - 1 if split.primes else call
    first = stack.phase is Phase.FIRST
    refresh = split.opens and (first or selector.refreshes(t) or work.refresh)
    noise = None
    drawing = refresh and (selector.draws_at(call) or (first and selector.draws_at(1)))
    shape = selector.draws(split.rows, split.cols) if drawing else None
    if shape is not None:
        drawn = torch.cat([_noise(piece, call, shape, options.seed) for piece in pieces])
        noise = drawn.to(work.param.device, work.row.compute_dtype)
    return Step(
        t=torch.tensor(float(t), dtype=torch.float64),
        age=torch.tensor(float(_age(work, selector, t, refresh)), dtype=torch.float64),
        first=first,
        refresh=refresh,
        decay=work.weight_decay,
        rows=split.rows,
        cols=split.cols,
        position=torch.tensor([p.work.row.position for p in pieces for _ in range(p.stop - p.start)]),
        noise=noise,
        constants=_constants(split, work, tables) if split.opens else {},
    )


def _age(work: Work, selector: Selector, t: int, refresh: bool) -> int:
    """Updates since the last basis was taken, this one counted; by the schedule where nothing hangs on it."""
    if refresh or "refreshed" not in work.state:
        return 1 if refresh else selector.age(max(t, 1))
    return t - int(work.state["refreshed"].item()) + 1


def _noise(piece: Piece, call: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draws that depend on (seed, name, block, update) alone, `(matrices, *shape)` float32."""
    words = (seed, piece.work.row.entry.name, piece.block.name, call)
    whole = torch.randn(piece.block.count, *shape, generator=generator(torch.device("cpu"), *words))
    return whole[piece.start : piece.stop]


def _constants(split: Split, work: Work, tables: dict[Any, Tensor]) -> Constants:
    """Tables shared by all matrices that need them, built once per device and dtype."""
    out: Constants = {}
    for name, make in split.pipeline.selector.constants(split.rows, split.cols).items():
        key = (name, work.param.device, work.row.compute_dtype)
        if key not in tables:
            tables[key] = make().to(work.param.device, work.row.compute_dtype)
        out[name] = tables[key]
    return out


def _report(work: list[Work], errors: dict[str, Exception], failures: dict[str, int]) -> None:
    """Count failures in a row, warn of each, give up at `MOST_FAILURES`."""
    for item in work:
        if item.row.entry.name not in errors:
            failures.pop(item.row.entry.name, None)
    for name, error in errors.items():
        failures[name] = failures.get(name, 0) + 1
        if failures[name] < MOST_FAILURES:
            warnings.warn(
                f"a decomposition for '{name}' failed; its basis is kept and the next update tries again: {error}",
                RuntimeWarning,
                stacklevel=5,
            )
    for name, error in errors.items():
        if failures[name] >= MOST_FAILURES:
            raise torch.linalg.LinAlgError(
                f"the decomposition for '{name}' failed {failures[name]} times in a row; its basis was kept until now: {error}"
            ) from error


def _settle(pieces: list[Piece], split: Split, old: State, new: State) -> None:
    """Every slot back to its own storage and dtype."""
    sizes = [piece.stop - piece.start for piece in pieces]
    given = {id(_storage_of(value)) for value in old.values()}
    changed = {key: new[key] for key in split.slots if new[key] is not old[key]}
    # What a rule was given it may hand on in another slot (a history of gradients), and that storage is about to be written.
    apart = {key: v.clone() if id(_storage_of(v)) in given else v for key, v in changed.items()}
    for key, value in apart.items():
        for piece, part in zip(pieces, value.split(sizes), strict=True):
            piece.slot(key).copy_(part)


def _storage_of(value: Tensor) -> Tensor:
    """The tensor that a view is of."""
    return value if value._base is None else value._base


def _update(pieces: list[Piece], update: Tensor | None, split: Split, options: Options) -> None:
    sizes = [piece.stop - piece.start for piece in pieces]
    parts = [None] * len(pieces) if update is None else update.split(sizes)
    for piece, part in zip(pieces, parts, strict=True):
        work = piece.work
        here = slice(piece.start, piece.stop)
        w = work.weights[piece.index][here]
        if part is None:  # no update yet: decay alone
            part = torch.zeros(w.shape, dtype=work.row.compute_dtype, device=w.device)
        low = w.dtype != part.dtype
        noise = None
        if low and options.rounding == "stochastic":
            noise = torch.empty_like(part)
            for i, one in enumerate(noise, piece.start):  # matrix by matrix: how stacks are cut must not matter
                words = (options.seed, "rounding", work.row.entry.name, piece.block.name, i, work.count)
                one.uniform_(generator=generator(w.device, *words))
        update_weight(
            w,
            part,
            work.lr,
            0.0 if split.pipeline.decay == "coupled" else work.weight_decay,
            decay_after=split.pipeline.decay == "after",
            rounding=options.rounding,
            compensation=work.compensations[piece.index][here] if work.compensations else None,
            noise=noise,
        )
