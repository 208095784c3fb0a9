"""Rounding of low-precision weights, and private random generators."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from ..plan.views import Block

Rounding = Literal["nearest", "stochastic", "kahan"]

# dtype -> (bits of mantissa, exponent of the smallest positive number)
FORMATS = {torch.bfloat16: (7, -133), torch.float16: (10, -24)}


def stochastic(y: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round `y` to one of its two neighbours in `dtype`, the nearer more often, so that the expectation is y.

    A number that `dtype` holds exactly stays: a weight without update does not wander. `noise`: uniform in [0, 1), as `y`.
    """
    bits, smallest = FORMATS[dtype]
    exponent = torch.frexp(y).exponent - 1  # y = 1.f * 2^exponent
    ulp = torch.ldexp(torch.ones_like(y), (exponent - bits).clamp_min(smallest))
    below = (y / ulp).floor()  # exact: the divisor is a power of two, and few digits are left
    return ((below + (noise < y / ulp - below)) * ulp).to(dtype)


def rounding_draw(key: str, block: Block, i: int, count: int, seed: int, like: Tensor) -> Tensor:
    """Uniform draws for matrix `i` of a block, or for the cut of it that a rank holds.

    They depend on (seed, parameter's key, matrix, update) alone, so other stacks or shards give the same draws.
    """
    top, left, rows, cols = block.window or (0, 0, block.rows, block.cols)
    words = (seed, "rounding", key, block.name, block.first + i, count)
    whole = torch.empty(rows, cols, dtype=like.dtype, device=like.device).uniform_(generator=generator(like.device, *words))
    return whole[top : top + block.rows, left : left + block.cols]


def generator(device: torch.device, *words: object) -> torch.Generator:
    """A private generator whose seed is a hash of `words`: the same on every rank and after every resume."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
