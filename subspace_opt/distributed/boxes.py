"""Boxes of tensors: what a rank of a mesh holds of one. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from operator import sub
from typing import NamedTuple


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

    def intersection(self, other: Box) -> Box | None:
        """What two boxes share; None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def contains(self, other: Box) -> bool:
        return self == other or all(a <= c and d <= b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def slices_in(self, frame: Box) -> tuple[slice, ...]:
        """Slices that cut this box out of a tensor that holds `frame`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, frame.start, strict=True))


def full_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


EMPTY = Box((0,), (0,))


class Cut(NamedTuple):
    """How one dimension of a mesh cuts a tensor; `strided`: after the dimensions to its right have cut (FSDP2 over tensor parallel)."""

    dim: int
    strided: bool = False


def shard_boxes(shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[Cut | None]) -> tuple[Box, ...]:
    """The box of each rank of a mesh, in row-major order of its coordinates: every cut makes chunks of ceil(size / ranks)."""
    return _shard_boxes(tuple(shape), tuple(mesh), tuple(cuts))


@lru_cache(maxsize=256)  # a model has hundreds of parameters and a dozen shapes
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
    """The `index`-th of `number` chunks of a box along one dimension, as `torch.chunk` makes them; the last may be empty."""
    first, last = box.start[dim], box.stop[dim]
    size = -(-(last - first) // number)
    low, high = min(first + index * size, last), min(first + (index + 1) * size, last)
    return Box((*box.start[:dim], low, *box.start[dim + 1 :]), (*box.stop[:dim], high, *box.stop[dim + 1 :]))


@lru_cache(maxsize=256)
def replica_index(boxes: tuple[Box, ...]) -> tuple[int, ...]:
    """For every rank, which of the copies of its shard it holds; ranks without one are counted in turn."""
    out = list(range(len(boxes)))
    for _, holders in box_holders(boxes):
        for copy, rank in enumerate(holders):
            out[rank] = copy
    return tuple(out)


@lru_cache(maxsize=256)
def owner_order(boxes: tuple[Box, ...]) -> tuple[tuple[int, int], ...]:
    """In which order ranks that keep the same become owners: copies in turn, so that the traffic of all of them is used."""
    out = [(len(boxes), rank) for rank in range(len(boxes))]
    for shard, (_, holders) in enumerate(box_holders(boxes)):
        for copy, rank in enumerate(holders):
            out[rank] = (shard, copy)
    return tuple(out)


@lru_cache(maxsize=256)
def box_holders(boxes: tuple[Box, ...]) -> tuple[tuple[Box, tuple[int, ...]], ...]:
    """Every box that is not empty, once, with the ranks that hold it."""
    held: dict[Box, list[int]] = {}
    for rank, box in enumerate(boxes):
        if box.numel:
            held.setdefault(box, []).append(rank)
    return tuple((box, tuple(ranks)) for box, ranks in held.items())
