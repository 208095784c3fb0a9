"""Symmetric products by a Triton kernel, and Newton-Schulz on the Gram matrix."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from subspace_opt.linalg import kernels, polar, products

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install 'subspace-opt[triton]' (Linux)"
)

# Stacks and shapes: less than one tile of 16, several tiles and a rest, odd and even numbers of tiles.
SIZES = ((1, 5, 7), (1, 49, 20), (2, 32, 33))
CASES = [
    *([name, *size, layout, "small"] for name, size, layout in product(("float32", "bfloat16"), SIZES, ("row-major", "strided"))),
    ["bfloat16", 40, 9, 12, "strided", "small"],
    ["float32", 2, 35, 50, "column-major", "small"],
    ["float16", 1, 35, 50, "column-major", "small"],
    ["float32", 1, 130, 70, "row-major", "full"],  # the tiles that a GPU takes
    ["bfloat16", 1, 130, 70, "row-major", "full"],
]
# Triton's interpreter cuts bits off where a GPU rounds to nearest, so that bfloat16 has twice the error of rounding.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """The results of `triton_cases`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_cases", json.dumps(CASES)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("given", CASES, ids=lambda given: "-".join(map(str, given)))
def test_the_kernel_computes_symmetric_products(given: list[Any], interpreted: dict[str, Any]) -> None:
    """`X X'`, `b A + c A A` and `a Q + P Q`, against float64; every product is one launch."""
    found = interpreted[json.dumps(given)]
    assert found["calls"] == 3
    assert max(found["errors"]) < TOLERANCE[given[0]], found["errors"]


@pytest.mark.slow
@needs_triton
def test_newton_schulz_takes_the_kernel(interpreted: dict[str, Any]) -> None:
    found = interpreted["newton_schulz"]
    assert found["calls"] == 2 * (1 + 3 + 2 * 2 + 2)  # `X X'`, `b A + c A A`, `P A P`, products of polynomials; two shapes
    assert max(found["errors"]) < 1e-5


@pytest.mark.parametrize("rows", [8, 20])
@pytest.mark.parametrize("name", sorted(polar.SCHEDULES))
def test_the_gram_matrix_gives_the_plain_iteration(name: str, rows: int) -> None:
    """Several polynomials on the Gram matrix alone, applied to X together, in float64; tall and wide, a stack and one matrix."""
    polynomials = polar.schedule(name, 7, 1.02)
    for shape in ((3, rows, 50), (1, 50, rows)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        for a, b, c in polynomials:
            gram = y @ y.mT
            y = a * y + (b * gram + c * gram @ gram) @ y
        assert polar._together(rows, 50, polynomials, torch.float64) > 1
        torch.testing.assert_close(polar.newton_schulz(x, polynomials, eps=0.0), y, rtol=0, atol=1e-11)


def test_the_gram_matrix_takes_fewer_operations_where_it_is_used() -> None:
    """The count of `flops`, with every symmetric product at half or at full cost."""
    polynomials = polar.schedule("quintic", 5)
    for ratio in (1.6, 4.0):
        plain = polar.flops(100, 100, polynomials, torch.bfloat16) + (ratio - 1) * 5 * 3 * 100**3
        assert polar.flops(100, int(100 * ratio), polynomials, torch.bfloat16) < plain


def test_where_the_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU never, and nowhere if the environment says no; a bad value of the variable is refused."""
    a = torch.randn(4, 8)
    with kernels.triton_from(1):
        assert not kernels.serves(a)
        torch.testing.assert_close(products.symmetric(a, a.mT), a @ a.mT)
    kernels.has_triton.cache_clear()
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert not kernels.has_triton()
    kernels.has_triton.cache_clear()
    monkeypatch.setenv(kernels.SWITCH, "off")
    with pytest.raises(ValueError, match="SUBSPACE_OPT_TRITON is 'off'; set 0"):
        kernels.has_triton()
    kernels.has_triton.cache_clear()
