"""Factors of a layer's sides: the sizes of the small dimensions whose product is the side."""

from __future__ import annotations

import math
from functools import lru_cache

SPREAD = 2  # with `pad`, exact factors are kept if the largest is at most this multiple of n^(1/parts)


class FactorError(ValueError):
    """A side has no usable factors."""


def factorize(n: int, parts: int, *, pad: bool = False) -> tuple[int, ...]:
    """Return at most `parts` factors of `n` in ascending order, with the smallest possible largest factor.

    Args:
        pad: Allow a product above `n` if `n` has no balanced factors. The layer then computes with padded sides and cuts the rest off.

    Raises:
        FactorError: `n` is prime, `parts` is above 1, and `pad` is False.
        ValueError: `n` or `parts` is below 1.
    """
    if n < 1 or parts < 1:
        raise ValueError(f"factorize({n}, {parts}): both numbers must be at least 1")
    exact = tuple(f for f in _balanced(n, parts, 1) if f > 1) or (1,)
    if pad:
        return exact if exact[-1] <= SPREAD * root_above(n, parts) else _above(n, parts)
    if len(exact) == 1 < parts and n > 1:
        near = math.prod(_above(n, parts))
        raise FactorError(
            f"{n} is prime, so it has no {parts} factors; pass pad=True (it computes with {near}), or give the factors yourself"
        )
    return exact


def root_above(n: int, k: int) -> int:
    """The smallest integer whose k-th power is at least `n`."""
    f: int = max(1, round(float(n) ** (1 / k)))
    while f**k < n:
        f += 1
    while f > 1 and (f - 1) ** k >= n:
        f -= 1
    return f


def _above(n: int, parts: int) -> tuple[int, ...]:
    """Balanced factors whose product is at least `n`, close to it."""
    factors: list[int] = []
    for k in range(parts, 0, -1):
        factors.append(root_above(-(-n // math.prod(factors)), k))
    return tuple(sorted(factors))


@lru_cache(maxsize=4096)
def _balanced(n: int, parts: int, least: int) -> tuple[int, ...]:
    """Exactly `parts` factors of `n`, ascending from `least` on, ones included; the largest, then the sum, is as small as possible."""
    if parts == 1:
        return (n,)
    found = [(d, *_balanced(n // d, parts - 1, d)) for d in range(least, root_above(n, parts) + 1) if n % d == 0 and d**parts <= n]
    return min(found, key=lambda factors: (factors[-1], sum(factors))) if found else (1,) * (parts - 1) + (n,)
