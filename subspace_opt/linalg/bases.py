"""Decompositions and orthonormal bases of stacks of matrices `(B, m, n)`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .products import mm
from .sizes import divisor, is_readable, magnitude, unit


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A thin SVD. It is retried in float64 if it does not converge."""
    try:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
    except torch.linalg.LinAlgError:
        if x.dtype == torch.float64:
            raise
        u, s, vh = (f.to(x.dtype) for f in torch.linalg.svd(x.double(), full_matrices=False))
    return u, s, vh


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, clamped at 0) and eigenvectors of a positive semi-definite stack; retried in float64."""
    try:
        values, vectors = torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:
        if a.dtype == torch.float64:
            raise
        values, vectors = (f.to(a.dtype) for f in torch.linalg.eigh(a.double()))
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def fix_signs(u: Tensor) -> Tensor:
    """Give every column `(B, n, r)` the sign that makes its entry of largest magnitude positive."""
    return u * _signs(u)


def _signs(u: Tensor) -> Tensor:
    # `amax` and `amin`: an argmax of magnitudes is 8x slower.
    return torch.where(u.amax(dim=-2, keepdim=True) < -u.amin(dim=-2, keepdim=True), -1.0, 1.0).to(u.dtype)


def orthonormal(y: Tensor) -> Tensor:
    """Orthonormal columns with the span of `Y` `(B, n, r)`, n >= r: Q of `Y = Q R` with a diagonal of R >= 0.

    That sign makes Q continuous in Y, so a warm-started basis moves little. A CPU computes it by Householder reflections. On a GPU these
    would run one column at a time, so a GPU uses `cholesky_qr`, which consists of products.
    """
    return _signed(*_reflected(y)) if y.device.type == "cpu" else cholesky_qr(y)


def cholesky_qr(y: Tensor) -> Tensor:
    """`orthonormal` by `Q <- Q C^-1`, `C'C = Q'Q`, Q with columns of norm 1, four times, shifted if that is singular (arXiv:1809.11085).

    It uses products and r x r factorisations only, and no host waits. All factors are upper triangular, so Q is that of a QR. A column
    that depends on the earlier ones becomes a direction of round-off; a column of 0 becomes a unit vector orthogonal to the others.
    """
    n, r = y.shape[-2:]
    eps = torch.finfo(y.dtype).eps
    unit = torch.eye(n, r, dtype=y.dtype, device=y.device)
    identity = torch.eye(r, dtype=y.dtype, device=y.device)
    # If only the sizes of columns make a matrix ill-conditioned, the second pass removes the error of the first. A matrix that is singular
    # to round-off needs one more pass before the last two converge.
    for _ in range(4):
        size: Tensor = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
        y = torch.where(size == 0, unit, y / divisor(size))
        gram = mm(y.mT, y)
        factor, failed = torch.linalg.cholesky_ex(gram)
        shifted = torch.linalg.cholesky_ex(gram + 4 * (n + r) * eps * identity)[0]
        factor = torch.where((failed > 0)[:, None, None], shifted, factor)
        y = torch.linalg.solve_triangular(factor.mT, y, upper=True, left=False)
    return y


def complete(y: Tensor) -> Tensor:
    """`orthonormal` of a square `Y`. A column that depends on the earlier ones is replaced by a completion of these, not by round-off.

    A pivot of R is the part of its column that is new, and round-off below 32 eps times the largest. In `Y = A Q` with eigenvectors Q of A,
    a column is as long as its eigenvalue, so only eigenvalues of round-off are replaced.
    """
    if y.device.type != "cpu" or type(y) is not Tensor:
        q, pivots = _reflected(y)
        held = _held(pivots)
        return _signed(q, pivots) if y.is_meta or bool(held.all()) else _signed(*_reflected(y * held.unsqueeze(-2)))
    reflectors, tau = torch.geqrf(y)
    held = _held(reflectors.diagonal(dim1=-2, dim2=-1))
    if bool(held.all()):
        return _signed(torch.linalg.householder_product(reflectors, tau), reflectors.diagonal(dim1=-2, dim2=-1))
    if not bool((held[:, 1:] <= held[:, :-1]).all()):  # the reflectors of later columns depend on one that is replaced
        reflectors, tau = torch.geqrf(y * held.unsqueeze(-2))
    # Without its reflector, a column of Q is what the earlier reflectors make of a unit vector: a completion of the earlier columns.
    q = torch.linalg.householder_product(reflectors, tau * held)
    return _signed(q, reflectors.diagonal(dim1=-2, dim2=-1) * held)


def _held(pivots: Tensor) -> Tensor:
    """The columns whose pivot is more than round-off."""
    size = pivots.abs()
    return size > 32 * torch.finfo(size.dtype).eps * size.amax(-1, keepdim=True)


def _reflected(y: Tensor) -> tuple[Tensor, Tensor]:
    """Q of `Y = QR` by Householder reflections, and the diagonal of R.

    On a CPU only the diagonal of R is computed: forming R takes up to a fourth of a QR.
    """
    if y.device.type != "cpu" or type(y) is not Tensor:
        q, r = torch.linalg.qr(y)
        return q, r.diagonal(dim1=-2, dim2=-1)
    reflectors, tau = torch.geqrf(y)
    return torch.linalg.householder_product(reflectors, tau), reflectors.diagonal(dim1=-2, dim2=-1)


def _signed(q: Tensor, pivots: Tensor) -> Tensor:
    """Q with the signs that make the diagonal of R positive, or 0."""
    signs: Tensor = torch.where(pivots < 0, -1.0, 1.0).to(q.dtype)
    fixed: Tensor = q * signs.unsqueeze(-2)
    return fixed


Method = Literal["exact", "gram", "randomized"]


def leading_right(x: Tensor, rank: int, method: Method = "exact", start: Tensor | None = None, iterations: int = 1) -> Tensor:
    """The leading right singular vectors of `X` `(B, m, n)` as columns `(B, n, rank)`, in descending order.

    `exact`: a thin SVD. `gram`: eigh of the smaller of XX' and X'X; several times cheaper, and exact for singular values above
    sqrt(round-off) of the largest. `randomized`: power iterations from `start` `(B, n, rank + p)`, which holds draws, or a basis and draws.
    One iteration from draws captures 0.99 of the possible energy of a gradient with a decaying spectrum, and 0.8 of that of pure noise.
    """
    if method == "exact":
        u = svd(unit(x))[2][..., :rank, :].mT
    elif method == "gram":
        u = _by_gram(unit(x), rank)
    else:
        if start is None:
            raise ValueError("a randomized range needs draws to start from")
        return sketched_right(x, rank, start, iterations)[0]
    return fix_signs(u)


def singular_bases(x: Tensor) -> tuple[Tensor, Tensor]:
    """All left and all right singular vectors of `X` `(B, m, n)`, in descending order, as `(B, m, m)` and `(B, n, n)`.

    Uses eigh of the smaller Gram matrix. Directions in which X is only round-off are replaced. Householder reflections complete the other
    directions, so the basis depends on X, not on round-off.
    """
    if x.size(-2) > x.size(-1):
        right, left = singular_bases(x.mT)
        return left, right
    x = unit(x)
    energy, left = eigh(mm(x, x.mT))
    round_off = x.size(-1) * torch.finfo(x.dtype).eps
    held = (energy > round_off * energy[..., :1]).unsqueeze(-2)  # (B, 1, m)
    image = mm(x.mT, left) * held  # X'U = V S
    return fix_signs(_completed(left * held)), fix_signs(_completed(image))


def eigenbasis(a: Tensor) -> Tensor:
    """All eigenvectors of a positive semi-definite `A` `(B, n, n)`, in descending order.

    Eigenvectors of round-off are replaced by a completion of the others, as in `singular_bases`.
    """
    values, vectors = eigh(a)
    held = values > a.size(-1) * torch.finfo(a.dtype).eps * values[..., :1]
    return fix_signs(_completed(vectors * held.unsqueeze(-2)))


def _completed(y: Tensor) -> Tensor:
    """A square orthonormal basis that starts with the normalised orthogonal columns of `Y` `(B, n, k)`."""
    q, r = torch.linalg.qr(y, mode="complete")
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    k: int = y.size(-1)
    return torch.cat([q[..., :k] * signs.unsqueeze(-2), q[..., k:]], dim=-1)


def _by_gram(x: Tensor, rank: int) -> Tensor:
    if x.size(-1) <= x.size(-2):
        return eigh(mm(x.mT, x))[1][..., :rank]
    left = eigh(mm(x, x.mT))[1][..., :rank]
    return orthonormal(mm(x.mT, left))


def sketched_right(x: Tensor, rank: int, start: Tensor, iterations: int = 1) -> tuple[Tensor, Tensor]:
    """An approximation of `leading_right` by power iterations from `start` `(B, n, rank + p)`, and the coordinates `X U` `(B, m, rank)`."""
    size = magnitude(x)
    if size.numel() == 1 and is_readable(size) and 1e-6 < size.item() < 1e6:
        scale = None  # the fourth power stays in range
    else:
        scale = divisor(size)
    q = start
    for _ in range(iterations):
        image = mm(x, q)
        q = orthonormal(mm((image if scale is None else image / scale).mT, x).mT)
    image = mm(x, q)  # (B, m, rank + p)
    inner = image if scale is None else image / scale
    v = eigh(mm(inner.mT, inner))[1][..., :rank]
    u = mm(q, v)
    signs = _signs(u)
    return u * signs, mm(image, v * signs)
