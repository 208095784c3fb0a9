"""Views: a parameter as matrices and back, without a copy if the storage allows it.

    (n,) -> 1 x n        (m, n) -> m x n        conv (O, I, kh, kw) -> O x (I kh kw)        experts (E, m, n) -> E matrices m x n

`transposed` marks weights stored as (in, out). `split` cuts the rows of a fused weight into named blocks (q, k, v), `heads` cuts them into
equal blocks. Each block is then a matrix of its own. If the rows of the blocks alternate, as q, k and v of one head after another, `groups`
is the number of times that they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..algebra.shaped import joined


class ViewError(ValueError):
    """A parameter's shape does not fit the view that its route asks for."""


@dataclass(frozen=True)
class Block:
    """`count` matrices of `rows` x `cols`. They begin at row `start` of each matrix of the parameter, or of each group of its rows."""

    name: str
    count: int
    rows: int
    cols: int
    start: int
    heads: int
    # Set if a rank holds only a part of a shared parameter: the index of its first matrix in the block, the block's number of matrices, and
    # for a part of one matrix its (row0, col0, rows, cols), where rows and cols are those of the whole matrix.
    first: int = 0
    of: int | None = None
    window: tuple[int, int, int, int] | None = None

    @property
    def total(self) -> int:
        """Number of matrices of the block in the whole parameter."""
        return self.count if self.of is None else self.of

    def __str__(self) -> str:
        size = f"{self.rows}x{self.cols}" if self.count == 1 else f"{self.count} of {self.rows}x{self.cols}"
        return f"{self.name} {size}" if self.name else size


@dataclass(frozen=True)
class View:
    """The matrices of one parameter of a given shape."""

    count: int
    rows: int
    cols: int
    transposed: bool
    blocks: tuple[Block, ...]
    modes: tuple[int, ...] = ()  # with layout `modes`: the dimensions that the columns join
    groups: int = 1  # each of these equal groups of rows holds a share of every block
    row_dims: int | None = None  # the number of dimensions that the rows join; None: as the number of dimensions implies

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor as `(count, rows, cols)`. It shares the tensor's storage if the strides allow it."""
        stored = (self.count, self.cols, self.rows) if self.transposed else (self.count, self.rows, self.cols)
        whole = tensor.reshape(stored)
        return whole.mT if self.transposed else whole

    def cut(self, whole: Tensor) -> list[Tensor]:
        """One stack `(count, rows, cols)` per block, each a view of `whole`, or copies if the view has several `groups`."""
        out = []
        for block in self.blocks:
            if self.groups > 1:
                shares = whole.unflatten(1, (self.groups, -1)).narrow(2, block.start, block.rows // self.groups)
                out.append(shares.reshape(-1, block.rows, block.cols))
                continue
            part = whole if len(self.blocks) == 1 else whole.narrow(1, block.start, block.rows)
            if block.heads > 1:
                part = part.unflatten(1, (block.heads, block.rows)).reshape(-1, block.rows, block.cols)
            out.append(part)
        return out

    def restore(self, blocks: list[Tensor], shape: torch.Size) -> Tensor:
        """The parameter, of the given shape, put together from its blocks."""
        shares = [b.reshape(self.count, self.groups, -1, self.cols) for b in blocks]
        whole = torch.cat(shares, dim=2).flatten(1, 2)
        return (whole.mT if self.transposed else whole).reshape(shape)

    def __str__(self) -> str:
        text = " + ".join(str(block) for block in self.blocks) or "empty"
        return f"{text}, stored transposed" if self.transposed else text


def make_view(
    shape: tuple[int, ...],
    *,
    layout: Literal["auto", "flatten", "stack", "modes"] = "auto",
    conv: bool = False,
    transposed: bool = False,
    split: dict[str, int] | None = None,
    heads: int | None = None,
    groups: int = 1,
    merge: int | None = None,
) -> View:
    """The view of a parameter.

    Args:
        layout: `flatten` joins all dimensions but the first. `stack` joins all but the last two. `auto` flattens four or more dimensions,
            and three if the module is a convolution. `modes` flattens and remembers the dimensions that it joined.
        groups: The number of equal groups of rows that each hold a share of every block of `split`.
        merge: With `modes`, the largest product of neighbouring dimensions that are joined.

    Raises:
        ViewError: The blocks do not fill the rows, the heads do not divide them, or a vector has a `split`, `heads` or `transposed`.
    """
    if merge is not None and len(shape) > 1 and 0 not in shape:
        if transposed:
            raise ViewError("is stored transposed, so `merge` cannot join its dimensions")
        return _merged_view(shape, merge)
    count, rows, cols = _matrices(shape, layout, conv)
    if transposed:
        if len(shape) < 2:
            raise ViewError("is not a matrix, so it cannot be stored transposed")
        rows, cols = cols, rows
    if (split or heads) and len(shape) < 2:
        raise ViewError("is not a matrix, so `split` and `heads` have no rows to cut")
    if math.prod(shape) == 0:
        return View(count, rows, cols, transposed, ())
    if split is not None:
        return View(count, rows, cols, transposed, _cut(split, count, rows, cols, groups), groups=groups)
    if heads is not None:
        if transposed and count > 1:
            raise ViewError("is a stack of transposed matrices, whose rows `heads` cannot cut")
        if rows % heads:
            raise ViewError(f"has {rows} rows, which {heads} heads do not divide")
        return View(count, rows, cols, transposed, (Block("", count * heads, rows // heads, cols, 0, heads),))
    modes = tuple(shape[1:]) if layout == "modes" and len(shape) > 2 else ()
    return View(count, rows, cols, transposed, (Block("", count, rows, cols, 0, 1),), modes)


def _merged_view(shape: tuple[int, ...], most: int) -> View:
    """One matrix of joined dimensions: the first is its rows, the others are its columns. A single one is a row vector."""
    sizes, row_dims = merged(shape, most), 0
    rows = sizes[0] if len(sizes) > 1 else 1
    while math.prod(shape[:row_dims]) < rows:
        row_dims += 1
    cols, modes = math.prod(shape) // rows, sizes[1:] if len(sizes) > 2 else ()
    return View(1, rows, cols, False, (Block("", 1, rows, cols, 0, 1),), modes, row_dims=row_dims)


def merged(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Neighbours joined from the left while their product stays at most `most`, without those of size 1; (1,) if all are."""
    return tuple(size for size in joined(sizes, most) if size > 1) or (1,)


def _matrices(shape: tuple[int, ...], layout: str, conv: bool) -> tuple[int, int, int]:
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if layout in ("flatten", "modes") or (layout == "auto" and (conv or len(shape) > 3)):
        return 1, shape[0], math.prod(shape[1:])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _cut(split: dict[str, int], count: int, rows: int, cols: int, groups: int) -> tuple[Block, ...]:
    if sum(split.values()) != rows:
        parts = " + ".join(f"{name} {size}" for name, size in split.items())
        raise ViewError(f"has {rows} rows, and `split` ({parts} = {sum(split.values())}) does not fill them")
    blocks, start = [], 0
    for name, size in split.items():
        blocks.append(Block(name, count, size, cols, start, 1))
        start += size // groups
    return tuple(blocks)
