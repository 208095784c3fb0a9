"""Parts of a parameter: what one rank computes of it, the plan of that alone, and where its state lies in that of the whole. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..algebra.frame import Frame
from ..engine import strategies
from ..plan import Row, state_key
from ..plan.views import View
from .boxes import Box, chunk, full_box


@dataclass(frozen=True)
class Part:
    """A box of a parameter that `owners` compute (several only where each of them holds it anyway), and whose state they keep."""

    box: Box
    owners: tuple[int, ...]
    of: Row  # the parameter
    splits: dict[tuple[int, int, int], Frame] = field(default_factory=dict, repr=False, compare=False)  # of the layout

    # Made when asked for: a rank needs those of its own part, and on thousands of ranks there are thousands of parts.
    @cached_property
    def row(self) -> Row:
        """The plan of the box alone."""
        return row_of(self.of, self.box, self.splits)

    @cached_property
    def state(self) -> dict[str, Box]:
        """Of each slot, where the part's lies in that of the parameter."""
        return state_boxes(self.of, self.box)

    @property
    def state_bytes(self) -> int:
        """What each owner keeps of it, counters left out."""
        return sum(box.numel * self.of.state[key][1].itemsize for key, box in self.state.items())

    @cached_property
    def matrices(self) -> tuple[Box, ...]:
        """Its experts or heads, or itself."""
        axis, length, count = run_axis(self.of)
        number = self.box.shape[axis] // length if count > 1 and not is_elementwise(self.of) else 1
        return tuple(chunk(self.box, axis, number, i) for i in range(number)) if number > 1 else (self.box,)


def is_elementwise(row: Row) -> bool:
    """Whether a parameter's entries are updated each by itself, so that it may be cut anywhere."""
    return (
        len(row.splits) == 1 and strategies.is_elementwise(row.splits[0][1]) and row.splits[0][0].heads == 1 and not row.splits[0][0].name
    )


def run_axis(row: Row) -> tuple[int, int, int]:
    """The dimension along which a parameter falls into matrices, the length of one, and their number: experts, or heads."""
    view, shape = row.view, row.entry.shape
    heads = view.blocks[0].heads if view.blocks else 1
    if view.count > 1 and len(shape) == 3:
        return 0, 1, view.count
    if heads > 1 and view.count == 1 and len(shape) == 2:
        return (1 if view.transposed else 0), view.rows // heads, heads
    return 0, 0, 1


def cut_runs(row: Row, sizes: Sequence[int]) -> Iterator[Box]:
    axis, length, count = run_axis(row)
    shape, first = row.entry.shape, 0
    if count == 1:
        yield full_box(shape)
        return
    for size in sizes:
        start, stop = [0] * len(shape), list(shape)
        start[axis], stop[axis] = first * length, (first + size) * length
        yield Box(tuple(start), tuple(stop))
        first += size


def view_of(row: Row, box: Box) -> Box | None:
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


def row_of(row: Row, box: Box, splits: dict[tuple[int, int, int], Frame]) -> Row:
    """The plan of a box alone: the same pipeline on fewer matrices, or on a cut of one where entries are updated each by itself."""
    if box == full_box(row.entry.shape):
        return row
    entry = replace(row.entry, shape=box.shape)
    if is_elementwise(row):
        viewed = view_of(row, box)
        assert viewed is not None
        count, rows, cols = viewed.shape
        block, split = row.splits[0]
        key = (id(split.pipeline), rows, cols)
        if key not in splits:
            splits[key] = Frame.of(split.pipeline, rows, cols)
        window = (viewed.start[1], viewed.start[2], block.rows, block.cols)
        own = replace(block, count=count, rows=rows, cols=cols, first=viewed.start[0], of=block.count, window=window)
        view = View(count, rows, cols, row.view.transposed, (own,))
        return replace(row, entry=entry, view=view, splits=((own, splits[key]),))
    axis, length, _ = run_axis(row)
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


def state_boxes(row: Row, box: Box) -> dict[str, Box]:
    """Where each slot of a part lies in that of the parameter."""
    out: dict[str, Box] = {}
    cut = box != full_box(row.entry.shape)
    for block, split in row.splits:
        for key in split.slots:
            name = state_key(block, key)
            shape = row.state[name][0]
            if not cut:
                out[name] = full_box(shape)
            elif is_elementwise(row):
                viewed = view_of(row, box)
                assert viewed is not None
                sides = slice(1, None) if block.count == 1 else slice(None)
                out[name] = Box(viewed.start[sides], viewed.stop[sides])
            else:
                axis, length, _ = run_axis(row)
                each = block.heads if row.view.count > 1 else 1
                low, high = box.start[axis] // length * each, box.stop[axis] // length * each
                out[name] = Box((low, *(0 for _ in shape[1:])), (high, *shape[1:]))
    if row.compensated:
        out["compensation"] = box
    return out
