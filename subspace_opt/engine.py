"""From gradients to weights: load stacks, apply the pure mathematics, settle the state, update. Boxes 3 to 6 of the walk.

Only this file and `update` know of devices, dtypes of parameters and storage. A *piece* is a run of matrices of one parameter; a *stack* is
pieces of equal shape, pipeline and age that are computed together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .algebra import Constants, Slot, State, Step
from .plan import Row, state_key
from .split import Split
from .update import Rounding, generator, update_weight
from .views import Block

Nonfinite = Literal["raise", "skip", "propagate"]
Stacking = Literal["auto", "always", "never"]
MOST_FAILURES = 3  # decompositions of one parameter that may fail in a row
SMALL = 4096  # entries up to which a CPU gains from stacking


class NonFiniteGradient(FloatingPointError):
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
    state: dict[str, Any]
    lr: float | Tensor
    weight_decay: float
    scale: float = 1.0  # brings a gradient too large to be squared back into range
    refresh: bool = False  # asked for by a call
    count: int = 0  # updates before this one
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


def allocate(row: Row, param: Tensor, state: dict[str, Any]) -> None:
    """The parameter's state as the plan declares it, zeros, each tensor with a storage of its own."""
    for key, (shape, dtype) in row.state.items():
        device = torch.device("cpu") if key == "step" else param.device
        state[key] = torch.zeros(shape, dtype=dtype, device=device)


def take_step(work: list[Work], options: Options, tables: dict[Any, Tensor], failures: dict[str, int]) -> dict[str, int]:
    """Update every parameter that has a gradient. Returns the parameters skipped for non-finite gradients.

    Raises:
        NonFiniteGradient: with policy `raise`, before anything is changed.
        torch.linalg.LinAlgError: a decomposition failed `MOST_FAILURES` times in a row for one parameter.
    """
    work, skipped = _survey(work, options.nonfinite)
    for item in work:
        _open(item)
    for stack in _stacks(work, options):
        _advance(stack, options, tables, failures)
    for item in work:
        _close(item)
    return skipped


# ------------------------------------------------------------------------------------------------------------------ survey


def _survey(work: list[Work], policy: Nonfinite) -> tuple[list[Work], dict[str, int]]:
    """Look at the largest entry of every gradient once: is it finite, can it be squared, is there any?"""
    if not work:
        return [], {}
    peaks: list[float] = []
    for device in {item.grad.device for item in work}:  # one transfer a device
        there = [item for item in work if item.grad.device == device]
        norms = torch._foreach_norm([item.grad for item in there], math.inf)
        values = torch.stack([n.to(torch.float64 if n.dtype == torch.float64 else torch.float32) for n in norms]).tolist()
        for item, peak in zip(there, values, strict=True):
            item.scale = peak  # for the moment
    peaks = [item.scale for item in work]
    bad = {item.row.entry.name: 1 for item, peak in zip(work, peaks, strict=True) if not math.isfinite(peak)}
    if bad and policy == "raise":
        names = ", ".join(list(bad)[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NonFiniteGradient(
            f"the gradient of {names} holds NaN or infinity; nothing was changed. Look for its cause, lower lr, clip, or build with "
            "nonfinite='skip' to leave such parameters alone for the step"
        )
    kept = []
    for item, peak in zip(work, peaks, strict=True):
        if item.row.entry.name in bad and policy == "skip":
            continue
        item.count = int(item.state["step"].item())
        limit = _largest(item.row.compute_dtype)
        item.scale = limit / peak if math.isfinite(peak) and peak > limit else 1.0
        if item.count == 0 and peak == 0.0:
            # A parameter starts with its first gradient that is not zero: until then there is nothing to take a basis from and
            # nothing to average, and a checkpoint that initialises state by a step with zero gradients changes nothing.
            item.count = -1
        kept.append(item)
    return kept, bad if policy == "skip" else {}


def _largest(dtype: torch.dtype) -> float:
    """The largest entry a gradient may have: sums of squares, and their squares in a covariance, stay finite."""
    return float(torch.finfo(dtype).max ** (1 / 3))


# -------------------------------------------------------------------------------------------------------------------- load


def _open(item: Work) -> None:
    view = item.row.view
    item.weights = view.cut(view.whole(item.param))
    item.grads = view.cut(view.whole(item.grad))
    if item.row.compensated:
        item.compensations = view.cut(view.whole(item.state["compensation"]))


def _close(item: Work) -> None:
    """Count the update; write back a weight whose storage could not be viewed as matrices."""
    if item.count >= 0:
        item.state["step"].add_(1.0)
    view = item.row.view
    for stored, blocks in ((item.param, item.weights), (item.state.get("compensation"), item.compensations)):
        if stored is not None and blocks and blocks[0].untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
            stored.copy_(view.restore(blocks, stored.shape))


def _stacks(work: list[Work], options: Options) -> Iterator[tuple[Split, list[Piece]]]:
    """Pieces that may be computed together, cut so that one temporary of a stack stays within `batch_bytes`."""
    waiting: dict[Any, list[Piece]] = {}
    for item in work:
        for index, (block, split) in enumerate(item.row.splits):
            most = _matrices_at_once(item, block, options)
            for start in range(0, block.count, most):
                piece = Piece(item, index, start, min(start + most, block.count))
                key = (id(split), item.count, item.row.compute_dtype, item.param.device, most)
                queue = waiting.setdefault(key, [])
                if queue and sum(p.stop - p.start for p in queue) + piece.stop - piece.start > most:
                    yield split, waiting.pop(key)
                    queue = waiting.setdefault(key, [])
                queue.append(piece)
    for queue in waiting.values():
        first = queue[0]
        yield first.work.row.splits[first.index][1], queue


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


def _advance(
    stack: tuple[Split, list[Piece]], options: Options, tables: dict[Any, Tensor], failures: dict[str, int]
) -> None:
    split, pieces = stack
    first = pieces[0].work
    update: Tensor | None = None
    if first.count >= 0:
        grad = _joined((_gradient(piece) for piece in pieces), first.row.compute_dtype)
        old = {key: _stored(pieces, key, slot) for key, slot in split.slots.items()}
        new: State = old
        weight = None
        if split.needs_weight:
            weight = _joined((p.work.weights[p.index][p.start : p.stop] for p in pieces), first.row.compute_dtype)
        step = _step(split, pieces, options, tables)
        try:
            update, new = _run(split, grad, weight, old, step)
            for piece in pieces:
                failures.pop(piece.work.row.entry.name, None)
        except torch.linalg.LinAlgError as error:
            _count_failure(pieces, failures, error)
            if not step.first:  # go on with the basis there is
                update, new = _run(split, grad, weight, old, step._replace(refresh=False))
        _settle(pieces, split, old, new)
        if step.first and split.primes:
            return
    _update(pieces, update, split, options)


def _run(
    split: Split, grad: Tensor, weight: Tensor | None, old: State, step: Step
) -> tuple[Tensor | None, State]:
    if step.first and split.primes:
        return None, split.prime(grad, weight, old, step)
    return split.apply(grad, weight, old, step)


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


def _step(split: Split, pieces: list[Piece], options: Options, tables: dict[Any, Tensor]) -> Step:
    work, selector = pieces[0].work, split.pipeline.selector
    call = work.count + 1
    # Where the first gradient only primes the basis, updates are counted from the second.
    t = call - 1 if split.primes else call
    first = call == 1
    refresh = split.opens and (first or selector.refreshes(t) or work.refresh)
    noise = None
    shape = selector.draws(split.rows, split.cols) if refresh and selector.draws_at(call) else None
    if shape is not None:
        noise = torch.cat([_noise(piece, call, shape, options.seed) for piece in pieces]).to(work.param.device)
    return Step(
        t=torch.tensor(float(t), dtype=torch.float64),
        age=torch.tensor(float(selector.age(max(t, 1))), dtype=torch.float64),
        first=first,
        refresh=refresh,
        decay=work.weight_decay,
        rows=split.rows,
        cols=split.cols,
        position=torch.tensor([p.work.row.position for p in pieces for _ in range(p.stop - p.start)]),
        noise=noise,
        constants=_constants(split, work, tables) if split.opens else {},
    )


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


def _count_failure(pieces: list[Piece], failures: dict[str, int], error: Exception) -> None:
    for name in {piece.work.row.entry.name for piece in pieces}:
        failures[name] = failures.get(name, 0) + 1
        if failures[name] >= MOST_FAILURES:
            raise torch.linalg.LinAlgError(
                f"the decomposition for '{name}' failed {MOST_FAILURES} times in a row; its basis was kept until now: {error}"
            ) from error
        warnings.warn(f"a decomposition for '{name}' failed and its basis is kept: {error}", RuntimeWarning, stacklevel=2)


def _settle(pieces: list[Piece], split: Split, old: State, new: State) -> None:
    """Every slot back to its own storage and dtype."""
    sizes = [piece.stop - piece.start for piece in pieces]
    for key in split.slots:
        value = new[key]
        if value is old[key]:
            continue
        for piece, part in zip(pieces, value.split(sizes), strict=True):
            piece.slot(key).copy_(part)


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
            words = (options.seed, "rounding", work.row.entry.name, piece.block.name, piece.start, work.count)
            noise = torch.rand(w.shape, generator=generator(w.device, *words), device=w.device, dtype=part.dtype)
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
