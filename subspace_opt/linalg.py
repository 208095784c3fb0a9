"""Linear algebra on stacks of matrices `(B, m, n)`: products, orthogonalization, bases, and the discrete cosine transform.

Pure functions. Statistics and decompositions run in the dtype they are given, which is float32 at least. The sign of a singular
vector is arbitrary and moments outlive a refresh, so every function that returns a basis fixes the signs by one rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]


def mm(a: Tensor, b: Tensor) -> Tensor:
    """`A B` of two stacks; a stack of one takes the unbatched product, which a CPU runs faster."""
    if a.size(0) == 1 and b.size(0) == 1:
        return (a[0] @ b[0]).unsqueeze(0)
    return torch.bmm(a, b)


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """`beta C + alpha A B` of stacks in one pass."""
    if c.size(0) == 1:
        return torch.addmm(c[0], a[0], b[0], beta=beta, alpha=alpha).unsqueeze(0)
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of every matrix, `(B, 1, 1)`."""
    size: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return size


def peak(x: Tensor) -> Tensor:
    """The largest magnitude in every matrix, `(B, 1, 1)`; NaN where there is one.

    Not the infinity norm, which on a CPU takes forty times as long as the Frobenius norm.
    """
    return x.abs().amax(dim=(-2, -1), keepdim=True)


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite: told by the norm, unless it overflows."""
    return bool(torch.linalg.vector_norm(x).isfinite()) or bool(x.isfinite().all())


def unit_peak(x: Tensor) -> Tensor:
    """Every matrix divided by its largest entry, so that products of entries neither overflow nor vanish; 0 stays 0."""
    top = peak(x)
    return x / torch.where(top > 0, top, torch.ones_like(top))


def unit_columns(x: Tensor, eps: float) -> Tensor:
    """Every column divided by its norm plus eps."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return x / (size + eps)


# --------------------------------------------------------------------------------------------------------- orthogonalization

#: Odd polynomials `a x + b x^3 + c x^5`, one per step, and what follows the last: `cycle` through the list or `repeat` its end.
SCHEDULES: dict[str, tuple[tuple[Polynomial, ...], Literal["cycle", "repeat"]]] = {
    # Keller Jordan's Muon: largest slope at 0 that still converges into about [0.7, 1.2].
    "keller": (((3.4445, -4.7750, 2.0315),), "repeat"),
    # One polynomial per step, by You Jiacheng: after five steps within [0.98, 1.03] for inputs in [0.01, 1].
    "quintic": (
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "cycle",
    ),
    # Cubic by step: two products instead of three, a wider output range.
    "cubic": (
        (
            (3.3657, -3.3421, 0.0),
            (2.5744, -1.4957, 0.0),
            (2.5369, -1.4313, 0.0),
            (2.4419, -1.2764, 0.0),
            (2.2230, -0.9631, 0.0),
        ),
        "repeat",
    ),
    # The Taylor polynomial of degree 5: slow, monotone, no overshoot.
    "classical": (((1.875, -1.25, 0.375),), "repeat"),
    # Polar Express (arXiv:2505.16932), minimax for singular values in [1e-3, 1]; as published it diverges just above 1.
    "polar_express": (
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115951949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        "repeat",
    ),
    # Chebyshev-optimal (CANS, arXiv:2506.10935); like Polar Express it needs a safety factor.
    "cans": (
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        "repeat",
    ),
}


def schedule(coefficients: str | Sequence[Polynomial], steps: int, safety: float = 1.0) -> tuple[Polynomial, ...]:
    """The polynomials of `steps` iterations. `safety` s > 1 evaluates every one but the last listed at x / s, which moves the
    point of divergence from 1 to s (a / s, b / s^3, c / s^5)."""
    if isinstance(coefficients, str):
        listed, after = SCHEDULES[coefficients]
    else:
        listed, after = tuple(coefficients), "repeat"
    safe = [(a / safety, b / safety**3, c / safety**5) for a, b, c in listed]
    if len(safe) > 1:
        safe[-1] = listed[-1]
    return tuple(safe[i % len(safe)] if after == "cycle" else safe[min(i, len(safe) - 1)] for i in range(steps))


def newton_schulz(
    x: Tensor, polynomials: Sequence[Polynomial], *, eps: float = 1e-7, floor: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """`X <- a X + b (XX') X + c (XX')^2 X`, repeated: an approximation of the polar factor `U V'` of `X = U S V'`.

    Args:
        x: `(B, m, n)`.
        eps: Added to the Frobenius norm by which X is divided; with `floor`, the least norm to divide by.
        dtype: In which to iterate (default: that of `x`). The result has it too.
    """
    size = norm(x)
    size = size.clamp_min(eps) if floor else size + eps
    y = (x / size).to(dtype or x.dtype)
    tall = y.size(-2) > y.size(-1)
    if tall:
        y = y.mT
    for a, b, c in polynomials:
        gram = mm(y, y.mT)
        poly = b * gram if c == 0.0 else addmm(gram, gram, gram, beta=b, alpha=c)
        y = addmm(y, poly, y, beta=a)
    return y.mT if tall else y


def polar(x: Tensor) -> Tensor:
    """The exact polar factor `U V'` of `X = U S V'` `(B, m, n)`, restricted to singular values above round-off: polar(0) = 0."""
    u, s, vh = svd(unit_peak(x))
    tau = max(x.size(-2), x.size(-1)) * torch.finfo(x.dtype).eps
    kept = (s > tau * s[..., :1]) & (s > 0)
    return mm(u * kept.unsqueeze(-2).to(u.dtype), vh)


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
    lead = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    return u * torch.where(lead < 0, -1.0, 1.0).to(u.dtype)


def orthonormal(y: Tensor) -> Tensor:
    """Orthonormal columns with the span of `Y` `(B, n, r)`, n >= r: Q of `Y = Q R` with a diagonal of R >= 0.

    That sign makes Q continuous in Y: a basis that is warm-started moves little.
    """
    q, r = torch.linalg.qr(y)
    signs: Tensor = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    fixed: Tensor = q * signs.unsqueeze(-2)
    return fixed


def leading_right(x: Tensor, rank: int, method: Literal["exact", "gram", "randomized"] = "exact", noise: Tensor | None = None) -> Tensor:
    """The leading right singular vectors of `X` `(B, m, n)` as columns `(B, n, rank)`, in descending order.

    `exact` by a thin SVD; `gram` by eigh of the smaller of XX' and X'X, several times cheaper, exact for directions above
    sqrt(round-off) of the largest; `randomized` by two power iterations from the draws `noise` `(B, n, rank + p)`.
    """
    x = unit_peak(x)
    if method == "exact":
        u = svd(x)[2][..., :rank, :].mT
    elif method == "gram":
        u = _by_gram(x, rank)
    else:
        if noise is None:
            raise ValueError("a randomized range needs `noise`")
        u = _by_sketch(x, rank, noise)
    return fix_signs(u)


def _by_gram(x: Tensor, rank: int) -> Tensor:
    if x.size(-1) <= x.size(-2):
        return eigh(mm(x.mT, x))[1][..., :rank]
    left = eigh(mm(x, x.mT))[1][..., :rank]
    return orthonormal(mm(x.mT, left))


def _by_sketch(x: Tensor, rank: int, noise: Tensor, iterations: int = 2) -> Tensor:
    q = noise
    for _ in range(iterations):
        q = orthonormal(mm(x.mT, mm(x, q)))
    inner = mm(x, q)  # (B, m, rank + p)
    return mm(q, eigh(mm(inner.mT, inner))[1][..., :rank])


# ------------------------------------------------------------------------------------------------- discrete cosine transform


def cosines(n: int) -> Tensor:
    """`cos(pi k / 2n)` for k in [0, 4n), float64: every entry of the transforms of size n is one of these."""
    return torch.cos(math.pi / (2 * n) * torch.arange(4 * n, dtype=torch.float64))


def dct_table(n: int, kind: Literal["dct2", "dct3"]) -> Tensor:
    """The orthonormal `(n, n)` float64 table whose columns are the atoms of the DCT-II (or, transposed, of the DCT-III).

    `(DCT-II atom i)_j = sqrt(2/n) c_i cos(pi i (2j + 1) / 2n)`, c_0 = 1/sqrt(2), else 1.
    """
    return dct_atoms(torch.arange(n), cosines(n), kind)


def dct_atoms(index: Tensor, cosine: Tensor, kind: Literal["dct2", "dct3"]) -> Tensor:
    """Columns `index` `(..., r)` of `dct_table(n)`, `(..., n, r)`, from `cosine = cosines(n)`, whose dtype they have."""
    n = cosine.size(0) // 4
    along = torch.arange(n, device=index.device)[:, None]
    picked = index.unsqueeze(-2)
    i, j = (picked, along) if kind == "dct2" else (along, picked)
    # The angle is reduced in integers: in floating point a large argument of cos loses digits.
    table = cosine[(i * (2 * j + 1)) % (4 * n)] * math.sqrt(2.0 / n)
    return torch.where(i == 0, table * math.sqrt(0.5), table)


def dct(x: Tensor, kind: Literal["dct2", "dct3"]) -> Tensor:
    """`X T` with `T = dct_table(n, kind)` for `X` `(..., n)` by an n-point FFT (Makhoul 1980), O(n log n) a row."""
    n = x.size(-1)
    k = torch.arange(n, device=x.device)
    twist = torch.exp(-0.5j * math.pi / n * k.double()).to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    unit = torch.full((n,), math.sqrt(2.0 / n), dtype=x.dtype, device=x.device)
    unit[0] = math.sqrt(1.0 / n)
    order = torch.cat([k[::2], k[1::2].flip(0)])
    if kind == "dct2":
        coefficients: Tensor = (torch.fft.fft(x[..., order]) * twist).real
        return coefficients * unit
    # The DCT-III is the inverse of the DCT-II: undo the scaling, the twist and the permutation.
    y = x * (unit * n / 2)
    y = torch.cat([y[..., :1] * 2, y[..., 1:]], dim=-1)
    imaginary = torch.cat([torch.zeros_like(y[..., :1]), y[..., 1:].flip(-1)], dim=-1)
    v = torch.fft.ifft(torch.complex(y, -imaginary) * twist.conj()).real
    out = torch.empty_like(v)
    out[..., order] = v
    return out


# ---------------------------------------------------------------------------------------------------------------- 8-bit blocks

BLOCK = 128  # entries that share a scale


def to_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """`round(127 x / s)` int8 in the shape of `x` `(B, m, n)`, and s `(B, blocks)`, the largest of each 128 entries in row-major order."""
    flat = x.flatten(1)
    padded = torch.nn.functional.pad(flat, (0, -flat.size(1) % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = padded.abs().amax(-1)
    codes = (padded * (127 / torch.where(scale > 0, scale, torch.ones_like(scale))).unsqueeze(-1)).round().to(torch.int8)
    return codes.flatten(1)[:, : flat.size(1)].reshape(x.shape), scale


def from_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """The entries that `to_codes` rounded, in the dtype of `scale`."""
    each = scale.repeat_interleave(BLOCK, dim=1)[:, : codes[0].numel()]
    return (codes.flatten(1).to(scale.dtype) * (each / 127)).reshape(codes.shape)
