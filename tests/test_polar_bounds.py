"""How far is Newton-Schulz from the polar factor, for each bound that divides the matrix?

The last test compares the table in `docs/orthogonalization.md` with the measurement; its failure prints the table.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from subspace_opt import Dim, Step
from subspace_opt.linalg import polar
from subspace_opt.linalg.bounds import MARGIN, Bound, bounded
from subspace_opt.rules.orthogonal import Orthogonalize

PAGE = Path(__file__).parents[1] / "docs" / "orthogonalization.md"
K, L = 128, 256
INDEX = torch.arange(1.0, K + 1, dtype=torch.float64)

# Singular values of a K x L matrix; None: those of normal draws.
SPECTRA: dict[str, Tensor | None] = {
    "all equal": torch.ones(K, dtype=torch.float64),
    "normal draws": None,
    "1 / sqrt(i)": INDEX**-0.5,
    "1 / i": 1 / INDEX,
    "one of 1, others 0.01": torch.where(INDEX == 1, 1.0, 0.01),
    "from 1 to 0.001": 10 ** (-3 * (INDEX - 1) / (K - 1)),
}
SETTINGS: list[tuple[str, int, Bound]] = [
    *((name, 5, bound) for name in ("keller", "quintic", "polar_express") for bound in ("frobenius", "schatten4", "spectral", "aol")),
    ("aol", 4, "aol"),
]
STEP = Step(torch.ones(()), torch.ones(()))


def matrix(spectrum: Tensor | None, rows: int = K, cols: int = L) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    if spectrum is None:
        return torch.randn(1, rows, cols, generator=draws, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=draws, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(cols, rows, generator=draws, dtype=torch.float64))[0]
    return ((left * spectrum) @ right.mT).unsqueeze(0)


def orthogonalized(x: Tensor, coefficients: str, steps: int, bound: Bound, **fields: object) -> Tensor:
    named = {"method": coefficients} if coefficients == "polar_express" else {"coefficients": coefficients}
    rule = Orthogonalize.model_validate({"steps": steps, "bound": bound, **named, **fields})
    return rule.apply(x, x, {}, STEP)[0]


def distance(x: Tensor, o: Tensor) -> float:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return float((o - u @ vh).norm() / (u @ vh).norm())


def plain(x: Tensor, coefficients: str, steps: int, bound: Bound) -> Tensor:
    """Newton-Schulz by its equations, on a wide matrix; the spectral bound takes the exact largest singular value."""
    y = x / x.norm()
    if bound == "aol":
        y = y / (y @ y.mT).abs().sum(-1, keepdim=True).sqrt()
    elif bound != "frobenius":
        schatten4 = torch.linalg.svdvals(y).pow(4).sum().sqrt().sqrt()
        y = y / (schatten4 if bound == "schatten4" else torch.minimum(MARGIN * torch.linalg.svdvals(y)[0], schatten4))
    for a, b, c in polar.schedule(coefficients, steps, 1.02 if coefficients == "polar_express" else 1.0):
        gram = y @ y.mT
        y = a * y + b * gram @ y + c * gram @ gram @ y
    return y


@pytest.mark.parametrize(("coefficients", "steps", "bound"), SETTINGS)
@pytest.mark.parametrize("spectrum", ["normal draws", "1 / i"])
def test_each_bound_by_its_equations(spectrum: str, coefficients: str, steps: int, bound: Bound) -> None:
    known = SPECTRA[spectrum]
    for rows, cols in ((12, 12), (12, 15), (12, 40)):  # the last is iterated on its Gram matrix
        x = matrix(None if known is None else known[:rows], rows, cols)
        exact = plain(x[0], coefficients, steps, bound)
        many = {"power_iterations": 500} if bound == "spectral" else {}
        for turned in (False, True) if rows < cols or bound != "aol" else (False,):  # AOL scales the rows of a square matrix
            got = orthogonalized(x.mT if turned else x, coefficients, steps, bound, eps=0.0, **many)[0]
            assert float((got - (exact.mT if turned else exact)).norm() / exact.norm()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", ["schatten4", "spectral", "aol"])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_bound_is_close_and_hardly_exceeded(name: str, bound: Bound, dtype: torch.dtype) -> None:
    x = matrix(SPECTRA[name])
    y, gram = bounded((x / x.norm()).to(dtype)[0], bound, 8)
    largest = float(torch.linalg.svdvals(y.double())[0])
    round_off = 1e-2 if dtype == torch.bfloat16 else 1e-5
    least = {"spectral": 0.9, "schatten4": K**-0.25, "aol": 0.1}[bound]
    assert least - round_off < largest < 1 + round_off
    product = y.double() @ y.double().mT
    assert float((gram.double() - product).norm() / product.norm()) < 3 * round_off


def test_a_row_apart_does_not_hide_the_largest_direction() -> None:
    """A block of equal rows has a larger singular value than the longest row."""
    x = torch.zeros(64, 64, dtype=torch.float64)
    x[0, 0], x[1:, 1:] = 1.0, 0.12
    y, _ = bounded(x / x.norm(), "spectral", 8)
    assert 0.9 < float(torch.linalg.svdvals(y)[0]) < 1.0


@pytest.mark.parametrize("bound", ["schatten4", "spectral", "aol"])
def test_zero_stays_zero_and_rows_of_zero_too(bound: Bound) -> None:
    x = torch.zeros(2, 5, 7, dtype=torch.float64)
    x[1, :3] = matrix(None, 3, 7)[0]
    o = orthogonalized(x, "quintic", 5, bound, eps=0.0)
    assert bool(o.isfinite().all())
    assert not bool(o[0].any() or o[1, 3:].any())


def test_the_cost_of_power_iterations_is_declared() -> None:
    sides = Dim("rows", 64), Dim("cols", 96)
    extra = Orthogonalize(bound="spectral").flops(*sides) - Orthogonalize().flops(*sides)
    assert extra == 2.0 * 64 * 64 * 8 * 9  # eight vectors, eight iterations and the quotient


def measured() -> str:
    """The table of the page."""
    lines = [f"| coefficients | steps | `bound` | {' | '.join(SPECTRA)} |", "| --- | --- | --- |" + " --- |" * len(SPECTRA)]
    for coefficients, steps, bound in SETTINGS:
        gaps = [distance(x, orthogonalized(x, coefficients, steps, bound)) for x in map(matrix, SPECTRA.values())]
        lines.append(f"| `{coefficients}` | {steps} | `{bound}` | {' | '.join(f'{gap:.2f}' for gap in gaps)} |")
    return "\n".join(lines)


def test_the_distances_of_the_page_are_measured() -> None:
    table = measured()
    assert table in PAGE.read_text(encoding="utf-8"), f"the measurement gives\n{table}"
