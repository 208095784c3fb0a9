"""The polar factor `U V'` of `X = U S V'`, by iterations of odd polynomials or exactly, for stacks `(B, m, n)`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .bases import eigh, svd
from .bounds import Bound, bounded
from .products import addmm, mm, symmetric
from .sizes import SAFE, divisor, is_readable, norm, unit

Polynomial = tuple[float, float, float]

#: Odd polynomials `a x + b x^3 + c x^5`, one per step, and the continuation after the last: `cycle` through the list or `repeat` its end.
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
    # A cubic polynomial for each step takes two products instead of three, and has a wider output range.
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
    # Polar Express for an input divided by 1.02 times its norm, as in Dion's code: the 1.02 is part of all polynomials but the last.
    "dion": (
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        "repeat",
    ),
    # Ten steps of DeepSeek: eight of Keller Jordan's, then two of a polynomial with slope 0 at 1.
    "deepseek": ((*[(3.4445, -4.7750, 2.0315)] * 8, (2.0, -1.5, 0.5)), "repeat"),
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


# For rows scaled by AOL (`bound="aol"`), by Turbo-Muon (arXiv:2512.04632): four steps. It turns singular values above 0.883 around.
SCHEDULES["aol"] = (
    ((4.0098, -7.0585, 2.4635), (3.4585, -5.5479, 2.5959), (2.7573, -3.2939, 1.4254), (2.7215, -3.0494, 1.3169)),
    "repeat",
)


@functools.lru_cache(maxsize=64)  # bounded, because `safety` may follow a schedule
def schedule(coefficients: str | tuple[Polynomial, ...], steps: int, safety: float = 1.0) -> tuple[Polynomial, ...]:
    """The polynomials of `steps` iterations.

    `safety` s > 1 evaluates every polynomial but the last listed one at x / s (a / s, b / s^3, c / s^5): the iteration then diverges above
    s instead of 1.
    """
    if isinstance(coefficients, str):
        listed, after = SCHEDULES[coefficients]
    else:
        listed, after = coefficients, "repeat"
    safe = [(a / safety, b / safety**3, c / safety**5) for a, b, c in listed]
    if len(safe) > 1:
        safe[-1] = listed[-1]
    return tuple(safe[i % len(safe)] if after == "cycle" else safe[min(i, len(safe) - 1)] for i in range(steps))


# Ratio of the sides from which iterating on the Gram matrix pays. Two polynomials on X (k, n) take 8 k^2 n + 4 k^3 operations, or with
# symmetric products at half 6 k^2 n + 2 k^3. On the Gram matrix they take 4 k^2 n + 10 k^3, or 3 k^2 n + 5 k^3: fewer from n = 1.5 k, or
# n = k. The risk in bfloat16 is that of `_together`.
ELONGATED = 1.6


def newton_schulz(
    x: Tensor,
    polynomials: Sequence[Polynomial],
    *,
    eps: float = 1e-7,
    floor: bool = False,
    margin: float = 1.0,
    dtype: torch.dtype | None = None,
    bound: Bound = "frobenius",
    power_iterations: int = 8,
) -> Tensor:
    """`X <- a X + b (XX') X + c (XX')^2 X`, repeated: an approximation of the polar factor `U V'` of `X = U S V'`.

    Every product is taken on the short side. If the long side is much longer, a few polynomials in a row are evaluated on the Gram matrix
    alone and applied to X together (`_group`).

    Args:
        x: `(B, m, n)`.
        eps: Added to the Frobenius norm that divides X; with `floor`, the least divisor.
        margin: A factor of the norm that divides X.
        dtype: Dtype of the iteration and of the result (default: that of `x`). The result may be column-major.
        bound: What divides X after its Frobenius norm, see `bounded`.
        power_iterations: Those of bound `spectral`.
    """
    dtype = dtype or x.dtype
    if eps < SAFE:  # the squares of a norm may underflow to 0
        x = unit(x)
    size = divisor(norm(x)) if eps < SAFE else norm(x)
    size = size if margin == 1.0 else size * margin
    size = size.clamp_min(eps) if floor else size + eps
    # The division is a pass of its own: as a factor of the first polynomial it would make oneDNN compile a product for every new number.
    if dtype == torch.bfloat16 and x.dtype == torch.float32:  # bfloat16 has the same range, so the division can run on half the bytes
        inverse = 1.0 / size
        alone = x.size(0) == 1 and is_readable(x)
        y = x.to(dtype).mul_(inverse.item() if alone else inverse)  # a factor of another dtype would copy y there and back
    else:
        y = (x / size).to(dtype)
    y = y[0] if x.size(0) == 1 else y
    tall = y.size(-2) > y.size(-1)
    if tall:
        y = y.mT
    together = _together(y.size(-2), y.size(-1), tuple(polynomials), dtype)
    gram = None
    if bound != "frobenius":
        y, gram = bounded(y, bound, power_iterations)
    for start in range(0, len(polynomials), together):
        y, gram = _group(y, polynomials[start : start + together], gram), None
    y = y.mT if tall else y
    return y.unsqueeze(0) if x.size(0) == 1 else y


#: The relative error of a value after one polynomial on the Gram matrix alone: measured, with a margin.
OFF = {torch.bfloat16: 0.03, torch.float16: 0.03, torch.float32: 1e-3, torch.float64: 0.0}


def _together(short: int, long: int, polynomials: tuple[Polynomial, ...], dtype: torch.dtype) -> int:
    """The number of polynomials to apply as one.

    On the Gram matrix, round-off of large singular values hides small ones, and every polynomial multiplies it by up to 12. Computing the
    Gram matrix again after two polynomials in bfloat16, or three in float32, keeps the accuracy of the plain iteration. Polar Express and
    CANS send a value just above their range far out, which leaves no room for this error in bfloat16: their polynomials go one by one.
    """
    if long < ELONGATED * short:
        return 1
    most = 2 if dtype in (torch.bfloat16, torch.float16) else 3
    return next(size for size in range(most, 0, -1) if size == 1 or _bounded(polynomials, size, OFF[dtype]))


#: Functions of shapes and coefficients alone. A compiler takes their results as constants.
CONSTANT = (_together,)


@functools.lru_cache(maxsize=64)
def _bounded(polynomials: tuple[Polynomial, ...], together: int, off: float) -> bool:
    """True if an iteration from [0, 1] ends below 1.6, even with a relative error of `off` between two polynomials of a group."""
    x = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)
    for i, (a, b, c) in enumerate(polynomials):
        if i % together:
            x = x * (1 + off)
        x = x * (a + x**2 * (b + c * x**2))
    return bool(x.abs().max() < 1.6)


def flops(short: int, long: int, polynomials: Sequence[Polynomial], dtype: torch.dtype) -> float:
    """Floating-point operations of `newton_schulz` on one matrix; a symmetric product counts half."""
    k, wide = float(short), float(long)
    total, together = 0.0, _together(short, long, tuple(polynomials), dtype)
    for start in range(0, len(polynomials), together):
        group = polynomials[start : start + together]
        small = sum(1 for _, _, c in group if c) + 2 * (len(group) - 1) + (len(group) - 1)  # A A; P A P; the product of the P
        total += k * k * wide + small * k**3 + 2 * k * k * wide
    return total


def _group(y: Tensor, polynomials: Sequence[Polynomial], gram: Tensor | None = None) -> Tensor:
    """`p_k(...p_1(Y))`, with `p(Y) = P Y`, `P = a I + b A + c A^2` and `A = YY'`, and `A <- P A P` from one to the next.

    All factors are polynomials of A, so they commute and their products are symmetric. `gram`: A, if it is known.
    """
    gram = symmetric(y, y.mT) if gram is None else gram
    product: Tensor | None = None  # of the polynomials so far
    for i, (a, b, c) in enumerate(polynomials):
        rest = b * gram if c == 0.0 else symmetric(gram, gram, gram, beta=b, alpha=c)  # P - a I
        if len(polynomials) == 1:
            return addmm(y, rest, y, beta=a)
        if i + 1 < len(polynomials):
            for _ in range(2):
                gram = symmetric(rest, gram, gram, beta=a)
        if product is None:
            product = rest
            product.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            product = symmetric(rest, product, product, beta=a)
    return y if product is None else mm(product, y)


def polar(x: Tensor) -> Tensor:
    """The exact polar factor `U V'` of `X = U S V'` `(B, m, n)`, restricted to singular values above round-off: polar(0) = 0."""
    tau = max(x.size(-2), x.size(-1)) * torch.finfo(x.dtype).eps
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return _polar_by_gram(x.mT, tau).mT if x.size(-2) < x.size(-1) else _polar_by_gram(x, tau)
    u, s, vh = svd(unit(x))
    kept = (s > tau * s[..., :1]) & (s > 0)
    return mm(u * kept.unsqueeze(-2).to(u.dtype), vh)


def _polar_by_gram(x: Tensor, tau: float) -> Tensor:
    """`X V S^-1 V'` of a tall float32 matrix, from `X'X = V S^2 V'` in float64: half the time of an SVD in float32, and more accurate.

    In float64 the squares of all singular values above the round-off of float32 are exact enough.
    """
    y = unit(x).double()
    energy, v = eigh(mm(y.mT, y))  # descending
    kept = (energy > tau**2 * energy[..., :1]) & (energy > 0)
    inverse = torch.where(kept, energy, 1.0).rsqrt() * kept
    return mm(y, mm(v * inverse.unsqueeze(-2), v.mT)).to(x.dtype)
