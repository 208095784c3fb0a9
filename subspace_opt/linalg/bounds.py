"""Bounds of the largest singular value that are closer than the Frobenius norm, for wide matrices `(..., k, l)`."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .products import symmetric
from .sizes import divisor

#: The numbers that divide X: its Frobenius norm, its Schatten-4 norm, its largest singular value by power iterations, or a number a row.
Bound = Literal["frobenius", "schatten4", "spectral", "aol"]

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)  # one for each vector of a power iteration
MARGIN = 1.05  # by which the result of a power iteration is raised: it approaches the largest singular value from below


def bounded(y: Tensor, bound: Bound, power_iterations: int) -> tuple[Tensor, Tensor]:
    """A wide `Y` `(..., k, l)` of Frobenius norm at most 1, divided by a closer bound of its largest singular value, and its Gram matrix.

    `schatten4`: `|YY'|_F^1/2`, never below the largest singular value. `spectral`: power iterations on YY', raised by `MARGIN`, at most
    the Schatten-4 norm. `aol`: row i divided by `(sum_j |YY'|_ij)^1/2` (arXiv:2208.03160); the result has another polar factor than Y.
    """
    gram = symmetric(y, y.mT)
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    if bound == "aol":
        scale = divisor(wide.abs().sum(-1, keepdim=True)).rsqrt()
        return y * scale.to(y.dtype), (wide * scale * scale.mT).to(gram.dtype)
    square = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    if bound == "spectral":
        least = square * wide.size(-1) ** -0.5  # no largest eigenvalue is smaller
        square = (MARGIN**2 * _largest_eigenvalue(wide, power_iterations)).clamp(least, square)
    square = divisor(square)
    return y * square.rsqrt().to(y.dtype), (wide / square).to(gram.dtype)


def _largest_eigenvalue(a: Tensor, iterations: int) -> Tensor:
    """The largest Rayleigh quotient of a few fixed vectors after power iterations on a semi-definite `A` `(..., k, k)`, `(..., 1, 1)`."""
    v = _probes(a)
    for _ in range(iterations):
        v = a @ v
        v = v / divisor(torch.linalg.vector_norm(v, dim=-2, keepdim=True))
    largest: Tensor = torch.linalg.vector_norm(a @ v, dim=-2, keepdim=True).amax(-1, keepdim=True)
    return largest


def _probes(a: Tensor) -> Tensor:
    """Vectors `(k, 8)` for `A` `(..., k, k)` in fixed directions, so that a matrix has one result on every rank.

    Column j is the fractional part of `i sqrt(p_j)`, p_j a prime, less a half: no usual matrix has singular vectors orthogonal to all.
    """
    places = torch.arange(1, a.size(-1) + 1, dtype=a.dtype, device=a.device).unsqueeze(-1)
    return torch.cat([(places * math.sqrt(prime)).frac() for prime in PRIMES], dim=-1) - 0.5
