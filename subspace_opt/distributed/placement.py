"""Owners of parts, messages of a step, and bytes of each rank. Pure functions of shapes; nothing here needs torch.distributed.

    shard      the box of a parameter that a rank holds
    part       the box of a parameter whose update a rank computes; that rank is its owner
    message    the intersection of a shard and a part, sent from the rank that has it to the rank that needs it

Every rank computes the same layout from names, shapes and placements, so the ranks exchange nothing to agree on it.
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
from .parts import Part, box_in_view, bytes_to_owner, is_elementwise, matrix_axis, run_boxes

MessageKind = Literal["gradient", "update", "replica", "projection", "lift"]
BASIS = "selector.basis"


class Message(NamedTuple):
    """A box of a tensor that rank `source` sends to rank `target`."""

    source: int
    target: int
    box: Box
    tensor_index: int = 0  # the position of the tensor among those of one exchange


@dataclass(frozen=True)
class Sharding:
    """One parameter on the ranks of its group: shards, parts, and the messages between them."""

    row: Row
    boxes: tuple[Box, ...]  # the shard of each rank
    parts: tuple[Part, ...]
    cuts: tuple[Cut | None, ...] = ()  # one for each dimension of the mesh; empty if every rank holds the whole parameter
    basis_dim: int | None = (
        None  # cut like the basis, so that only coordinates are sent between refreshes; None if every step sends gradients
    )

    @cached_property
    def updates_in_place(self) -> bool:
        """True if every owner holds the weights of its part: it then updates them in place and sends new weights instead of updates."""
        return all(self.boxes[owner].contains(part.box) for part in self.parts for owner in part.owners)

    @cached_property
    def is_local(self) -> bool:
        """True if every rank updates its own shard and no rank sends anything."""
        return self.updates_in_place and not any(True for _ in self.update_messages())

    @cached_property
    def _parts_by_rank(self) -> dict[int, Part]:
        return {owner: part for part in reversed(self.parts) for owner in part.owners}

    def part_of(self, rank: int) -> Part | None:
        """The part that a rank computes; None if it computes none."""
        return self._parts_by_rank.get(rank)

    def state_box(self, key: str, rank: int) -> Box | None:
        """The box of a slot that a rank keeps, in the slot of the whole parameter; None if the rank keeps none."""
        if key == "compensation" and not self.updates_in_place:  # Kahan compensation belongs to the weights, which stay with their shard
            box = self.boxes[rank]
            return box if box.numel else None
        if key == BASIS and self.basis_dim is not None:
            low, high = self.boxes[rank].start[self.basis_dim], self.boxes[rank].stop[self.basis_dim]
            return Box((low, 0), (high, self.row.state[key][0][1])) if self.boxes[rank].numel else None
        part = self.part_of(rank)
        return None if part is None else part.state[key]

    # ------------------------------------------------------------------------------------------------------------ messages

    @property
    def coordinates(self) -> Box:
        """The full box of the coordinates, `(m, r)`, if the parameter is cut along its basis."""
        frame = self.row.splits[0][1]
        return full_box((frame.inner[0].size, frame.inner[1].size))

    def gradient_messages(self) -> Iterator[Message]:
        """Gradients from shards to owners."""
        if self.updates_in_place:
            return
        for part, (box, holders) in itertools.product(self.parts, self._holders):
            both = part.box.intersection(box)
            if both is not None:
                for owner in part.owners:
                    yield Message(self._holder_near(owner, holders), owner, both)

    def update_messages(self) -> Iterator[Message]:
        """Updates from each owner to one replica of each shard; with `updates_in_place`, new weights to every rank that holds a shard."""
        for part in self.parts:
            if self.updates_in_place:
                for rank, box in enumerate(self.boxes):
                    both = None if rank in part.owners else part.box.intersection(box)
                    if both is not None:
                        yield Message(part.owners[0], rank, both)
                continue
            for box, holders in self._holders:
                both = part.box.intersection(box)
                if both is not None:
                    yield Message(part.owners[0], self._holder_near(part.owners[0], holders), both)

    def replica_messages(self) -> Iterator[Message]:
        """Updates from the replica that received them to the other replicas of the shard, so that an owner sends each update once."""
        if self.updates_in_place:
            return
        for part, (box, holders) in itertools.product(self.parts, self._holders):
            both = part.box.intersection(box)
            if both is not None:
                near = self._holder_near(part.owners[0], holders)
                yield from (Message(near, rank, both) for rank in holders if rank != near)

    def projection_messages(self) -> Iterator[Message]:
        """Coordinates of each shard, of which the owner takes the sum."""
        owner = self.parts[0].owners[0]
        for _, holders in self._holders:
            yield Message(self._holder_near(owner, holders), owner, self.coordinates)

    def lift_messages(self) -> Iterator[Message]:
        """Updated coordinates from the owner to every rank that holds a shard."""
        for rank, box in enumerate(self.boxes):
            if box.numel:
                yield Message(self.parts[0].owners[0], rank, self.coordinates)

    @cached_property
    def replica_index(self) -> tuple[int, ...]:
        """`boxes.replica_index` of these boxes. Cached here, because a cache keyed by thousands of boxes is as slow as the computation."""
        return replica_index(self.boxes)

    @cached_property
    def _holders(self) -> tuple[tuple[Box, tuple[int, ...]], ...]:
        return box_holders(self.boxes)

    def _holder_near(self, owner: int, holders: tuple[int, ...]) -> int:
        """The holder of a shard with the owner's replica index, so that messages stay within one replica of the model."""
        return holders[self.replica_index[owner] % len(holders)]

    @cached_property
    def _messages_by_rank(self) -> dict[tuple[MessageKind, int], tuple[tuple[Message, ...], bool]]:
        return {}

    def messages(self, kind: MessageKind, rank: int) -> tuple[tuple[Message, ...], bool]:
        """The messages of one kind that a rank sends or receives, and whether any rank sends one to another rank.

        The result is kept, because on thousands of ranks it takes long to go through the messages of all.
        """
        key = (kind, rank)
        if key not in self._messages_by_rank:
            has_traffic, own = False, []
            for message in getattr(self, f"{kind}_messages")():
                has_traffic = has_traffic or message.source != message.target
                if rank in (message.source, message.target):
                    own.append(message)
            self._messages_by_rank[key] = tuple(own), has_traffic
        return self._messages_by_rank[key]

    # --------------------------------------------------------------------------------------------------------------- bytes

    def bytes_held(self, rank: int) -> int:
        """Bytes of state that a rank keeps once the parameter has had a gradient."""
        if self.row.entry.frozen or not self.row.entry.numel:
            return self.row.state_bytes
        part, total = self.part_of(rank), 0
        for key, (_, dtype) in self.row.state.items():
            if key in COUNTERS:
                total += dtype.itemsize
                continue
            box = self.state_box(key, rank)
            if box is not None:
                codes = None if part is None else part.row.codes.get(key)
                total += dtype.itemsize * box.numel if codes is None else codes.nbytes(box.numel)
        return total

    def bytes_sent(self, rank: int, *, refresh: bool = False) -> int:
        """Bytes that a rank sends to other ranks in one step. With `refresh`, count a step that refreshes the basis.

        A refresh matters only with `basis_dim`: the step then sends the gradient and the basis instead of coordinates.
        """
        if self.row.entry.frozen:
            return 0
        grad, compute = self.row.entry.dtype.itemsize, self.row.compute_dtype.itemsize
        if self.basis_dim is not None and not refresh:
            return compute * _entries_sent(itertools.chain(self.projection_messages(), self.lift_messages()), rank)
        sent = bytes_to_owner(self.row) * _entries_sent(self.gradient_messages(), rank)
        sent += (grad if self.updates_in_place else compute) * _entries_sent(self.update_messages(), rank)
        sent += compute * _entries_sent(self.replica_messages(), rank)
        return sent if self.basis_dim is None else sent + compute * self.basis_entries_sent.get(rank, 0)

    @cached_property
    def basis_entries_sent(self) -> dict[int, int]:
        """Entries of the basis that each rank sends at a refresh: its rows to the owner; the owner sends all other ranks theirs."""
        owner = self.parts[0].owners[0]
        rows = [self.state_box(BASIS, rank) for rank in range(len(self.boxes))]
        holders = box_holders(tuple(box or full_box((0,)) for box in rows))
        out = {ranks[0]: box.numel for box, ranks in holders if rows[owner] != box}
        out[owner] = sum(box.numel for rank, box in enumerate(rows) if box is not None and rank != owner)
        return out


def _entries_sent(messages: Iterable[Message], rank: int | None = None) -> int:
    """The entries that messages carry from one rank to another; with `rank`, those that this rank sends."""
    return sum(m.box.numel for m in messages if m.source != m.target and rank in (None, m.source))


# ------------------------------------------------------------------------------------------------------------------- owners


@dataclass
class Layout:
    """The shardings of one group of ranks. Owners are chosen so that all ranks keep about the same number of bytes of state."""

    ranks: int
    replicated: bool = False  # every rank holds the whole parameters (DDP), and the ranks divide work and state
    loads: list[int] = field(default_factory=list)  # bytes of state that each rank keeps so far
    frames: dict[tuple[int, int, int], Frame] = field(default_factory=dict)  # pipelines of pieces, by pipeline and shape

    def __post_init__(self) -> None:
        self.loads = self.loads or [0] * self.ranks

    def add(self, rows: Sequence[Row], boxes: Sequence[tuple[Box, ...]], cuts: Sequence[tuple[Cut | None, ...]]) -> list[Sharding]:
        """The shardings of more parameters, in their order. The parameter with the most state goes first, to the rank with the least.

        Parameters that were added before keep their owners.
        """
        found: dict[int, Sharding] = {}
        for i in sorted(range(len(rows)), key=lambda i: (-_state_bytes(rows[i]), rows[i].key)):
            sharding = Sharding(rows[i], boxes[i], tuple(self._parts(rows[i], boxes[i])), cuts[i])
            sharding = found[i] = replace(sharding, basis_dim=_find_basis_dim(sharding))
            add_state_bytes(self.loads, sharding)
        return [found[i] for i in range(len(rows))]

    def _parts(self, row: Row, boxes: tuple[Box, ...]) -> Iterator[Part]:
        if not row.entry.numel:
            return
        if is_elementwise(row):
            pieces = self._elementwise_pieces(row, boxes)
            if pieces is not None:
                yield from (Part(box, owners, row, self.frames) for box, owners in pieces)
                return
        order = owner_order(boxes)
        least = sorted(range(self.ranks), key=lambda rank: (self.loads[rank], order[rank]))
        place = {rank: i for i, rank in enumerate(least)}
        free = iter(least)
        taken: set[int] = set()
        held = box_holders(boxes)
        for box in run_boxes(row, self._run_sizes(row, boxes)):
            # A rank that holds all of a run becomes its owner, which saves the messages.
            holders = [rank for shard, ranks in held if shard.contains(box) for rank in ranks if rank not in taken]
            owner = min(holders, key=place.__getitem__) if holders else next(rank for rank in free if rank not in taken)
            taken.add(owner)
            yield Part(box, (owner,), row, self.frames)

    def _elementwise_pieces(self, row: Row, boxes: tuple[Box, ...]) -> Sequence[tuple[Box, tuple[int, ...]]] | None:
        """Boxes and owners of an elementwise parameter: the shards themselves, or equal chunks if it is replicated.

        None if one of them is not a box of the parameter's matrices.
        """
        pieces: Sequence[tuple[Box, tuple[int, ...]]] = box_holders(boxes)
        if self.replicated:
            if not row.entry.shape:
                return None
            dim = max(range(len(row.entry.shape)), key=lambda d: row.entry.shape[d])
            chunks = [chunk(full_box(row.entry.shape), dim, self.ranks, i) for i in range(self.ranks)]
            pieces = [(box, (rank,)) for rank, box in enumerate(chunks) if box.numel]
        return pieces if all(box_in_view(row, box) for box, _ in pieces) else None

    def _run_sizes(self, row: Row, boxes: tuple[Box, ...]) -> list[int]:
        """The number of matrices, or heads, in each run. Runs follow the shards if these hold whole matrices; otherwise they are equal."""
        axis, size, count = matrix_axis(row)
        if count == 1:
            return [1]
        held = [box for box in boxes if box.numel]
        ranges = sorted({(box.start[axis], box.stop[axis]) for box in held})
        other_dims_whole = all(box.start[d] == 0 and box.stop[d] == n for box in held for d, n in enumerate(row.entry.shape) if d != axis)
        disjoint = all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        if other_dims_whole and disjoint and len(ranges) > 1 and all(low % size == 0 and high % size == 0 for low, high in ranges):
            return [(high - low) // size for low, high in ranges]
        each = -(-count // self.ranks)
        return [min(each, count - first) for first in range(0, count, each)]


def _find_basis_dim(sharding: Sharding) -> int | None:
    """The dimension along which basis and shards are both cut, if sending only coordinates saves bytes; else None."""
    row = sharding.row
    if row.entry.frozen or sharding.updates_in_place or len(sharding.parts) != 1 or len(row.entry.shape) != 2:
        return None
    if len(row.splits) != 1 or row.splits[0][0].count != 1:
        return None
    block, frame = row.splits[0]
    if block.name or not strategies.is_in_coordinates(frame):
        return None
    dim = 0 if frame.turned != row.view.transposed else 1  # the stored dimension of the columns in the working orientation
    held = [box for box in sharding.boxes if box.numel]
    if any(box.shape[1 - dim] != row.entry.shape[1 - dim] for box in held):
        return None
    full = _entries_sent(sharding.gradient_messages()) * row.entry.dtype.itemsize
    full += _entries_sent(sharding.update_messages()) * row.compute_dtype.itemsize
    coordinates = _entries_sent(itertools.chain(sharding.projection_messages(), sharding.lift_messages()))
    return dim if coordinates * row.compute_dtype.itemsize < full else None


def _state_bytes(row: Row) -> int:
    """Bytes of state of a parameter, also of a frozen one: it may be unfrozen, and the owners must not change then."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in row.state.values())


def add_state_bytes(loads: list[int], sharding: Sharding) -> None:
    """Add the bytes of state that each rank keeps of a parameter to `loads`, in place.

    Counters do not count, and low-bit codes count as the numbers that they encode.
    """
    state = sharding.row.state
    with_shard = [key for key in ("compensation", BASIS) if key in state and not sharding.updates_in_place]  # kept by shards, not by owners
    with_shard = [key for key in with_shard if key != BASIS or sharding.basis_dim is not None]
    # Elementwise slots have one number an entry, so thousands of parts are counted without computing the boxes of their state.
    per_entry = sum(dtype.itemsize for key, (_, dtype) in state.items() if key not in COUNTERS) if is_elementwise(sharding.row) else None
    for part in sharding.parts:
        own = part.state_bytes if per_entry is None else part.box.numel * per_entry
        own -= sum(part.state[key].numel * state[key][1].itemsize for key in with_shard)
        for owner in part.owners:
            loads[owner] += own
    for key in with_shard:
        for rank in range(len(sharding.boxes)):
            box = sharding.state_box(key, rank)
            loads[rank] += 0 if box is None else box.numel * state[key][1].itemsize
