"""A Triton kernel for symmetric products: tiles on and below the diagonal are computed, and each is stored with its mirror image.

Importing this module imports Triton. `kernels` decides where it is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# (rows of a tile, depth of one step, warps, stages of the pipeline) by bytes of an entry. The tiles of both factors in all stages take
# 96 KiB of shared memory, which every GPU with bfloat16 products has. Not measured yet.
TILES = {2: (128, 64, 8, 3), 4: (64, 32, 4, 3)}


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def symmetric_kernel(  # type: ignore[no-untyped-def]  # Triton types the arguments
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    side,
    depth,
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    c_batch,
    c_row,
    c_col,
    beta,
    alpha,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute one tile of `out = beta C + alpha A B` `(side, side)` and its mirror image; `out` is contiguous.

    With T tiles a side, row T - 1 - r and row r of the triangle have T + 1 tiles together. Program p takes tile p % (T + 1) of such a pair.
    """
    tiles = tl.cdiv(side, BLOCK)
    pair = tl.program_id(0) // (tiles + 1)
    place = tl.program_id(0) % (tiles + 1)
    row = tl.where(place < tiles - pair, tiles - 1 - pair, pair)
    col = tl.where(place < tiles - pair, place, place - (tiles - pair))
    batch = tl.program_id(1).to(tl.int64)
    rows = (row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    cols = (col * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inner = tl.arange(0, STEP).to(tl.int64)
    a = a_ptr + batch * a_batch + rows[:, None] * a_row
    b = b_ptr + batch * b_batch + cols[None, :] * b_col
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, depth, STEP):
        at = start + inner
        left = tl.load(a + at[None, :] * a_col, mask=(rows[:, None] < side) & (at[None, :] < depth), other=0.0)
        right = tl.load(b + at[:, None] * b_row, mask=(at[:, None] < depth) & (cols[None, :] < side), other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    total = total * alpha
    inside = (rows[:, None] < side) & (cols[None, :] < side)
    if HAS_C:
        added = tl.load(c_ptr + batch * c_batch + rows[:, None] * c_row + cols[None, :] * c_col, mask=inside, other=0.0)
        total = total + beta * added.to(tl.float32)
    entries = total.to(out_ptr.dtype.element_ty)
    out = out_ptr + batch * side * side
    tl.store(out + rows[:, None] * side + cols[None, :], entries, mask=inside)
    if row != col:
        mirrored = (cols[:, None] < side) & (rows[None, :] < side)
        tl.store(out + cols[:, None] * side + rows[None, :], tl.trans(entries), mask=mirrored)


@torch.library.custom_op("subspace_opt::symmetric", mutates_args=())
def symmetric(a: Tensor, b: Tensor, c: Tensor | None, beta: float, alpha: float) -> Tensor:
    """`beta C + alpha A B` `(B, k, k)`, contiguous, for a symmetric C (None: 0) and a product A B known to be symmetric.

    Args:
        a: `(B, k, n)` in float32, bfloat16 or float16, with any strides. Sums are in float32.
        b: `(B, n, k)` of the same dtype.
        c: `(B, k, k)`, or None.

    The operation is opaque to `torch.compile`.
    """
    stack, side, depth = a.shape
    out = torch.empty(stack, side, side, dtype=a.dtype, device=a.device)
    block, step, warps, stages = TILES[a.itemsize]
    tiles = triton.cdiv(side, block)
    added = a if c is None else c
    exact = a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    symmetric_kernel[(tiles * (tiles + 1) // 2, stack)](
        a,
        b,
        added,
        out,
        side,
        depth,
        *a.stride(),
        *b.stride(),
        *added.stride(),
        beta,
        alpha,
        HAS_C=c is not None,
        PRECISION="ieee" if exact else "tf32",
        WIDEN=triton.knobs.runtime.interpret,  # Triton's interpreter multiplies bfloat16 as integers
        BLOCK=block,
        STEP=step,
        num_warps=warps,
        num_stages=stages,
    )
    return out


@symmetric.register_fake
def _(a: Tensor, b: Tensor, c: Tensor | None, beta: float, alpha: float) -> Tensor:
    return a.new_empty(a.size(0), a.size(1), a.size(1))
