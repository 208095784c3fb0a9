"""The discrete cosine transform: tables, single columns, and the fast transform."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


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


def dct_sizes(n: int, kind: Literal["dct2", "dct3"], at_once: int = 512) -> Tensor:
    """The l1 norms `(n,)` of the columns of `dct_table(n)`, float64; the table is never whole in memory."""
    cosine, atoms = cosines(n), torch.arange(n)
    return torch.cat([dct_atoms(some, cosine, kind).abs().sum(0) for some in atoms.split(at_once)])


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
