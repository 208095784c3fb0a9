"""Which matrices are computed together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from math import gcd, lcm
from typing import Any

import torch

from ..algebra.frame import Frame
from ..plan import state_key
from ..plan.views import Block
from . import lowbit
from .homes import Memory
from .strategies import is_by_rows, is_elementwise
from .work import Options, Phase, Piece, Stack, Work

CACHED = 400_000  # most entries of a stack on a CPU: beyond it, cache misses cost more than the saved calls
PASS = 2**17  # entries in one pass over an elementwise matrix: they stay in the cache
ROWS = 2**18  # entries in one pass over a matrix updated by rows: smaller passes would make its products too small
LONG = 8 * ROWS  # least entries of a matrix that is cut into such passes


def stacks(work: list[Work], options: Options, memory: Memory) -> Iterator[Stack]:
    """All pieces in stacks, cut so that temporaries stay small."""
    for stack in grouped(work, options, memory):
        yield from _in_passes(stack, options)


def grouped(work: list[Work], options: Options, memory: Memory) -> Iterator[Stack]:
    """Pieces that may be computed together, at most as many as `matrices_at_once` allows.

    The cuts between stacks do not depend on which matrices refresh at this step, so the others keep the storage that they share.
    """
    found: dict[Any, Stack] = {}
    filled: dict[Any, tuple[int, int]] = {}  # per kind the last stack's number, and how many matrices it has
    for item in work:
        for index, (block, frame) in enumerate(item.splits):
            most = matrices_at_once(item, block, options)
            # Copies on several ranks stay equal to the bit only in equal stacks: round-off depends on a matrix's place in its stack.
            kind = (id(frame), item.row.compute_dtype, item.param.device, most, item.holders)
            for phase, start, stop in _runs(_phases(item, index, memory.begun), most):
                number, size = filled.get(kind, (0, 0))
                number, size = (number, size + stop - start) if size + stop - start <= most else (number + 1, stop - start)
                filled[kind] = number, size
                refresh = due(item, frame, phase)
                last = None if refresh else refreshed(item)  # bias correction counts from the refresh
                key = (kind, number, phase, refresh, last, item.count, _rates_seen(item, frame))
                found.setdefault(key, Stack(frame, phase, refresh, [])).pieces.append(Piece(item, index, start, stop))
    yield from found.values()


def _rates_seen(item: Work, frame: Frame) -> tuple[float | str | None, ...]:
    """The numbers of a parameter group that a pipeline sees, so that a stack has one value of each.

    A learning rate on a device is no number: a stack has a tensor of them.
    """
    decay = item.weight_decay if frame.pipeline.decay == "coupled" or frame.pipeline.apply else None
    rate = ("tensor" if isinstance(item.lr, torch.Tensor) else item.lr) if frame.reads_lr else None
    return decay, rate


def _in_passes(stack: Stack, options: Options) -> Iterator[Stack]:
    """Cut a large matrix whose entries or rows are updated independently, such as an embedding, into runs of rows: temporaries stay small.

    A GPU does not do this, because launches cost more than bytes. Stochastic rounding excludes it, because it draws a whole matrix at once.
    """
    piece = stack.pieces[0]
    rows, cols = piece.block.rows, piece.block.cols
    alone = len(stack.pieces) == 1 and piece.size == 1 and piece.work.param.device.type == "cpu"
    frame, entries = stack.frame, rows * cols
    free = is_elementwise(frame) and entries > PASS
    by_rows = is_by_rows(frame) and entries > LONG and not stack.refresh and not frame.codes
    if not alone or not (free or by_rows) or options.rounding == "stochastic":
        yield stack
        return
    # Codes are read and written in whole blocks.
    whole = lcm(1, *(how.block // gcd(how.block, cols) for how in frame.codes.values()))
    run = max(1, (PASS if free else ROWS) // cols // whole) * whole
    for first in range(0, rows, run):
        yield Stack(stack.frame, stack.phase, stack.refresh, [replace(piece, rows=(first, min(first + run, rows)))])


def due(item: Work, frame: Frame, phase: Phase) -> bool:
    """True if a new basis is taken now."""
    if not frame.opens or phase is Phase.WAITING:
        return False
    return phase is Phase.FIRST or item.refresh or frame.pipeline.selector.refreshes(counted(item, frame), item.row.turn)


def refreshed(item: Work) -> int | None:
    """The update of the last refresh, if a slot resets at refreshes; else None."""
    if item.last_refresh is not None:
        return item.last_refresh
    return int(item.state["refreshed"].item()) if "refreshed" in item.state else None


def counted(item: Work, frame: Frame) -> int:
    """The number of this update. If the first gradient only sets the basis, the second is number 1."""
    return item.count if frame.primes else item.count + 1


def _phases(item: Work, index: int, begun: set[tuple[str, int]]) -> list[Phase]:
    """The phase of every matrix of a block.

    Matrices of one parameter, such as experts, may get their first gradients at different times. A matrix without gradient must not get a
    basis of round-off, and must not wait for the next refresh when its gradient comes.
    """
    block, frame = item.splits[index]
    name = (item.name, index)
    if item.count < 0:
        return [Phase.WAITING] * block.count
    has_numbers = item.grad.device.type != "meta"  # without numbers, all matrices begin together
    if (block.total == 1 and len(item.splits) == 1) or name in begun or not frame.slots or not has_numbers:
        return [Phase.BEGUN if item.count else Phase.FIRST] * block.count
    moved = item.grads[index].flatten(1).any(1)
    has = torch.zeros_like(moved)
    if item.count:
        for key in frame.slots:
            value = lowbit.whole(item.state[state_key(block, key)])
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


def matrices_at_once(item: Work, block: Block, options: Options) -> int:
    """The largest number of matrices in a stack. `batch_bytes` limits it and, on a CPU, the cache."""
    if options.stacking == "never":
        return 1
    entries = block.rows * block.cols
    most = options.batch_bytes // (entries * item.row.compute_dtype.itemsize)
    if options.stacking == "auto" and item.param.device.type == "cpu":
        most = min(most, CACHED // entries)
    return max(1, most)
