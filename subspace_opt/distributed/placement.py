"""Where the parts of a model lie and who computes them, on several ranks: shares, owners, messages. Pure; no torch.distributed.

    a rank's shard of a parameter      a box of it
    a part                             the matrices that one rank computes, a box of the parameter too
    a message                          the intersection of a shard and a part, from the rank that has it to the rank that needs it

Every rank finds the same layout from names, shapes and placements alone, so nothing has to be agreed on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple

from ..algebra.frame import Frame
from ..engine import strategies
from ..plan import COUNTERS, Row
from .boxes import Box, Cut, box_holders, chunk, full_box, owner_order, replica_index
from .parts import Part, cut_runs, is_elementwise, run_axis, view_of

Way = Literal["incoming", "outgoing", "copies", "projected", "lifted"]


class Message(NamedTuple):
    """A box of item `item` that rank `source` sends to rank `target`."""

    source: int
    target: int
    item: int
    box: Box


@dataclass(frozen=True)
class Share:
    """One parameter on the ranks of its team."""

    row: Row
    boxes: tuple[Box, ...]  # the shard of each rank
    parts: tuple[Part, ...]
    cuts: tuple[Cut | None, ...] = ()  # of each dimension of the mesh; none where the parameter is whole on all ranks
    along: int | None = None  # the dimension of a basis that is cut as the weight is, where only coordinates travel between refreshes

    @cached_property
    def resident(self) -> bool:
        """Whether owners hold the weights of their part, and update them in place."""
        return all(self.boxes[owner].contains(part.box) for part in self.parts for owner in part.owners)

    @cached_property
    def _parts_of(self) -> dict[int, Part]:
        return {owner: part for part in reversed(self.parts) for owner in part.owners}

    @cached_property
    def local(self) -> bool:
        """Whether nothing travels: every rank updates its own shard."""
        return self.resident and not any(True for _ in self.outgoing(0))

    def part_of(self, rank: int) -> Part | None:
        """What a rank computes."""
        return self._parts_of.get(rank)

    def state_box(self, key: str, rank: int) -> Box | None:
        """Where a rank's part of a slot lies in that of the parameter; None if it has none."""
        if key == "compensation" and not self.resident:
            box = self.boxes[rank]  # of the weights, which stay where they are
            return box if box.numel else None
        if key == BASIS and self.along is not None:
            low, high = self.boxes[rank].start[self.along], self.boxes[rank].stop[self.along]
            return Box((low, 0), (high, self.row.state[key][0][1])) if self.boxes[rank].numel else None
        part = self.part_of(rank)
        return None if part is None else part.state[key]

    @property
    def coordinates(self) -> Box:
        """All coordinates of a parameter that is cut along its basis."""
        split = self.row.splits[0][1]
        return full_box((split.inner[0].size, split.inner[1].size))

    def projected(self, item: int) -> Iterator[Message]:
        """Coordinates of the shards, to be summed on the owner; their box is that of coordinates."""
        owner = self.parts[0].owners[0]
        for _, holders in self._distinct:
            yield Message(self._near(owner, holders), owner, item, self.coordinates)

    def lifted(self, item: int) -> Iterator[Message]:
        """Updated coordinates from the owner to all that hold a shard."""
        for rank, box in enumerate(self.boxes):
            if box.numel:
                yield Message(self.parts[0].owners[0], rank, item, self.coordinates)

    def incoming(self, item: int) -> Iterator[Message]:
        """Gradients from the shards to the owners."""
        if self.resident:
            return
        for part, (box, holders) in itertools.product(self.parts, self._distinct):
            both = part.box.intersection(box)
            if both is not None:
                for owner in part.owners:
                    yield Message(self._near(owner, holders), owner, item, both)

    def outgoing(self, item: int) -> Iterator[Message]:
        """Updates from the owners to their own copy of the shards; or new weights, where owners have them, to all that hold a shard."""
        for part in self.parts:
            if self.resident:
                for rank, box in enumerate(self.boxes):
                    both = None if rank in part.owners else part.box.intersection(box)
                    if both is not None:
                        yield Message(part.owners[0], rank, item, both)
                continue
            for box, holders in self._distinct:
                both = part.box.intersection(box)
                if both is not None:
                    yield Message(part.owners[0], self._near(part.owners[0], holders), item, both)

    def copies(self, item: int) -> Iterator[Message]:
        """Updates from the shards that have them to the copies of these shards: an owner need not send to each copy."""
        if self.resident:
            return
        for part, (box, holders) in itertools.product(self.parts, self._distinct):
            both = part.box.intersection(box)
            if both is not None:
                near = self._near(part.owners[0], holders)
                yield from (Message(near, rank, item, both) for rank in holders if rank != near)

    @cached_property
    def replica_index(self) -> tuple[int, ...]:
        """`copy_of` these boxes; found once, since to look it up among thousands of boxes takes as long as to find it."""
        return replica_index(self.boxes)

    @cached_property
    def _distinct(self) -> tuple[tuple[Box, tuple[int, ...]], ...]:
        return box_holders(self.boxes)

    def _near(self, owner: int, holders: tuple[int, ...]) -> int:
        """Of the ranks that hold a shard, the one that stands among copies where the owner does."""
        return holders[self.replica_index[owner] % len(holders)]

    @cached_property
    def _told(self) -> dict[tuple[Way, int], tuple[tuple[Message, ...], bool]]:
        return {}

    def messages(self, way: Way, rank: int) -> tuple[tuple[Message, ...], bool]:
        """Of one kind, the messages that a rank sends or receives, as of item 0, and whether any rank sends one to another.

        They are kept: on thousands of ranks it takes long to go through those of all.
        """
        key = (way, rank)
        if key not in self._told:
            travels, own = False, []
            for message in getattr(self, way)(0):
                travels = travels or message.source != message.target
                if rank in (message.source, message.target):
                    own.append(message)
            self._told[key] = tuple(own), travels
        return self._told[key]

    def bytes_held(self, rank: int) -> int:
        """State that a rank keeps once the parameter has had a gradient."""
        if self.row.entry.frozen or not self.row.entry.numel:
            return self.row.state_bytes
        part, total = self.part_of(rank), 0
        for key, (_, dtype) in self.row.state.items():
            box = None if key in COUNTERS else self.state_box(key, rank)
            how = None if part is None else part.row.codes.get(key)
            if how is not None and box is not None:
                total += how.nbytes(box.numel)
            else:
                total += dtype.itemsize * (1 if key in COUNTERS else 0 if box is None else box.numel)
        return total

    def bytes_sent(self, rank: int, refresh: bool = False) -> int:
        """What a rank sends in one step, itself left out; a refresh of a basis that is cut as the weight is sends the basis besides."""
        if self.row.entry.frozen:
            return 0
        grad = self.row.entry.dtype.itemsize
        there = grad if self.resident else self.row.compute_dtype.itemsize
        if self.along is not None and not refresh:
            both = itertools.chain(self.projected(0), self.lifted(0))
            return sum(m.box.numel * there for m in both if m.source == rank != m.target)
        weights = 2 if any(split.needs_weight for _, split in self.row.splits) else 1
        inbound = sum(m.box.numel * grad * weights for m in self.incoming(0) if m.source == rank != m.target)
        if self.along is not None:
            inbound += self.basis_sent.get(rank, 0) * self.row.compute_dtype.itemsize
        outbound = itertools.chain(self.outgoing(0), self.copies(0))
        return inbound + sum(m.box.numel * there for m in outbound if m.source == rank != m.target)

    @cached_property
    def basis_sent(self) -> dict[int, int]:
        """Entries of a basis that ranks send at a refresh: their rows to the owner, and those of all others from the owner."""
        owner = self.parts[0].owners[0]
        rows = [self.state_box(BASIS, rank) for rank in range(len(self.boxes))]
        out = {holders[0]: box.numel for box, holders in box_holders(tuple(box or full_box((0,)) for box in rows)) if rows[owner] != box}
        out[owner] = sum(box.numel for rank, box in enumerate(rows) if box is not None and rank != owner)
        return out


@dataclass
class Layout:
    """Shares of one team of ranks. `loads`: bytes of state that each rank owns so far, by which the next owner is chosen."""

    ranks: int
    divided: bool = False  # the parameters are whole on all ranks, and the state is divided all the same
    loads: list[int] = field(default_factory=list)
    splits: dict[tuple[int, int, int], Frame] = field(default_factory=dict)  # of cuts, by pipeline and shape

    def __post_init__(self) -> None:
        self.loads = self.loads or [0] * self.ranks

    def add(self, rows: Sequence[Row], boxes: Sequence[tuple[Box, ...]], cuts: Sequence[tuple[Cut | None, ...]]) -> list[Share]:
        """The shares of more parameters, largest first to the rank with the least; those that are there already stay."""
        shares: dict[int, Share] = {}
        for i in sorted(range(len(rows)), key=lambda i: (-_bytes(rows[i]), rows[i].entry.name)):
            share = Share(rows[i], boxes[i], tuple(self._parts(rows[i], boxes[i])), cuts[i])
            share = shares[i] = replace(share, along=_along(share))
            add_state(self.loads, share)
        return [shares[i] for i in range(len(rows))]

    def _parts(self, row: Row, boxes: tuple[Box, ...]) -> Iterator[Part]:
        if not row.entry.numel:
            return
        if is_elementwise(row) and self.divided:
            along = max(range(len(row.entry.shape)), key=lambda d: row.entry.shape[d], default=None)
            if along is not None:
                pieces = [chunk(full_box(row.entry.shape), along, self.ranks, i) for i in range(self.ranks)]
                if all(view_of(row, piece) for piece in pieces if piece.numel):
                    yield from (self._part(row, piece, (rank,)) for rank, piece in enumerate(pieces) if piece.numel)
                    return
        elif is_elementwise(row) and all(view_of(row, box) for box, _ in box_holders(boxes)):
            yield from (self._part(row, box, holders) for box, holders in box_holders(boxes))
            return
        runs = list(cut_runs(row, self._cuts_of(row, boxes)))
        # Where a rank has all of a run, the run is its own: nothing has to travel to it.
        turn = owner_order(boxes)
        least = sorted(range(self.ranks), key=lambda rank: (self.loads[rank], turn[rank]))
        free = iter(least)
        taken: set[int] = set()
        place = {rank: i for i, rank in enumerate(least)}
        held = box_holders(boxes)
        for box in runs:
            holders = [rank for whose, ranks in held if whose.contains(box) for rank in ranks if rank not in taken]
            owner = min(holders, key=place.__getitem__) if holders else next(rank for rank in free if rank not in taken)
            taken.add(owner)
            yield self._part(row, box, (owner,))

    def _cuts_of(self, row: Row, boxes: tuple[Box, ...]) -> list[int]:
        """How many matrices, or heads, each run has: those of the shards where these hold whole ones, else as equal as they come."""
        axis, size, count = run_axis(row)
        if count == 1:
            return [1]
        ranges = sorted({(box.start[axis], box.stop[axis]) for box in boxes if box.numel})
        rest = all(box.start[d] == 0 and box.stop[d] == n for box in boxes if box.numel for d, n in enumerate(row.entry.shape) if d != axis)
        apart = all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        if rest and apart and len(ranges) > 1 and all(low % size == 0 and high % size == 0 for low, high in ranges):
            return [(high - low) // size for low, high in ranges]
        each = -(-count // self.ranks)
        return [min(each, count - first) for first in range(0, count, each)]

    def _part(self, row: Row, box: Box, owners: tuple[int, ...]) -> Part:
        return Part(box, owners, row, self.splits)


BASIS = "selector.basis"


def _along(share: Share) -> int | None:
    """The dimension of a matrix along which both its basis and its shards are cut, if it saves bytes to send coordinates alone."""
    row = share.row
    if share.resident or len(share.parts) != 1 or len(row.splits) != 1 or row.splits[0][0].count != 1 or len(row.entry.shape) != 2:
        return None
    block, split = row.splits[0]
    if block.name or not strategies.is_in_coordinates(split):
        return None
    along = 0 if split.turned != row.view.transposed else 1  # where the columns of the working orientation are stored
    held = [box for box in share.boxes if box.numel]
    if any(box.shape[1 - along] != row.entry.shape[1 - along] for box in held):
        return None
    if row.entry.frozen:
        return None
    plain = _size(share.incoming(0)) * row.entry.dtype.itemsize + _size(share.outgoing(0)) * row.compute_dtype.itemsize
    thin = _size(itertools.chain(share.projected(0), share.lifted(0))) * row.compute_dtype.itemsize
    return along if thin < plain else None


def _size(messages: Iterable[Message]) -> int:
    """Entries that leave a rank."""
    return sum(message.box.numel for message in messages if message.source != message.target)


def _bytes(row: Row) -> int:
    """State of a parameter, frozen or not: it may be thawed, and the layout must not move then."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in row.state.values())


def add_state(loads: list[int], share: Share) -> None:
    """Add what each rank keeps of a share, counters left out and codes counted as what they stand for."""
    # These lie with the weights and not with the owner.
    scattered = [key for key in ("compensation", BASIS) if key in share.row.state and not share.resident]
    scattered = [key for key in scattered if key != BASIS or share.along is not None]
    # Entry by entry there is a number for each of the box; thousands of parts are counted without their boxes of state.
    entry = sum(dtype.itemsize for key, (_, dtype) in share.row.state.items() if key not in COUNTERS) if is_elementwise(share.row) else None
    for part in share.parts:
        own = part.state_bytes if entry is None else part.box.numel * entry
        own -= sum(part.state[key].numel * share.row.state[key][1].itemsize for key in scattered)
        for owner in part.owners:
            loads[owner] += own
    for key in scattered:
        for rank in range(len(share.boxes)):
            box = share.state_box(key, rank)
            loads[rank] += 0 if box is None else box.numel * share.row.state[key][1].itemsize
