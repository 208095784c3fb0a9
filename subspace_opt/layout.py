"""Where the parts of a model lie and who computes them, on several ranks: boxes, parts, owners, messages. Pure; no torch.distributed.

    a rank's shard of a parameter      a box of it
    a part                             the matrices that one rank computes, a box of the parameter too
    a message                          the intersection of a shard and a part, from the rank that has it to the rank that needs it

Every rank finds the same layout from names, shapes and placements alone, so nothing has to be agreed on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from operator import sub
from typing import Literal, NamedTuple

from .plan import COUNTERS, Row, state_key
from .split import Split
from .views import View


class Box(NamedTuple):
    """A range of indices in each dimension of a tensor."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return prod(map(sub, self.stop, self.start))

    def common(self, other: Box) -> Box | None:
        """What two boxes share; None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def holds(self, other: Box) -> bool:
        return self == other or all(a <= c and d <= b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def within(self, frame: Box) -> tuple[slice, ...]:
        """Slices that cut this box out of a tensor that holds `frame`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, frame.start, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


class Cut(NamedTuple):
    """How one dimension of a mesh cuts a tensor; `strided`: after the dimensions to its right have cut (FSDP2 over tensor parallel)."""

    dim: int
    strided: bool = False


def shards(shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[Cut | None]) -> tuple[Box, ...]:
    """The box of each rank of a mesh, in row-major order of its coordinates: every cut makes chunks of ceil(size / ranks)."""
    return _shards(tuple(shape), tuple(mesh), tuple(cuts))


@lru_cache(maxsize=256)  # a model has hundreds of parameters and a dozen shapes
def _shards(shape: tuple[int, ...], mesh: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> tuple[Box, ...]:
    order = [i for i, cut in enumerate(cuts) if cut is not None and not cut.strided]
    order += [i for i, cut in reversed(list(enumerate(cuts))) if cut is not None and cut.strided]
    boxes = []
    for at in itertools.product(*map(range, mesh)):
        box = whole(shape)
        for axis in order:
            cut = cuts[axis]
            assert cut is not None
            box = chunk(box, cut.dim, mesh[axis], at[axis])
        boxes.append(box)
    return tuple(boxes)


def chunk(box: Box, dim: int, number: int, index: int) -> Box:
    """The `index`-th of `number` chunks of a box along one dimension, as `torch.chunk` makes them; the last may be empty."""
    first, last = box.start[dim], box.stop[dim]
    size = -(-(last - first) // number)
    low, high = min(first + index * size, last), min(first + (index + 1) * size, last)
    return Box((*box.start[:dim], low, *box.start[dim + 1 :]), (*box.stop[:dim], high, *box.stop[dim + 1 :]))


# ------------------------------------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True)
class Part:
    """A box of a parameter that `owners` compute (several only where each of them holds it anyway), and whose state they keep."""

    box: Box
    owners: tuple[int, ...]
    of: Row  # the parameter
    splits: dict[tuple[int, int, int], Split] = field(default_factory=dict, repr=False, compare=False)  # of the layout

    # Made when asked for: a rank needs those of its own part, and on thousands of ranks there are thousands of parts.
    @cached_property
    def row(self) -> Row:
        """The plan of the box alone."""
        return _row_of(self.of, self.box, self.splits)

    @cached_property
    def state(self) -> dict[str, Box]:
        """Of each slot, where the part's lies in that of the parameter."""
        return _state_boxes(self.of, self.box)

    @property
    def state_bytes(self) -> int:
        """What each owner keeps of it, counters left out."""
        return sum(box.numel * self.of.state[key][1].itemsize for key, box in self.state.items())

    @cached_property
    def matrices(self) -> tuple[Box, ...]:
        """Its experts or heads, or itself."""
        axis, length, count = _run_axis(self.of)
        number = self.box.shape[axis] // length if count > 1 and not is_elementwise(self.of) else 1
        return tuple(chunk(self.box, axis, number, i) for i in range(number)) if number > 1 else (self.box,)


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
        return all(self.boxes[owner].holds(part.box) for part in self.parts for owner in part.owners)

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
        return whole((split.inner[0].size, split.inner[1].size))

    def projected(self, item: int) -> Iterator[Message]:
        """Coordinates of the shards, to be summed on the owner; their box is that of coordinates."""
        owner = self.parts[0].owners[0]
        for _, holders in distinct(self.boxes):
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
        for part, (box, holders) in itertools.product(self.parts, distinct(self.boxes)):
            both = part.box.common(box)
            if both is not None:
                for owner in part.owners:
                    yield Message(self._near(owner, holders), owner, item, both)

    def outgoing(self, item: int) -> Iterator[Message]:
        """Updates from the owners to their own copy of the shards; or new weights, where owners have them, to all that hold a shard."""
        for part in self.parts:
            if self.resident:
                for rank, box in enumerate(self.boxes):
                    both = None if rank in part.owners else part.box.common(box)
                    if both is not None:
                        yield Message(part.owners[0], rank, item, both)
                continue
            for box, holders in distinct(self.boxes):
                both = part.box.common(box)
                if both is not None:
                    yield Message(part.owners[0], self._near(part.owners[0], holders), item, both)

    def copies(self, item: int) -> Iterator[Message]:
        """Updates from the shards that have them to the copies of these shards: an owner need not send to each copy."""
        if self.resident:
            return
        for part, (box, holders) in itertools.product(self.parts, distinct(self.boxes)):
            both = part.box.common(box)
            if both is not None:
                near = self._near(part.owners[0], holders)
                yield from (Message(near, rank, item, both) for rank in holders if rank != near)

    def _near(self, owner: int, holders: tuple[int, ...]) -> int:
        """Of the ranks that hold a shard, the one that stands among copies where the owner does."""
        return holders[copy_of(self.boxes)[owner] % len(holders)]

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
        out = {holders[0]: box.numel for box, holders in distinct(tuple(box or whole((0,)) for box in rows)) if rows[owner] != box}
        out[owner] = sum(box.numel for rank, box in enumerate(rows) if box is not None and rank != owner)
        return out


@lru_cache(maxsize=256)
def copy_of(boxes: tuple[Box, ...]) -> tuple[int, ...]:
    """For every rank, which of the copies of its shard it holds; ranks without one are counted in turn."""
    out = list(range(len(boxes)))
    for _, holders in distinct(boxes):
        for copy, rank in enumerate(holders):
            out[rank] = copy
    return tuple(out)


@lru_cache(maxsize=256)
def turns(boxes: tuple[Box, ...]) -> tuple[tuple[int, int], ...]:
    """In which order ranks that keep the same become owners: copies in turn, so that the traffic of all of them is used."""
    out = [(len(boxes), rank) for rank in range(len(boxes))]
    for shard, (_, holders) in enumerate(distinct(boxes)):
        for copy, rank in enumerate(holders):
            out[rank] = (shard, copy)
    return tuple(out)


@lru_cache(maxsize=256)
def distinct(boxes: tuple[Box, ...]) -> tuple[tuple[Box, tuple[int, ...]], ...]:
    """Every box that is not empty, once, with the ranks that hold it."""
    held: dict[Box, list[int]] = {}
    for rank, box in enumerate(boxes):
        if box.numel:
            held.setdefault(box, []).append(rank)
    return tuple((box, tuple(ranks)) for box, ranks in held.items())


@dataclass
class Layout:
    """Shares of one team of ranks. `loads`: bytes of state that each rank owns so far, by which the next owner is chosen."""

    ranks: int
    divided: bool = False  # the parameters are whole on all ranks, and the state is divided all the same
    loads: list[int] = field(default_factory=list)
    splits: dict[tuple[int, int, int], Split] = field(default_factory=dict)  # of cuts, by pipeline and shape

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
                pieces = [chunk(whole(row.entry.shape), along, self.ranks, i) for i in range(self.ranks)]
                if all(_viewed(row, piece) for piece in pieces if piece.numel):
                    yield from (self._part(row, piece, (rank,)) for rank, piece in enumerate(pieces) if piece.numel)
                    return
        elif is_elementwise(row) and all(_viewed(row, box) for box, _ in distinct(boxes)):
            yield from (self._part(row, box, holders) for box, holders in distinct(boxes))
            return
        runs = list(_runs(row, self._cuts_of(row, boxes)))
        # Where a rank has all of a run, the run is its own: nothing has to travel to it.
        turn = turns(boxes)
        least = sorted(range(self.ranks), key=lambda rank: (self.loads[rank], turn[rank]))
        free = iter(least)
        taken: set[int] = set()
        place = {rank: i for i, rank in enumerate(least)}
        held = distinct(boxes)
        for box in runs:
            holders = [rank for whose, ranks in held if whose.holds(box) for rank in ranks if rank not in taken]
            owner = min(holders, key=place.__getitem__) if holders else next(rank for rank in free if rank not in taken)
            taken.add(owner)
            yield self._part(row, box, (owner,))

    def _cuts_of(self, row: Row, boxes: tuple[Box, ...]) -> list[int]:
        """How many matrices, or heads, each run has: those of the shards where these hold whole ones, else as equal as they come."""
        axis, size, count = _run_axis(row)
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
    if block.name or not split.in_coordinates:
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


def is_elementwise(row: Row) -> bool:
    """Whether a parameter's entries are updated each by itself, so that it may be cut anywhere."""
    return len(row.splits) == 1 and row.splits[0][1].elementwise and row.splits[0][0].heads == 1 and not row.splits[0][0].name


# ---------------------------------------------------------------------------------- boxes of a parameter and of its matrices


def _run_axis(row: Row) -> tuple[int, int, int]:
    """The dimension along which a parameter falls into matrices, the length of one, and their number: experts, or heads."""
    view, shape = row.view, row.entry.shape
    heads = view.blocks[0].heads if view.blocks else 1
    if view.count > 1 and len(shape) == 3:
        return 0, 1, view.count
    if heads > 1 and view.count == 1 and len(shape) == 2:
        return (1 if view.transposed else 0), view.rows // heads, heads
    return 0, 0, 1


def _runs(row: Row, sizes: Sequence[int]) -> Iterator[Box]:
    axis, length, count = _run_axis(row)
    shape, first = row.entry.shape, 0
    if count == 1:
        yield whole(shape)
        return
    for size in sizes:
        start, stop = [0] * len(shape), list(shape)
        start[axis], stop[axis] = first * length, (first + size) * length
        yield Box(tuple(start), tuple(stop))
        first += size


def _viewed(row: Row, box: Box) -> Box | None:
    """A box of the parameter as one of its matrices `(count, rows, cols)`; None where it is not a box there."""
    view, shape = row.view, row.entry.shape
    if len(shape) < 2:
        groups: list[list[int]] = [[], [], list(range(len(shape)))]
    elif len(shape) == 2 or (view.count == 1 and shape[0] == (view.cols if view.transposed else view.rows)):
        groups = [[], [0], list(range(1, len(shape)))]
    else:
        groups = [list(range(len(shape) - 2)), [len(shape) - 2], [len(shape) - 1]]
    start, stop = [], []
    for dims in groups:
        merged = _merged(box, shape, dims)
        if merged is None:
            return None
        start.append(merged[0])
        stop.append(merged[1])
    if view.transposed:
        start[1], start[2], stop[1], stop[2] = start[2], start[1], stop[2], stop[1]
    return Box(tuple(start), tuple(stop))


def _merged(box: Box, shape: Sequence[int], dims: Sequence[int]) -> tuple[int, int] | None:
    """The range of a box along dimensions that are joined to one; None where it is not one range."""
    low = high = 0
    for i, d in enumerate(dims):
        a, b = box.start[d], box.stop[d]
        if b - a > 1 and any((box.start[e], box.stop[e]) != (0, shape[e]) for e in dims[i + 1 :]):
            return None
        low, high = low * shape[d] + a, high * shape[d] + b - 1
    return low, high + 1


def _row_of(row: Row, box: Box, splits: dict[tuple[int, int, int], Split]) -> Row:
    """The plan of a box alone: the same pipeline on fewer matrices, or on a cut of one where entries are updated each by itself."""
    if box == whole(row.entry.shape):
        return row
    entry = replace(row.entry, shape=box.shape)
    if is_elementwise(row):
        viewed = _viewed(row, box)
        assert viewed is not None
        count, rows, cols = viewed.shape
        block, split = row.splits[0]
        key = (id(split.pipeline), rows, cols)
        if key not in splits:
            splits[key] = split.pipeline.on(rows, cols)
        window = (viewed.start[1], viewed.start[2], block.rows, block.cols)
        own = replace(block, count=count, rows=rows, cols=cols, first=viewed.start[0], of=block.count, window=window)
        view = View(count, rows, cols, row.view.transposed, (own,))
        return replace(row, entry=entry, view=view, splits=((own, splits[key]),))
    axis, length, _ = _run_axis(row)
    before, held = box.start[axis] // length, box.shape[axis] // length
    blocks = []
    for block in row.view.blocks:
        each = block.heads if row.view.count > 1 else 1  # heads of every expert
        heads = block.heads if row.view.count > 1 else held
        blocks.append(replace(block, count=held * each, heads=heads, first=before * each, of=block.count))
    count = held if row.view.count > 1 else 1
    rows = row.view.rows if row.view.count > 1 else held * length
    view = replace(row.view, count=count, rows=rows, blocks=tuple(blocks))
    return replace(row, entry=entry, view=view, splits=tuple(zip(blocks, (split for _, split in row.splits), strict=True)))


def _state_boxes(row: Row, box: Box) -> dict[str, Box]:
    """Where each slot of a part lies in that of the parameter."""
    out: dict[str, Box] = {}
    cut = box != whole(row.entry.shape)
    for block, split in row.splits:
        for key in split.slots:
            name = state_key(block, key)
            shape = row.state[name][0]
            if not cut:
                out[name] = whole(shape)
            elif is_elementwise(row):
                viewed = _viewed(row, box)
                assert viewed is not None
                sides = slice(1, None) if block.count == 1 else slice(None)
                out[name] = Box(viewed.start[sides], viewed.stop[sides])
            else:
                axis, length, _ = _run_axis(row)
                each = block.heads if row.view.count > 1 else 1
                low, high = box.start[axis] // length * each, box.stop[axis] // length * each
                out[name] = Box((low, *(0 for _ in shape[1:])), (high, *shape[1:]))
    if row.compensated:
        out["compensation"] = box
    return out
