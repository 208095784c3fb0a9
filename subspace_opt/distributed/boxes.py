"""Boxes: ranges of indices of a tensor, such as the shard that a rank of a mesh holds. Pure functions of shapes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from operator import sub
from typing import NamedTuple


class Box(NamedTuple):
    """A range of indices in each dimension of a tensor, from `start` up to and without `stop`."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of indices in each dimension."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """The number of entries."""
        return prod(map(sub, self.stop, self.start))

    def intersection(self, other: Box) -> Box | None:
        """The entries that both boxes contain; None if there are none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def contains(self, other: Box) -> bool:
        """True if every entry of `other` is in this box."""
        return self == other or all(a <= c and d <= b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """The slices that select this box from a tensor that stores the box `outer`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))


def full_box(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


EMPTY = Box((0,), (0,))


class Cut(NamedTuple):
    """How one dimension of a mesh cuts a tensor: along `dim`.

    A `strided` cut comes after the cuts of the mesh dimensions to its right, as with FSDP2 over tensor parallel.
    """

    dim: int
    strided: bool = False


def shard_boxes(shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[Cut | None]) -> tuple[Box, ...]:
    """The box of each rank of a mesh, in row-major order of the mesh coordinates.

    Every cut makes chunks of ceil(size / ranks), as `torch.chunk` does; trailing chunks may be empty.
    """
    return _shard_boxes(tuple(shape), tuple(mesh), tuple(cuts))


@lru_cache(maxsize=256)  # a model has hundreds of parameters and about a dozen shapes
def _shard_boxes(shape: tuple[int, ...], mesh: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> tuple[Box, ...]:
    order = [i for i, cut in enumerate(cuts) if cut is not None and not cut.strided]
    order += [i for i, cut in reversed(list(enumerate(cuts))) if cut is not None and cut.strided]
    boxes = []
    for at in itertools.product(*map(range, mesh)):
        box = full_box(shape)
        for axis in order:
            cut = cuts[axis]
            assert cut is not None
            box = chunk(box, cut.dim, mesh[axis], at[axis])
        boxes.append(box)
    return tuple(boxes)


def chunk(box: Box, dim: int, number: int, index: int) -> Box:
    """The `index`-th of `number` chunks of a box along `dim`, as `torch.chunk` makes them; trailing chunks may be empty."""
    first, last = box.start[dim], box.stop[dim]
    size = -(-(last - first) // number)
    low, high = min(first + index * size, last), min(first + (index + 1) * size, last)
    return Box((*box.start[:dim], low, *box.start[dim + 1 :]), (*box.stop[:dim], high, *box.stop[dim + 1 :]))


@lru_cache(maxsize=256)
def box_holders(boxes: tuple[Box, ...]) -> tuple[tuple[Box, tuple[int, ...]], ...]:
    """Each different box that is not empty, with the ranks that hold it, in the order of the first holder."""
    held: dict[Box, list[int]] = {}
    for rank, box in enumerate(boxes):
        if box.numel:
            held.setdefault(box, []).append(rank)
    return tuple((box, tuple(ranks)) for box, ranks in held.items())


@lru_cache(maxsize=256)
def replica_index(boxes: tuple[Box, ...]) -> tuple[int, ...]:
    """For each rank, the index of its replica among all replicas of the same shard. A rank with an empty shard gets its own number."""
    out = list(range(len(boxes)))
    for _, holders in box_holders(boxes):
        for replica, rank in enumerate(holders):
            out[rank] = replica
    return tuple(out)


@lru_cache(maxsize=256)
def owner_order(boxes: tuple[Box, ...]) -> tuple[tuple[int, int], ...]:
    """A sort key for each rank that breaks ties between equally loaded ranks in the choice of owners.

    The ranks of shard 0 come first, in the order of their replicas, so that owners spread over replicas and all of them send.
    """
    out = [(len(boxes), rank) for rank in range(len(boxes))]
    for shard, (_, holders) in enumerate(box_holders(boxes)):
        for replica, rank in enumerate(holders):
            out[rank] = (shard, replica)
    return tuple(out)
