"""Products of matrices and of stacks, in one pass over memory if possible."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import kernels


def _probe(*names: str) -> bool:
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


# Constants, because torch.compile cannot trace the probes.
_BFLOAT16 = _probe("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
_TILES = _probe("_is_amx_tile_supported")


def cpu_has_bfloat16() -> bool:
    """True if this CPU has instructions for bfloat16 products (AVX-512 BF16, AMX, or those of ARM)."""
    return _BFLOAT16


def cpu_has_tiles() -> bool:
    """True if this CPU multiplies bfloat16 in tiles (AMX), 10x faster than float32."""
    return _TILES


FUSED = ("cpu", "cuda", "mps", "xpu")  # devices for which PyTorch has fused kernels of optimizers
PANEL = 160  # least rows of a panel of a symmetric product
TILED_PANEL = 768  # the same for bfloat16 in tiles, where mirroring a small matrix costs as much as it saves


def _panels(a: Tensor) -> int:
    """The number of panels of a symmetric product."""
    if a.device.type != "cpu":
        return 1
    tiled = a.dtype == torch.bfloat16 and cpu_has_tiles()
    return min(int(a.size(-2)) // (TILED_PANEL if tiled else PANEL), 4)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """`A B` of two matrices or stacks. A stack of one takes the unbatched product, which is faster on a CPU."""
    if a.dim() == 2:
        return a.mm(b)
    if a.size(0) == 1 and b.size(0) == 1:
        return torch.mm(a[0], b[0]).unsqueeze(0)
    return torch.bmm(a, b)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0, in_place: bool = False) -> Tensor:
    """`beta C + alpha A B` of matrices or stacks in one pass, in the memory layout of C; `in_place`: written over C."""
    if c.stride(-2) == 1 and not c.is_contiguous():
        out = addmm(c.mT, b.mT, a.mT, beta=beta, alpha=alpha, in_place=in_place).mT
        return c if in_place else out
    if c.dim() == 2:
        return c.addmm_(a, b, beta=beta, alpha=alpha) if in_place else torch.addmm(c, a, b, beta=beta, alpha=alpha)
    if c.size(0) == 1:
        out = addmm(c[0], a[0], b[0], beta=beta, alpha=alpha, in_place=in_place)
        return c if in_place else out.unsqueeze(0)
    return c.baddbmm_(a, b, beta=beta, alpha=alpha) if in_place else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def symmetric(a: Tensor, b: Tensor, c: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0, in_place: bool = False) -> Tensor:
    """`beta C + alpha A B` `(k, k)` or `(B, k, k)` for a symmetric C (None: 0) and a product A B known to be symmetric.

    `in_place`: written over C. On a CPU, one large matrix is computed in panels of rows from the diagonal on and mirrored: p panels take
    (p + 1) / 2p of the operations. On a GPU, the Triton kernel does the same with tiles, see `kernels`.
    """
    if not in_place and (a.is_cuda or kernels.INTERPRETED) and kernels.serves(a):
        return kernels.symmetric(a, b, c, beta, alpha)
    if a.dim() == 3 and a.size(0) == 1:
        out = symmetric(a[0], b[0], None if c is None else c[0], beta=beta, alpha=alpha, in_place=in_place)
        return c if c is not None and in_place else out.unsqueeze(0)
    panels = _panels(a) if a.dim() == 2 else 1
    if panels < 2:
        if c is not None:
            return addmm(c, a, b, beta=beta, alpha=alpha, in_place=in_place)
        return mm(a, b) if alpha == 1.0 else mm(a, b) * alpha
    k = a.size(0)
    out = torch.empty(k, k, dtype=a.dtype) if c is None or not in_place else c
    edges = [k * i // panels for i in range(panels + 1)]
    for low, high in itertools.pairwise(edges):
        panel = out[low:high, low:]
        if c is None:
            torch.mm(a[low:high], b[:, low:], out=panel)
        elif in_place:
            panel.addmm_(a[low:high], b[:, low:], beta=beta, alpha=alpha)
        else:
            torch.addmm(c[low:high, low:], a[low:high], b[:, low:], beta=beta, alpha=alpha, out=panel)
        out[low:high, :low] = _turned(out[:low, low:high])
    return out if c is not None or alpha == 1.0 else out * alpha


def _turned(block: Tensor) -> Tensor:
    """The transpose of a block. Rows a multiple of 2 KiB apart share few cache lines, so they are copied first."""
    return block.contiguous().mT.contiguous() if block.stride(0) * block.itemsize % 2048 == 0 else block.mT
