"""Parts of a parameter: the matrices that one rank computes, their own plan, and the boxes of their state. Pure functions of shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from ..algebra.frame import Frame
from ..engine import strategies
from ..plan import Row, state_key
from ..plan.views import Block, View
from .boxes import Box, chunk, full_box


@dataclass(frozen=True)
class Part:
    """A box of a parameter that its owners compute and whose state they keep.

    A part has several owners only if each of them holds its weights and gradients anyway.
    """

    box: Box
    owners: tuple[int, ...]
    whole_row: Row  # the plan of the whole parameter
    frames: dict[tuple[int, int, int], Frame] = field(default_factory=dict, repr=False, compare=False)  # a cache of the layout

    # `row` and `state` are computed on first use: a rank needs them for its own part only, and there may be thousands of parts.
    @cached_property
    def row(self) -> Row:
        """The plan of the box alone."""
        return part_row(self.whole_row, self.box, self.frames)

    @cached_property
    def state(self) -> dict[str, Box]:
        """For each slot, the box of this part in the parameter's slot."""
        return state_boxes(self.whole_row, self.box)

    @property
    def state_bytes(self) -> int:
        """Bytes of state that each owner keeps for the part, without counters."""
        return sum(box.numel * self.whole_row.state[key][1].itemsize for key, box in self.state.items())

    @cached_property
    def matrix_boxes(self) -> tuple[Box, ...]:
        """The box of each expert or head of the part; the part's own box if it is one matrix."""
        axis, length, count = matrix_axis(self.whole_row)
        number = self.box.shape[axis] // length if count > 1 and not is_elementwise(self.whole_row) else 1
        return tuple(chunk(self.box, axis, number, i) for i in range(number)) if number > 1 else (self.box,)


def is_elementwise(row: Row) -> bool:
    """True if the update of every entry depends on that entry alone, so that the parameter may be cut anywhere."""
    if len(row.splits) != 1:
        return False
    block, frame = row.splits[0]
    return strategies.is_elementwise(frame) and block.heads == 1 and not block.name


def sent_weight_dtype(row: Row) -> torch.dtype | None:
    """The dtype in which owners get the weights with the gradients; None if they need no weights.

    Rules in `apply` see the weight with Kahan's compensation, and only the dtype of computation holds that sum.
    """
    frames = [frame for _, frame in row.splits]
    if not any(frame.needs_weight for frame in frames):
        return None
    return row.compute_dtype if row.compensated and any(frame.pipeline.apply for frame in frames) else row.entry.dtype


def bytes_to_owner(row: Row) -> int:
    """Bytes that an owner gets for each entry of the matrices that it updates: the gradient, and the weight if it needs it."""
    weight = sent_weight_dtype(row)
    return row.entry.dtype.itemsize + (0 if weight is None else weight.itemsize)


def matrix_axis(row: Row) -> tuple[int, int, int]:
    """How a parameter divides into matrices: `(dim, length, count)`.

    `count` matrices (experts, or heads) follow one another along dimension `dim`, each `length` indices long. `(0, 0, 1)` if the parameter
    does not divide.
    """
    view, shape = row.view, row.entry.shape
    heads = view.blocks[0].heads if view.blocks else 1
    if view.count > 1 and len(shape) == 3:
        return 0, 1, view.count
    if heads > 1 and view.count == 1 and len(shape) == 2:
        return (1 if view.transposed else 0), view.rows // heads, heads
    return 0, 0, 1


def run_boxes(row: Row, sizes: Sequence[int]) -> Iterator[Box]:
    """The boxes of consecutive runs of matrices, `sizes[i]` matrices in run i; the whole parameter if it does not divide."""
    axis, length, count = matrix_axis(row)
    shape, first = row.entry.shape, 0
    if count == 1:
        yield full_box(shape)
        return
    for size in sizes:
        start, stop = [0] * len(shape), list(shape)
        start[axis], stop[axis] = first * length, (first + size) * length
        yield Box(tuple(start), tuple(stop))
        first += size


def box_in_view(row: Row, box: Box) -> Box | None:
    """A box of the parameter as a box of its matrices `(count, rows, cols)`; None if it is not a box there."""
    view, shape = row.view, row.entry.shape
    if len(shape) < 2:
        groups: list[list[int]] = [[], [], list(range(len(shape)))]
    elif len(shape) == 2 or (view.count == 1 and shape[0] == (view.cols if view.transposed else view.rows)):
        groups = [[], [0], list(range(1, len(shape)))]
    else:
        groups = [list(range(len(shape) - 2)), [len(shape) - 2], [len(shape) - 1]]
    start, stop = [], []
    for dims in groups:
        merged = _merged_range(box, shape, dims)
        if merged is None:
            return None
        start.append(merged[0])
        stop.append(merged[1])
    if view.transposed:
        start[1], start[2], stop[1], stop[2] = start[2], start[1], stop[2], stop[1]
    return Box(tuple(start), tuple(stop))


def _merged_range(box: Box, shape: Sequence[int], dims: Sequence[int]) -> tuple[int, int] | None:
    """The range of a box along `dims` flattened to one dimension; None if its indices are not contiguous there."""
    low = high = 0
    for i, d in enumerate(dims):
        a, b = box.start[d], box.stop[d]
        if b - a > 1 and any((box.start[e], box.stop[e]) != (0, shape[e]) for e in dims[i + 1 :]):
            return None
        low, high = low * shape[d] + a, high * shape[d] + b - 1
    return low, high + 1


def part_row(row: Row, box: Box, frames: dict[tuple[int, int, int], Frame]) -> Row:
    """The plan of a box alone: the same pipeline on fewer matrices, or on a piece of one matrix if the pipeline is elementwise.

    `frames` caches the pipelines of pieces by pipeline and shape; the function adds to it.
    """
    if box == full_box(row.entry.shape):
        return row
    return _elementwise_row(row, box, frames) if is_elementwise(row) else _run_row(row, box)


def _elementwise_row(row: Row, box: Box, frames: dict[tuple[int, int, int], Frame]) -> Row:
    viewed = box_in_view(row, box)
    assert viewed is not None
    count, rows, cols = viewed.shape
    block, frame = row.splits[0]
    key = (id(frame.pipeline), rows, cols)
    if key not in frames:
        frames[key] = Frame.of(frame.pipeline, rows, cols)
    window = (viewed.start[1], viewed.start[2], block.rows, block.cols)
    own = replace(block, count=count, rows=rows, cols=cols, first=viewed.start[0], of=block.count, window=window)
    view = View(count, rows, cols, row.view.transposed, (own,))
    return replace(row, entry=replace(row.entry, shape=box.shape), view=view, splits=((own, frames[key]),))


def _run_row(row: Row, box: Box) -> Row:
    axis, length, _ = matrix_axis(row)
    before, held = box.start[axis] // length, box.shape[axis] // length
    blocks: list[Block] = []
    for block in row.view.blocks:
        each = block.heads if row.view.count > 1 else 1  # heads of every expert
        heads = block.heads if row.view.count > 1 else held
        blocks.append(replace(block, count=held * each, heads=heads, first=before * each, of=block.count))
    count = held if row.view.count > 1 else 1
    rows = row.view.rows if row.view.count > 1 else held * length
    view = replace(row.view, count=count, rows=rows, blocks=tuple(blocks))
    frames = tuple(zip(blocks, (frame for _, frame in row.splits), strict=True))
    return replace(row, entry=replace(row.entry, shape=box.shape), view=view, splits=frames)


def state_boxes(row: Row, box: Box) -> dict[str, Box]:
    """For each slot of the parameter, the box that belongs to the part `box`."""
    out: dict[str, Box] = {}
    for block, frame in row.splits:
        for key in frame.slots:
            name = state_key(block, key)
            out[name] = _state_box(row, box, block, row.state[name][0])
    if row.compensated:
        out["compensation"] = box
    return out


def _state_box(row: Row, box: Box, block: Block, shape: tuple[int, ...]) -> Box:
    if box == full_box(row.entry.shape):
        return full_box(shape)
    if is_elementwise(row):
        viewed = box_in_view(row, box)
        assert viewed is not None
        sides = slice(1, None) if block.count == 1 else slice(None)
        return Box(viewed.start[sides], viewed.stop[sides])
    axis, length, _ = matrix_axis(row)
    each = block.heads if row.view.count > 1 else 1
    low, high = box.start[axis] // length * each, box.stop[axis] // length * each
    return Box((low, *(0 for _ in shape[1:])), (high, *shape[1:]))
