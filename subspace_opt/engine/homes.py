"""The storage of state: matrices that are computed together share one tensor a slot, and every parameter holds a view of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..algebra.core import State
from ..plan import state_key
from .flags.gate import gated
from .flags.watch import Watch
from .work import Options, Piece, Stack

MOST_INDICES = 64  # for one home, so that memory does not grow with the steps


@dataclass
class Home:
    """The state of pieces that are computed together, one tensor a slot. `views`: the parts that the parameters hold."""

    places: dict[tuple[str, int], int]  # (parameter, block) -> first matrix
    slots: State
    views: dict[tuple[str, int], dict[str, Tensor]]
    indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # by matrices, on the device

    def holds(self, piece: Piece) -> bool:
        """True if the piece's state is still a view of this home; loading a checkpoint replaces it."""
        views = self.views.get((piece.work.name, piece.index))
        return views is not None and all(piece.stored(key) is view for key, view in views.items())


@dataclass
class Memory:
    """A cache between steps, beside the state. Losing it changes no result."""

    tables: dict[Any, Tensor] = field(default_factory=dict)  # shared by matrices; by name, device and dtype
    begun: set[tuple[str, int]] = field(default_factory=set)  # (parameter, block) all of whose matrices have begun
    homes: dict[Any, list[Home]] = field(default_factory=dict)  # by pipeline and shape, device and dtype
    counts: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)  # parameter -> counter, version of that tensor, value
    marks: dict[str, tuple[Tensor, int, int]] = field(default_factory=dict)  # the same for the update of the last refresh
    captured: tuple[str, ...] = ()  # parameters that the last captured step updates
    watch: Watch = field(default_factory=Watch)  # flags that the host has not read; losing them loses their errors

    @classmethod
    def of(cls, options: Options) -> Memory:
        """An empty one."""
        made = cls()
        made.watch.capturable = options.capturable
        return made

    def forget_counts(self) -> None:
        """Make the next step read the counters in the state."""
        self.counts.clear()
        self.marks.clear()


def gather(stack: Stack, memory: Memory) -> tuple[State, bool]:
    """The state of a stack, `(B, *dims)` a slot, in the dtype of computation.

    The second result is True if all of it is the stored state itself, so that a rule may write its new state over it.
    """
    home, where = _located(stack, memory)
    kept_here = not stack.frame.wanted and where is None and (home is not None or len(stack.pieces) == 1)
    out: State = {}
    for key, slot in stack.frame.slots.items():
        if home is None:
            parts = [piece.slot(key) for piece in stack.pieces]
            value = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            kept = home.slots[key]
            value = kept if where is None else kept.index_select(0, where)
        out[key] = value.to(slot.dtype or stack.dtype)
        kept_here = kept_here and out[key] is value
    return out, kept_here


def scatter(stack: Stack, old: State, new: State, memory: Memory) -> None:
    """Copy every slot that changed back to its storage, in its own dtype."""
    changed = {key: new[key] for key in stack.frame.slots if new[key] is not old[key]}
    if not changed:  # the rules have written over the stored state
        return
    home, where = _located(stack, memory)
    given = {id(_storage_of(value)) for value in old.values()}
    # A rule may return an old slot under another name (a history of gradients), and that storage is about to be overwritten.
    apart = {key: v.clone() if id(_storage_of(v)) in given else v for key, v in changed.items()}
    for key, value in apart.items():
        if home is None:
            gates = [stack.gate] * len(stack.pieces) if stack.gate is None or stack.gate.dim() == 0 else stack.gate.split(stack.sizes)
            for piece, part, gate in zip(stack.pieces, value.split(stack.sizes), gates, strict=True):
                piece.put(key, part, gate)
        elif where is None:
            kept = home.slots[key]
            kept.copy_(value if stack.gate is None else gated(stack.gate, value, kept))
        else:
            kept = home.slots[key]
            value = value.to(kept.dtype)
            kept.index_copy_(0, where, value if stack.gate is None else gated(stack.gate, value, kept.index_select(0, where)))


def _storage_of(value: Tensor) -> Tensor:
    """The base of a view."""
    return value if value._base is None else value._base


def _located(stack: Stack, memory: Memory) -> tuple[Home | None, Tensor | None]:
    """The home of a stack and the indices of its matrices there, None for all in order. A single piece needs no home."""
    first = stack.pieces[0]
    if not stack.frame.slots or len(stack.pieces) == 1:
        return None, None
    if stack.frame.codes:
        return None, None  # reading codes copies anyway, and a home would have to keep whole blocks together
    if not all(piece.whole for piece in stack.pieces):
        return None, None
    # The key is not the frame itself: a new plan makes new frames, and homes of old frames would never be freed. Other stacks may have the
    # same key; a home recognises its own by their views.
    frame = stack.frame
    key = (first.work.row.pipeline, frame.rows, frame.cols, frame.turned, first.work.param.device, stack.dtype)
    homes = memory.homes.setdefault(key, [])
    for home in homes:
        if all(home.holds(piece) for piece in stack.pieces):
            return home, _places(home, stack)
    names = {(piece.work.name, piece.index) for piece in stack.pieces}
    partly = [home for home in homes if any(home.holds(piece) for piece in stack.pieces)]
    if any(not home.places.keys() <= names for home in partly):
        return None, None  # they share a home with pieces of other stacks: gathered one by one
    for home in partly:
        homes.remove(home)
    homes.append(_moved_in(stack))
    return homes[-1], None


def _places(home: Home, stack: Stack) -> Tensor | None:
    starts = [home.places[(piece.work.name, piece.index)] for piece in stack.pieces]
    if len(starts) == len(home.places) and starts == sorted(starts):
        return None
    index = tuple(i for start, piece in zip(starts, stack.pieces, strict=True) for i in range(start, start + piece.size))
    if index not in home.indices:
        if len(home.indices) >= MOST_INDICES:
            home.indices.clear()
        home.indices[index] = torch.tensor(index, device=stack.pieces[0].work.param.device)
    return home.indices[index]


def _moved_in(stack: Stack) -> Home:
    """Make a home for these pieces: copy their state into one tensor a slot and give them views of it."""
    home = Home({}, {}, {})
    start = 0
    for piece in stack.pieces:
        name = (piece.work.name, piece.index)
        home.places[name], home.views[name] = start, {}
        start += piece.size
    for key in stack.frame.slots:
        whole = home.slots[key] = torch.cat([piece.slot(key) for piece in stack.pieces])
        for piece in stack.pieces:
            name = (piece.work.name, piece.index)
            here = home.places[name]
            view = whole[here] if piece.block.count == 1 else whole[here : here + piece.size]
            home.views[name][key] = piece.work.state[state_key(piece.block, key)] = view
    return home
