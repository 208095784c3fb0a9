"""`Linear` gives the same matrix as dense arithmetic after sums, products and transposes, with as few operations as expected."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspace_opt.algebra import Basis, Linear, lift
from subspace_opt.algebra.linear import norm

B, M, N, R = 2, 5, 4, 3


class Count(TorchDispatchMode):
    """Counts dispatched operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func).split(".")[1]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(n for name, n in self.calls.items() if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(B, size, R, seed=seed))[0]


BASES = {
    "right": Basis(right=columns(N, 1)),
    "left": Basis(left=columns(M, 2)),
    "both": Basis(left=columns(M, 3), right=columns(N, 4)),
    "picked columns": Basis(right=torch.tensor([[0, 2, 3], [1, 0, 2]])),
    "picked rows": Basis(left=torch.tensor([[4, 1, 0], [2, 3, 0]])),
    "gated": Basis(right=columns(N, 5), gate=torch.tensor([1.0, 0.0], dtype=torch.float64)),
    "modes": Basis(right=(torch.linalg.qr(random(B, 2, 2, seed=6))[0], 2)),
    "all": Basis(gate=torch.tensor([0.0, 1.0], dtype=torch.float64)),
}


def coords(basis: Basis, seed: int) -> Tensor:
    rows = M if basis.left is None else R
    cols = N if basis.right is None or isinstance(basis.right, tuple) else R
    return random(B, rows, cols, seed=seed)


leaf = st.tuples(st.sampled_from(["dense", *BASES]), st.integers(0, 50))
expression = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.tuples(st.just("+"), inner, inner),
        st.tuples(st.just("-"), inner, inner),
        st.tuples(st.just("float"), st.sampled_from([0.0, 1.0, -0.5, 3.0]), inner),
        st.tuples(st.just("number"), st.integers(0, 5), inner),
        st.tuples(st.just("read"), inner),
    ),
    max_leaves=6,
)


def build(tree: Any) -> tuple[Linear, Tensor]:
    """The expression of a tree, and the same matrix by dense arithmetic."""
    match tree:
        case ("dense", int(seed)):
            x = random(B, M, N, seed=seed)
            return Linear.of(x), x
        case (str(name), int(seed)) if name in BASES:
            c = coords(BASES[name], seed)
            return Linear.lifted(c, BASES[name], M, N), lift(c, BASES[name], M, N)
        case ("+", left, right):
            (a, x), (b, y) = build(left), build(right)
            return a + b, x + y
        case ("-", left, right):
            (a, x), (b, y) = build(left), build(right)
            return a - b, x - y
        case ("float", number, inner):
            a, x = build(inner)
            return number * a, number * x
        case ("number", seed, inner):
            a, x = build(inner)
            number = random(B, 1, 1, seed=seed)
            return a * number, number * x
        case ("read", inner):
            a, x = build(inner)
            torch.testing.assert_close(a.dense(), x, rtol=1e-10, atol=1e-10)
            return a, x
    raise AssertionError(tree)


@settings(max_examples=150, deadline=None)
@given(expression)
def test_an_expression_is_its_matrix(tree: Any) -> None:
    made, exact = build(tree)
    assert made.shape == (B, M, N)
    torch.testing.assert_close(made.norm(), torch.linalg.matrix_norm(exact, keepdim=True), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm(made.mT.dense()), made.norm(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.mT.dense(), exact.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.dense(), exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.mT.mT.dense(), exact, rtol=1e-9, atol=1e-9)


def test_lifts_from_one_basis_are_one_product() -> None:
    basis, x = BASES["right"], random(B, M, N)
    a, b = (Linear.lifted(random(B, M, R, seed=seed), basis, M, N) for seed in (1, 2))
    with Count() as count:
        (Linear.of(x) + a * 0.5 - b * 2.0).dense()
    assert count.products == 1
    with Count() as count:
        (a + b + a).dense()
    assert count.products == 1
    with Count() as count:
        (a + Linear.lifted(random(B, R, N), BASES["left"], M, N)).dense()
    assert count.products == 2  # two bases


def test_numbers_cost_no_pass_over_the_entries() -> None:
    x = Linear.of(random(B, M, N))
    with Count() as count:
        scaled = -(2.0 * x * 0.5) * random(B, 1, 1)
        scaled.norm()
    assert not any(name in count.calls for name in ("mul_", "add", "sub")), count.calls
    assert count.calls["mul"] <= 3  # numbers of one entry a matrix


def test_entries_are_computed_once() -> None:
    made = Linear.of(random(B, M, N)) + Linear.lifted(random(B, M, R), BASES["right"], M, N)
    with Count() as count:
        first, second = made.dense(), (made * 2.0).sum.value()
    assert first is second
    assert count.products == 1


def test_only_a_matrix_that_nothing_shares_is_written_over() -> None:
    x, c = random(B, M, N), random(B, M, R)
    kept = x.clone()
    free = Linear.of(x).unless_shared(c) + Linear.lifted(c, BASES["right"], M, N)
    assert free.dense().untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    x.copy_(kept)
    bound = Linear.of(x).unless_shared(c, x.mT) + Linear.lifted(c, BASES["right"], M, N)
    torch.testing.assert_close(bound.dense(), kept + lift(c, BASES["right"], M, N))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("part", ["dense", "coords", "number"])
def test_nan_is_found_in_every_part(part: str) -> None:
    x, c, number = random(B, M, N), random(B, M, R), random(B, 1, 1)
    {"dense": x, "coords": c, "number": number}[part].view(-1)[0] = float("nan")
    made = (Linear.of(x) + Linear.lifted(c, BASES["right"], M, N)) if part != "number" else Linear.of(x)
    assert not (made * number if part == "number" else made).is_finite(random(B, M, N))
