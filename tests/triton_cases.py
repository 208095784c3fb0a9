"""Symmetric products by the Triton kernel, in Triton's interpreter on a CPU; prints their errors as JSON.

Run as a process of its own with TRITON_INTERPRET=1, because Triton reads that when it is imported: see `test_kernels`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from subspace_opt.linalg import kernels, polar, products

SMALL = (16, 16, 1, 1)  # tiles of 16 x 16, so that a small matrix has several


def row_major(x: Tensor) -> Tensor:
    return x


def column_major(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def strided(x: Tensor) -> Tensor:
    """Every second row and every third column of a larger stack, which has room between its matrices too."""
    room = torch.full((2 * x.size(0), 2 * x.size(1) + 3, 3 * x.size(2) + 5), float("nan"), dtype=x.dtype)
    view = room[::2, 1 : 1 + 2 * x.size(1) : 2, 2 : 2 + 3 * x.size(2) : 3]
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"row-major": row_major, "column-major": column_major, "strided": strided}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def products_of(x: Tensor) -> tuple[float, float, float]:
    """Errors of `X X'`, of `b A + c A A`, and of `a Q + P Q` for commuting P and Q, against float64."""
    gram = products.symmetric(x, x.mT)
    wide = x.double()
    a = gram.double()
    square = products.symmetric(gram, gram, gram, beta=-0.5, alpha=0.25)
    other = square.double()
    mixed = products.symmetric(square, gram, gram, beta=0.75)
    return (
        error(gram, wide @ wide.mT),
        error(square, -0.5 * a + 0.25 * a @ a),
        error(mixed, 0.75 * a + (other @ a + a @ other) / 2),
    )


def case(dtype: torch.dtype, stack: int, rows: int, cols: int, layout: str) -> tuple[float, float, float]:
    draws = torch.Generator().manual_seed(rows * cols + stack)
    x = torch.randn(stack, rows, cols, generator=draws).div(cols**0.5).to(dtype)
    return products_of(LAYOUTS[layout](x))


def newton_schulz(rows: int, cols: int) -> float:
    """The difference between Newton-Schulz with the kernel and without it, in float32."""
    x = torch.randn(2, rows, cols, generator=torch.Generator().manual_seed(0))
    steps = polar.schedule("quintic", 3)
    with kernels.triton_from(1):
        by_kernel = polar.newton_schulz(x, steps)
    with kernels.triton_from(None):
        return error(by_kernel, polar.newton_schulz(x, steps).double())


def main() -> None:
    warnings.simplefilter("ignore")  # Triton warns of its own defaults
    from subspace_opt.linalg import triangle

    calls = 0
    plain = triangle.symmetric_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            nonlocal calls
            calls += 1
            return plain[grid]

    triangle.symmetric_kernel = Counted()
    own, found = triangle.TILES, {}
    with kernels.triton_from(1):
        for given in json.loads(sys.argv[1]):
            name, stack, rows, cols, layout, tiles = given
            triangle.TILES = {2: SMALL, 4: SMALL} if tiles == "small" else own
            before = calls
            errors = case(getattr(torch, name), stack, rows, cols, layout)
            found[json.dumps(given)] = {"errors": errors, "calls": calls - before}
    triangle.TILES, before = {4: SMALL}, calls
    errors = [newton_schulz(*shape) for shape in ((18, 40), (40, 18))]
    found["newton_schulz"] = {"errors": errors, "calls": calls - before}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
