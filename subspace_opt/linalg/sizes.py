"""Norms, and quotients that stay finite if a size is 0 or subnormal."""

from __future__ import annotations

import torch
from torch import Tensor


def is_readable(x: Tensor) -> bool:
    """True if reading a value of `x` costs nothing: it is on a CPU, and torch.compile is not tracing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of every matrix, `(B, 1, 1)`."""
    if x.size(0) == 1:
        whole: Tensor = torch.linalg.vector_norm(x)  # faster without `dim`
        return whole.view(1, 1, 1)
    size: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return size


def peak(x: Tensor) -> Tensor:
    """The largest magnitude of every matrix, `(B, 1, 1)`; NaN if the matrix holds NaN.

    Uses `abs().amax()`: on a CPU `vector_norm(ord=inf)` is 40x slower than the Frobenius norm.
    """
    return x.abs().amax(dim=(-2, -1), keepdim=True)


def all_finite(x: Tensor) -> bool:
    """True if no entry is NaN or infinite. A finite norm shows it; otherwise every entry is tested."""
    return not x.is_floating_point() or bool(torch.linalg.vector_norm(x).isfinite()) or bool(x.isfinite().all())


def magnitude(x: Tensor) -> Tensor:
    """The size of every matrix, `(B, 1, 1)`: its Frobenius norm or, if the squares leave the range, its largest magnitude."""
    size = norm(x)
    if not is_readable(x) or not bool(((size > 0) & size.isfinite()).all()):
        top = peak(x)
        size = torch.where((size > 0) & size.isfinite(), size, top)
    return size


def divisor(size: Tensor) -> Tensor:
    """`size`, with 1 in place of 0."""
    return torch.where(size == 0, torch.ones_like(size), size)


SAFE = 1e-20  # an eps from which a quotient cannot overflow


def ratio(a: Tensor | float, size: Tensor, eps: float) -> Tensor:
    """`a / (size + eps)`. With an eps near 0, it is 0 where it would overflow: a size of 0 or a subnormal size gives no infinite number."""
    if eps >= SAFE:
        return a / (size + eps)
    size = size + eps if eps else size
    largest = a.clamp_min(1.0) if isinstance(a, Tensor) else max(a, 1.0)  # torch divides a number by a tensor as `a * (1 / size)`
    return torch.where(size > largest * (2.0 / torch.finfo(size.dtype).max), a / size, 0.0)


def quotient(x: Tensor, size: Tensor) -> Tensor:
    """`X / size` entry by entry; 0 for an entry whose size is 0 or whose quotient overflows."""
    found: Tensor = x / size
    return found.masked_fill(found.isinf() | (size == 0), 0.0)


def unit(x: Tensor) -> Tensor:
    """Every matrix divided by its size, so that products of entries neither overflow nor underflow; 0 stays 0."""
    return x / divisor(magnitude(x))


def unit_columns(x: Tensor, eps: float) -> Tensor:
    """Every column divided by its norm plus eps; with eps 0, a column of 0 stays 0."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return quotient(x, size + eps) if eps < SAFE else x / (size + eps)
