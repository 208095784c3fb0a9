"""Measures of stacks of matrices `(B, m, n)`. Pure; every result is `(B,)`, and NaN marks a matrix to which the measure does not apply."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import linalg
from ..algebra.core import Basis
from ..algebra.projection import picks


def fine(x: Tensor) -> torch.dtype:
    """The finest dtype of a device. Squares of small gradients leave the range of float32."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def size(x: Tensor) -> Tensor:
    """Frobenius norms."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=fine(x))
    return norms


def rms(x: Tensor) -> Tensor:
    """Root mean squares of the entries."""
    return size(x) / math.sqrt(x.size(-2) * x.size(-1))


def share(part: Tensor, whole: Tensor) -> Tensor:
    """`|part|^2 / |whole|^2`, from 0 to 1 for a projection; NaN for a matrix of zeros."""
    return (size(part) / size(whole)).square()


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """`|A| / |B|`; NaN if B is 0."""
    bottom = size(b)
    return torch.where(bottom > 0, size(a) / bottom, torch.nan)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """`<A, B> / (|A| |B|)`; NaN if one of them is 0."""
    a, b = linalg.unit(a), linalg.unit(b)
    return (a * b).sum((-2, -1), dtype=fine(a)) / (size(a) * size(b))


def energies(x: Tensor) -> Tensor:
    """Squared singular values `(B, min(m, n))` in descending order, relative to their sum; NaN for a matrix of zeros.

    Uses the eigenvalues of the smaller Gram matrix: values below round-off of the largest are not resolved.
    """
    x = linalg.unit(x)
    gram = linalg.mm(x, x.mT) if x.size(-2) <= x.size(-1) else linalg.mm(x.mT, x)
    gram = gram.cpu() if gram.device.type == "mps" else gram  # mps has no eigenvalues
    values = torch.linalg.eigvalsh(gram.double() if gram.device.type == "cpu" else gram).flip(-1).clamp_min(0.0)
    shares: Tensor = values / values.sum(-1, keepdim=True)
    return shares


def effective_rank(shares: Tensor) -> Tensor:
    """`exp(-sum p log p)` of energies `p` `(B, k)` whose sum is 1: k if all are equal, 1 if one holds everything."""
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy.exp()


def sides(basis: Basis) -> list[Tensor]:
    """The sides of a basis that are proper subspaces: columns `(B, n, r)` with r < n, or picked indices `(B, r)`."""
    if basis.atoms is not None:
        return [basis.atoms]
    kept = [u for u in (basis.left, basis.right) if isinstance(u, Tensor)]
    return [u for u in kept if picks(u) or u.size(-1) < u.size(-2)]


def principal_angles(old: Tensor, new: Tensor) -> Tensor:
    """Angles in degrees `(B, r)` between the spans of two sides, in ascending order, on the CPU.

    Cosines are the singular values of `U_old' U_new`, sines those of `U_new - U_old U_old' U_new`; below 45 degrees the sines are exact.
    """
    if picks(old):
        kept = (new.unsqueeze(-1) == old.unsqueeze(-2)).any(-1)
        return torch.where(kept.cpu(), 0.0, 90.0).double().sort(-1).values
    old, new = (torch.linalg.qr((u.cpu() if u.device.type == "mps" else u).double()).Q for u in (old, new))
    overlap = old.mT @ new
    cos = torch.linalg.svdvals(overlap)
    sin = torch.linalg.svdvals(new - old @ overlap).flip(-1)
    return torch.rad2deg(torch.where(sin < 0.7, sin.clamp_max(1.0).asin(), cos.clamp_max(1.0).acos())).cpu()


def orthogonality_error(basis: Basis) -> Tensor | None:
    """The largest entry of `|U'U - I|` over all dense factors of a basis; None if it has no dense factor."""
    if basis.atoms is not None:
        return None
    worst: Tensor | None = None
    for side in (basis.left, basis.right):
        for u in side if isinstance(side, tuple) else (side,):
            if isinstance(u, Tensor) and not picks(u):
                gap = linalg.mm(u.mT, u) - torch.eye(u.size(-1), dtype=u.dtype, device=u.device)
                error = gap.abs().amax((-2, -1))
                worst = error if worst is None else torch.maximum(worst, error)
    return worst
