"""Which matrices are computed together, and where their state is kept: in one tensor a slot, of which every parameter holds a view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor

from ..algebra import State
from ..algebra.frame import Split
from ..plan import state_key
from ..plan.views import Block
from . import lowbit
from .work import Options, Phase, Piece, Stack, Work

CACHED = 400_000  # entries of a stack on a CPU: one calls less often, but what leaves the cache costs more than it saves
PASS = 2**17  # entries of a matrix that are updated together where each is updated by itself: they stay in the cache
ROWS = 2**18  # the same where each row is: their number of calls grows, and so products must not be too small
LONG = 8 * ROWS  # entries from which a matrix is cut so


@dataclass
class Home:
    """The state of pieces that are computed together, one tensor a slot. `views` are what the parameters hold of it."""

    places: dict[tuple[str, int], int]  # (parameter, block) -> first matrix
    slots: State
    views: dict[tuple[str, int], dict[str, Tensor]]

    def holds(self, piece: Piece) -> bool:
        """Whether the piece's state is still a view of this home: loading a checkpoint puts other tensors there."""
        views = self.views.get((piece.work.name, piece.index))
        return views is not None and all(piece.stored(key) is view for key, view in views.items())


@dataclass
class Memory:
    """What is kept between steps beside the state; all of it can be lost, and is found again."""

    tables: dict[Any, Tensor] = field(default_factory=dict)  # shared by matrices; by name, device and dtype
    begun: set[tuple[str, int]] = field(default_factory=set)  # (parameter, block) all of whose matrices have begun
    homes: dict[Any, list[Home]] = field(default_factory=dict)  # by pipeline and shape, device and dtype
    counts: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)  # parameter -> its counter, that's version, its value


# ----------------------------------------------------------------------------------------------------------------------- stacks


def stacks(work: list[Work], options: Options, memory: Memory) -> Iterator[Stack]:
    """All pieces, those together that may be, cut so that temporaries stay small."""
    for stack in _grouped(work, options, memory):
        yield from _in_passes(stack, options)


def _grouped(work: list[Work], options: Options, memory: Memory) -> Iterator[Stack]:
    """Pieces that may be computed together, so many that one temporary of a stack stays within bounds.

    Where stacks are cut does not hang on who refreshes at this step: those that do not stay with the state they share.
    """
    found: dict[Any, Stack] = {}
    filled: dict[Any, tuple[int, int]] = {}  # per kind the last stack's number, and how many matrices it has
    for item in work:
        for index, (block, split) in enumerate(item.row.splits):
            most = matrices_at_once(item, block, options)
            kind = (id(split), item.row.compute_dtype, item.param.device, most)
            decay = item.weight_decay if split.pipeline.decay == "coupled" else None  # then rules see it
            for phase, start, stop in _runs(_phases(item, index, memory.begun), most):
                number, size = filled.get(kind, (0, 0))
                number, size = (number, size + stop - start) if size + stop - start <= most else (number + 1, stop - start)
                filled[kind] = number, size
                refresh = due(item, split, phase)
                last = None if refresh else refreshed(item)  # bias correction counts from there
                key = (kind, number, phase, refresh, last, item.count, decay)
                found.setdefault(key, Stack(split, phase, refresh, [])).pieces.append(Piece(item, index, start, stop))
    yield from found.values()


def _in_passes(stack: Stack, options: Options) -> Iterator[Stack]:
    """A large matrix whose entries, or rows, are updated each by itself, such as an embedding, in runs of rows: temporaries stay small.

    Not on a GPU, where bytes are cheap and launches dear, and not where rounding draws a whole matrix at once.
    """
    piece = stack.pieces[0]
    rows, cols = piece.block.rows, piece.block.cols
    alone = len(stack.pieces) == 1 and piece.size == 1 and piece.work.param.device.type == "cpu"
    split, entries = stack.split, rows * cols
    free = split.elementwise and entries > PASS
    by_rows = split.by_rows and entries > LONG and not stack.refresh and not split.codes
    if not alone or not (free or by_rows) or options.rounding == "stochastic":
        yield stack
        return
    # Codes are read and written by whole blocks.
    whole = lcm(1, *(how.block // gcd(how.block, cols) for how in split.codes.values()))
    run = max(1, (PASS if free else ROWS) // cols // whole) * whole
    for first in range(0, rows, run):
        yield Stack(stack.split, stack.phase, stack.refresh, [replace(piece, rows=(first, min(first + run, rows)))])


def due(item: Work, split: Split, phase: Phase) -> bool:
    """Whether a new basis is taken now."""
    if not split.opens or phase is Phase.WAITING:
        return False
    return phase is Phase.FIRST or item.refresh or split.pipeline.selector.refreshes(counted(item, split), item.row.turn)


def refreshed(item: Work) -> int | None:
    """The update at which the last basis was taken, where something began anew with it."""
    return int(item.state["refreshed"].item()) if "refreshed" in item.state else None


def counted(item: Work, split: Split) -> int:
    """The number of this update; where the first gradient only sets the basis, updates are counted from the second."""
    return item.count if split.primes else item.count + 1


def _phases(item: Work, index: int, begun: set[tuple[str, int]]) -> list[Phase]:
    """The phase of every matrix of a block.

    Matrices of one parameter, such as experts, may get their first gradient at different times: one without must not be given a basis of
    round-off, nor wait for the next refresh when its gradient comes.
    """
    block, split = item.row.splits[index]
    name = (item.name, index)
    if item.count < 0:
        return [Phase.WAITING] * block.count
    if (block.total == 1 and len(item.row.splits) == 1) or name in begun or not split.slots:
        return [Phase.BEGUN if item.count else Phase.FIRST] * block.count
    moved = item.grads[index].flatten(1).any(1)
    has = torch.zeros_like(moved)
    if item.count:
        for key in split.slots:
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
    """As many as `batch_bytes` allows; on a CPU, which runs large matrices faster one by one, as many as its cache holds."""
    if options.stacking == "never":
        return 1
    entries = block.rows * block.cols
    most = options.batch_bytes // (entries * item.row.compute_dtype.itemsize)
    if options.stacking == "auto" and item.param.device.type == "cpu":
        most = min(most, CACHED // entries)
    return max(1, most)


# ------------------------------------------------------------------------------------------------------------------------ state


def gather(stack: Stack, options: Options, memory: Memory) -> tuple[State, bool]:
    """The state of a stack, `(B, *dims)` a slot in the dtype of computation, and whether all of it is where it is kept: a view of the
    stack's home, or of the one piece's own tensors. What is written to it is then kept.
    """
    home, where = _located(stack, options, memory)
    kept_here = not stack.split.wanted and where is None and (home is not None or len(stack.pieces) == 1)
    out: State = {}
    for key, slot in stack.split.slots.items():
        if home is None:
            parts = [piece.slot(key) for piece in stack.pieces]
            value = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            kept = home.slots[key]
            value = kept if where is None else kept.index_select(0, where)
        out[key] = value.to(slot.dtype or stack.dtype)
        kept_here = kept_here and out[key] is value
    return out, kept_here


def scatter(stack: Stack, old: State, new: State, options: Options, memory: Memory) -> None:
    """Every slot that changed back to where it is kept, in its own dtype."""
    changed = {key: new[key] for key in stack.split.slots if new[key] is not old[key]}
    if not changed:  # it has been written in its place
        return
    home, where = _located(stack, options, memory)
    given = {id(_storage_of(value)) for value in old.values()}
    # What a rule was given it may hand on in another slot (a history of gradients), and that storage is about to be written.
    apart = {key: v.clone() if id(_storage_of(v)) in given else v for key, v in changed.items()}
    for key, value in apart.items():
        if home is None:
            for piece, part in zip(stack.pieces, value.split(stack.sizes), strict=True):
                piece.put(key, part)
        elif where is None:
            home.slots[key].copy_(value)
        else:
            kept = home.slots[key]
            kept.index_copy_(0, where, value.to(kept.dtype))


def _storage_of(value: Tensor) -> Tensor:
    """The tensor that a view is of."""
    return value if value._base is None else value._base


def _located(stack: Stack, options: Options, memory: Memory) -> tuple[Home | None, Tensor | None]:
    """The home of a stack and the places of its matrices there, None for all of them in order. A single piece has no need of one."""
    first = stack.pieces[0]
    if not stack.split.slots or len(stack.pieces) == 1:
        return None, None
    if stack.split.codes:
        return None, None  # what is gathered is a copy all the same, and a home would have to keep whole blocks together
    if not all(piece.whole for piece in stack.pieces):
        return None, None
    # Not the split itself, which a new plan makes anew: homes under an old one would be kept, and found by nobody. What else is of the
    # same key does no harm, as a home is known by the views that it gave.
    split = stack.split
    key = (first.work.row.pipeline, split.rows, split.cols, split.turned, first.work.param.device, stack.dtype)
    homes = memory.homes.setdefault(key, [])
    for home in homes:
        if all(home.holds(piece) for piece in stack.pieces):
            return home, _places(home, stack)
    names = {(piece.work.name, piece.index) for piece in stack.pieces}
    partly = [home for home in homes if any(home.holds(piece) for piece in stack.pieces)]
    if any(not home.places.keys() <= names for home in partly):
        return None, None  # pieces of homes that others live in as well: gathered one by one
    for home in partly:
        homes.remove(home)
    homes.append(_moved_in(stack))
    return homes[-1], None


def _places(home: Home, stack: Stack) -> Tensor | None:
    starts = [home.places[(piece.work.name, piece.index)] for piece in stack.pieces]
    if len(starts) == len(home.places) and starts == sorted(starts):
        return None
    index = [i for start, piece in zip(starts, stack.pieces, strict=True) for i in range(start, start + piece.size)]
    return torch.tensor(index, device=stack.pieces[0].work.param.device)


def _moved_in(stack: Stack) -> Home:
    """A home for these pieces: their state is copied into one tensor a slot, and they get views of it."""
    home = Home({}, {}, {})
    start = 0
    for piece in stack.pieces:
        name = (piece.work.name, piece.index)
        home.places[name], home.views[name] = start, {}
        start += piece.size
    for key in stack.split.slots:
        whole = home.slots[key] = torch.cat([piece.slot(key) for piece in stack.pieces])
        for piece in stack.pieces:
            name = (piece.work.name, piece.index)
            here = home.places[name]
            view = whole[here] if piece.block.count == 1 else whole[here : here + piece.size]
            home.views[name][key] = piece.work.state[state_key(piece.block, key)] = view
    return home
