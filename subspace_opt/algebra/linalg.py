"""Linear algebra on stacks of matrices `(B, m, n)`: products, decompositions, bases, and the discrete cosine transform.

Pure functions. Statistics and decompositions run in the dtype they are given, which is float32 at least. The sign of a singular
vector is arbitrary and moments outlive a refresh, so every function that returns a basis fixes the signs by one rule.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import torch
from torch import Tensor


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX-512 BF16, AMX, or those of ARM)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


@functools.cache
def cpu_has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX), ten times as fast as float32."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


FUSED = ("cpu", "cuda", "mps", "xpu")  # devices for which PyTorch has fused kernels of optimizers
PANEL = 160  # rows of a symmetric product that are made together, at least
TILED_PANEL = 768  # the same for bfloat16 in tiles: there mirroring a small matrix costs as much as it saves


def _panels(a: Tensor) -> int:
    """Into how many panels a symmetric product is cut."""
    if a.device.type != "cpu":
        return 1
    tiled = a.dtype == torch.bfloat16 and cpu_has_tiles()
    return min(int(a.size(-2)) // (TILED_PANEL if tiled else PANEL), 4)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """`A B` of two matrices or stacks; a stack of one takes the unbatched product, which a CPU runs faster."""
    if a.dim() == 2:
        return a.mm(b)
    if a.size(0) == 1 and b.size(0) == 1:
        return torch.mm(a[0], b[0]).unsqueeze(0)
    return torch.bmm(a, b)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0, in_place: bool = False) -> Tensor:
    """`beta C + alpha A B` of matrices or stacks in one pass, laid out as C is; `in_place`, in the place of C, which is not copied then."""
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
    """`beta C + alpha A B` `(k, k)` or `(B, k, k)`, where that is known to be symmetric, as C is (None for 0); `in_place`, where C was.

    One large matrix on a CPU is made in panels of rows from the diagonal on, and mirrored: with p panels (p + 1) / 2p of the operations.
    """
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
    """The transpose of a part of a matrix. Rows a multiple of 2 KiB apart share few lines of the cache: they are brought together first."""
    return block.contiguous().mT.contiguous() if block.stride(0) * block.itemsize % 2048 == 0 else block.mT


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of every matrix, `(B, 1, 1)`."""
    if x.size(0) == 1:
        whole: Tensor = torch.linalg.vector_norm(x)  # without dimensions it is faster
        return whole.view(1, 1, 1)
    size: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return size


def peak(x: Tensor) -> Tensor:
    """The largest magnitude in every matrix, `(B, 1, 1)`; NaN where there is one.

    Not the infinity norm, which on a CPU takes forty times as long as the Frobenius norm.
    """
    return x.abs().amax(dim=(-2, -1), keepdim=True)


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite: told by the norm, unless it overflows."""
    return not x.is_floating_point() or bool(torch.linalg.vector_norm(x).isfinite()) or bool(x.isfinite().all())


def magnitude(x: Tensor) -> Tensor:
    """The size of every matrix, `(B, 1, 1)`: its Frobenius norm or, where the squares leave the range, its largest entry."""
    size = norm(x)
    if x.device.type != "cpu" or not bool(((size > 0) & size.isfinite()).all()):
        top = peak(x)
        size = torch.where((size > 0) & size.isfinite(), size, top)
    return size


def divisor(size: Tensor) -> Tensor:
    """`size`, and 1 where that is 0."""
    return torch.where(size == 0, torch.ones_like(size), size)


SAFE = 1e-20  # an eps from which a quotient cannot overflow


def ratio(a: Tensor | float, size: Tensor, eps: float) -> Tensor:
    """`a / (size + eps)`; with an eps near 0, a quotient that overflows is 0: a size of 0 or a subnormal size makes no infinite number."""
    found: Tensor = a / (size + eps)
    return found if eps >= SAFE else found.masked_fill(found.isinf() | (size == 0), 0.0)


def quotient(x: Tensor, size: Tensor) -> Tensor:
    """`X / size` entry by entry; 0 for an entry whose size is 0 or whose quotient overflows."""
    found: Tensor = x / size
    return found.masked_fill(found.isinf() | (size == 0), 0.0)


def unit(x: Tensor) -> Tensor:
    """Every matrix divided by its size, so that products of entries neither overflow nor vanish; 0 stays 0."""
    return x / divisor(magnitude(x))


def unit_columns(x: Tensor, eps: float) -> Tensor:
    """Every column divided by its norm plus eps; with eps 0, a column of 0 stays 0."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return quotient(x, size + eps) if eps < SAFE else x / (size + eps)


# ------------------------------------------------------------------------------------------------------------ decompositions


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD; retried in float64 where it does not converge."""
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
    """Columns `(B, n, r)` with the sign that makes their entry of largest magnitude positive."""
    return u * _signs(u)


def _signs(u: Tensor) -> Tensor:
    # By both ends: finding the place of the largest magnitude takes eight times as long.
    return torch.where(u.amax(dim=-2, keepdim=True) < -u.amin(dim=-2, keepdim=True), -1.0, 1.0).to(u.dtype)


def orthonormal(y: Tensor) -> Tensor:
    """Orthonormal columns with the span of `Y` `(B, n, r)`, n >= r: Q of `Y = Q R` with a diagonal of R >= 0.

    That sign makes Q continuous in Y: a basis that is warm-started moves little. On a CPU by Householder reflections, the faster there; a
    GPU takes them one column at a time, and multiplies instead.
    """
    return _signed(*_reflected(y)) if y.device.type == "cpu" else cholesky_qr(y)


def cholesky_qr(y: Tensor) -> Tensor:
    """`orthonormal` by `Q <- Q C^-1`, `C'C = Q'Q`, Q with columns of norm 1, four times, shifted if that is singular (arXiv:1809.11085).

    Nothing but products and what is done to r x r matrices, and no host waits. All factors are upper triangular, so the Q is that of QR.
    Columns that depend on those before them come out as round-off has it, columns of 0 as unit vectors orthogonal to the others.
    """
    n, r = y.shape[-2:]
    eps = torch.finfo(y.dtype).eps
    unit = torch.eye(n, r, dtype=y.dtype, device=y.device)
    identity = torch.eye(r, dtype=y.dtype, device=y.device)
    # The second pass repairs what the first leaves of a matrix that is well-conditioned but for the size of its columns. One that is
    # singular to round-off takes one pass more to come within reach of the last two.
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
    """`orthonormal` of a square `Y`, where columns that depend on those before them are completed from these and not from round-off."""
    q, pivots = _reflected(y)
    size = pivots.abs()
    held = size > 32 * y.size(-1) * torch.finfo(y.dtype).eps * size.amax(-1, keepdim=True)
    if y.is_meta or bool(held.all()):
        return _signed(q, pivots)
    return _signed(*_reflected(y * held.unsqueeze(-2)))


def _reflected(y: Tensor) -> tuple[Tensor, Tensor]:
    """Q of `Y = QR` by Householder reflections, and the diagonal of R.

    Of R no more is made than that, where there are numbers: masking it takes up to a fourth of a QR.
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

    `exact` by a thin SVD; `gram` by eigh of the smaller of XX' and X'X, several times cheaper, exact for directions above
    sqrt(round-off) of the largest; `randomized` by power iterations from `start` `(B, n, rank + p)`: draws, or a basis and draws.
    One iteration from draws captures 0.99 of the most energy of a gradient with a decaying spectrum, and 0.8 of that of pure noise.
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

    By eigh of the smaller Gram matrix. Directions in which X is only round-off are replaced by those to which the Householder reflections
    of the others take the last unit vectors: they depend on what X holds and on nothing else.
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

    Those of round-off are completed from the others, as in `singular_bases`.
    """
    values, vectors = eigh(a)
    held = values > a.size(-1) * torch.finfo(a.dtype).eps * values[..., :1]
    return fix_signs(_completed(vectors * held.unsqueeze(-2)))


def _completed(y: Tensor) -> Tensor:
    """A square orthonormal basis whose first columns have the span and the directions of the orthogonal columns of `Y` `(B, n, k)`."""
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
    """Nearly `leading_right`, by power iterations from `start` `(B, n, rank + p)`, and the coordinates `X U` `(B, m, rank)`."""
    size = magnitude(x)
    if size.numel() == 1 and size.device.type == "cpu" and 1e-6 < size.item() < 1e6:
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
