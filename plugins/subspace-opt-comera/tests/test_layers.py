"""Layers equal the dense weight built from their cores, in values and gradients; factors, ranks and contraction orders are right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch
from subspace_opt_comera import FactorError, TensorTrain, TTEmbedding, TTLinear, cheapest, factorize
from subspace_opt_comera.contraction import Labels
from subspace_opt_comera.trains import decomposed
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T", bound=TensorTrain)
F64 = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}

LINEAR: list[tuple[int, int, dict[str, Any]]] = [
    (24, 36, {}),
    (64, 64, {"parts": 2}),
    (64, 16, {"parts": 1}),
    (30, 10, {}),  # 10 has two factors, not three
    (13, 11, {"pad": True}),  # primes
    (46, 24, {"pad": True}),  # 2 times a prime: uneven, so padded
    (46, 24, {}),  # uneven, as it is
    (7, 12, {"in_factors": (7,)}),
    (7, 12, {"in_factors": (2, 2, 2), "out_factors": (3, 5)}),  # both padded
    (1, 4, {}),
]
EMBEDDING: list[tuple[int, int, dict[str, Any]]] = [
    (60, 16, {}),
    (97, 13, {}),  # primes
    (50, 24, {"padding_idx": 3, "parts": 2}),
    (50, 24, {"padding_idx": -1}),
    (30, 8, {"row_factors": (5, 6), "col_factors": (8, 1)}),
    (6, 2, {"parts": 3}),  # one factor for the columns
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def with_gates(train: T) -> T:
    """The train with gates of all kinds: some closed, and the others not 1."""
    with torch.no_grad():
        for i, gate in enumerate(train.gates):
            gate.copy_(normal(gate.numel(), seed=i).abs() + 0.1)
            if gate.numel() > 2:
                gate[1], gate[2] = -0.5, 0.009
    return train


@pytest.fixture(params=LINEAR, ids=str)
def linear(request: pytest.FixtureRequest) -> TTLinear:
    ins, outs, options = request.param
    layer = with_gates(TTLinear(ins, outs, 5, seed=1, dtype=F64, **options))
    torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    return layer


@pytest.fixture(params=EMBEDDING, ids=str)
def embedding(request: pytest.FixtureRequest) -> TTEmbedding:
    rows, dim, options = request.param
    return with_gates(TTEmbedding(rows, dim, 5, seed=1, dtype=F64, **options))


def product(train: TensorTrain) -> Tensor:
    """The tensor `(s_1, ..., s_N)` entry by entry, from stored cores and gates."""
    made = torch.ones(1, 1, dtype=F64)
    for i, (core, size) in enumerate(zip(train.cores, train.modes, strict=True)):
        shaped = core.detach().reshape(made.size(1), size, -1)
        if i < len(train.gates):
            gate = train.gates[i].detach()
            shaped = shaped * torch.where(gate > 0.01, gate, torch.zeros_like(gate))
        made = torch.tensordot(made, shaped, 1).reshape(-1, shaped.size(2))
    return made.reshape(train.modes)


def test_a_linear_layer_equals_the_dense_matrix_of_its_cores(linear: TTLinear) -> None:
    outs, ins = linear.out_features, linear.in_features
    matrix = product(linear).reshape(math.prod(linear.out_factors), math.prod(linear.in_factors))[:outs, :ins]
    torch.testing.assert_close(linear.dense(), matrix, **EXACT)
    torch.testing.assert_close(linear.weight, matrix, **EXACT)
    for shape in ((1,), (3, 4), (200,), (0,), ()):  # many rows and few rows take different orders of contraction
        x = normal(*shape, ins)
        torch.testing.assert_close(linear(x), x @ matrix.mT + linear.bias, **EXACT)


def test_an_embedding_equals_the_dense_table_of_its_cores(embedding: TTEmbedding) -> None:
    whole, table = product(embedding), torch.zeros(embedding.num_embeddings, embedding.embedding_dim, dtype=F64)
    for row, col in itertools.product(range(embedding.num_embeddings), range(embedding.embedding_dim)):
        place, r, c = [], row, col
        for v, n in zip(reversed(embedding.row_factors), reversed(embedding.col_factors), strict=True):
            place.insert(0, r % v * n + c % n)
            r, c = r // v, c // n
        table[row, col] = whole[tuple(place)]
    if embedding.padding_idx is not None:
        table[embedding.padding_idx] = 0
    torch.testing.assert_close(embedding.dense(), table, **EXACT)
    for shape in ((7, 5), (0,), ()):
        index = torch.randint(0, embedding.num_embeddings, shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(embedding(index), table[index], **EXACT)
    everything = torch.arange(embedding.num_embeddings)
    torch.testing.assert_close(embedding(everything), table, **EXACT)


def test_gradients_are_those_of_the_dense_matrix(linear: TTLinear) -> None:
    x, out = normal(6, linear.in_features), normal(6, linear.out_features, seed=1)
    params = [*linear.cores, *linear.gates]
    (x.requires_grad_(), linear(x).backward(out))
    found = [x.grad, *(p.grad for p in params)]
    dense = functional.linear(x, linear.dense(), linear.bias)
    for mine, theirs in zip(found, torch.autograd.grad(dense, [x, *params], out), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_gradients_are_those_of_the_dense_table(embedding: TTEmbedding) -> None:
    index = torch.randint(0, embedding.num_embeddings, (9,), generator=torch.Generator().manual_seed(0))
    index[:3] = 3  # a repeated index, which is also a padding index
    out, params = normal(9, embedding.embedding_dim), [*embedding.cores, *embedding.gates]
    mine = torch.autograd.grad(embedding(index), params, out)
    theirs = torch.autograd.grad(embedding.dense()[index], params, out)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_gradients_are_those_of_finite_differences() -> None:
    layer = with_gates(TTLinear(6, 4, 3, seed=1, parts=2, dtype=F64))
    params = [*layer.cores, *layer.gates]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (normal(3, 6).requires_grad_(), *params))


def test_a_closed_gate_gets_no_gradient_and_open_gates_at_1_change_nothing() -> None:
    layer = TTLinear(8, 8, 4, seed=1, dtype=F64)
    before = layer.dense().detach()
    for gate in layer.gates:
        torch.testing.assert_close(gate, torch.ones_like(gate))
    with torch.no_grad():
        layer.gates[2][1] = 0.01
    layer(normal(3, 8)).sum().backward()
    assert layer.gates[2].grad[1] == 0
    assert layer.gates[2].grad[0] != 0
    assert (layer.dense() - before).norm() > 1e-3


def test_folding_changes_nothing_but_cores_and_gates(linear: TTLinear) -> None:
    before, cores = linear.dense().detach(), linear.core_entries()
    linear.fold()
    torch.testing.assert_close(linear.dense(), before, **EXACT)
    assert linear.core_entries() == cores
    assert {g for gate in linear.gates for g in gate.tolist()} <= {0.0, 1.0}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it after a graph break
def test_layers_compile_and_follow_autocast() -> None:
    model = torch.nn.Sequential(TTEmbedding(30, 16, 4, seed=0), TTLinear(16, 8, 4, seed=1))
    index = torch.arange(12).reshape(3, 4)
    compiled = torch.compile(model, backend="aot_eager")
    for rows in (3, 2):
        torch.testing.assert_close(compiled(index[:rows]), model(index[:rows]))
    compiled(index).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(index).square().sum().backward()
    for mine, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad)
    plain = torch.nn.Linear(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(index).dtype == plain(torch.ones(2, 16)).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------------- starting values


def test_entries_start_with_the_standard_deviation_of_an_ordinary_layer() -> None:
    variances = [TTLinear(64, 64, 16, seed=seed, dtype=F64).dense().var().item() for seed in range(40)]
    assert sum(variances) / 40 == pytest.approx(2 / 128, rel=0.15)
    variances = [TTEmbedding(64, 64, 16, seed=seed, dtype=F64).dense().var().item() for seed in range(40)]
    assert sum(variances) / 40 == pytest.approx(1.0, rel=0.15)


def test_draws_come_from_the_seed_and_not_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    a, b, c = (TTLinear(8, 8, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.dense(), b.dense())
    assert not torch.equal(a.dense(), c.dense())


def test_a_weight_of_low_rank_is_reproduced_and_others_are_approximated(linear: TTLinear, embedding: TTEmbedding) -> None:
    for train in (linear, embedding):
        weight = train.dense().detach()
        kind: Any = type(train)
        if weight.numel() == math.prod(train.modes) and getattr(train, "padding_idx", None) is None:  # else zeros raise its ranks
            same = kind(*_sides(train), train.ranks[1:-1], seed=9, dtype=F64, **_factors_of(train))
            same.set_weight(weight)
            torch.testing.assert_close(same.dense(), weight, rtol=1e-10, atol=1e-10)
        full = kind(*_sides(train), 10**6, seed=9, dtype=F64, **_factors_of(train))
        other = normal(*weight.shape, seed=5)
        if getattr(train, "padding_idx", None) is not None:
            other[train.padding_idx] = 0
        full.set_weight(other)
        torch.testing.assert_close(full.dense(), other, rtol=1e-10, atol=1e-10)


def _sides(train: Any) -> tuple[int, int]:
    return (train.in_features, train.out_features) if isinstance(train, TTLinear) else (train.num_embeddings, train.embedding_dim)


def _factors_of(train: Any) -> dict[str, Any]:
    if isinstance(train, TTLinear):
        return {"out_factors": train.out_factors, "in_factors": train.in_factors}
    return {"row_factors": train.row_factors, "col_factors": train.col_factors, "padding_idx": train.padding_idx}


def test_truncation_drops_the_smallest_singular_values_and_cores_have_equal_scale() -> None:
    tensor = normal(6, 7)
    u, s, v = torch.linalg.svd(tensor)
    cores = decomposed(tensor, (1, 3, 1))
    torch.testing.assert_close(torch.einsum("asb,btc->st", *cores), u[:, :3] * s[:3] @ v[:3], **EXACT)
    scales = [(core.norm() / (core.size(0) * core.size(1)) ** 0.5).item() for core in cores]
    assert scales[0] == pytest.approx(scales[1])
    assert decomposed(torch.zeros(4, 4), (1, 2, 1))[0].isfinite().all()


# --------------------------------------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize(
    ("n", "parts", "pad", "factors"),
    [
        (64, 3, False, (4, 4, 4)),
        (768, 3, False, (8, 8, 12)),
        (3072, 3, False, (12, 16, 16)),
        (10, 3, False, (2, 5)),
        (13, 1, False, (13,)),
        (1, 3, False, (1,)),
        (46, 3, False, (2, 23)),
        (46, 3, True, (3, 4, 4)),
        (13, 2, True, (4, 4)),
        (768, 3, True, (8, 8, 12)),
        (30522, 3, True, (31, 31, 32)),
        (27, 3, True, (3, 3, 3)),
    ],
)
def test_factors(n: int, parts: int, pad: bool, factors: tuple[int, ...]) -> None:
    assert factorize(n, parts, pad=pad) == factors


def test_factors_are_the_most_even_ones() -> None:
    for n in range(2, 300):
        if all(n % d for d in range(2, n)):
            with pytest.raises(FactorError, match=f"{n} is prime"):
                factorize(n, 3)
        else:
            found = factorize(n, 3)
            assert math.prod(found) == n
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            assert found[-1] == min(max(a, b, n // a // b) for a in divisors for b in divisors if n % (a * b) == 0)
        padded = factorize(n, 3, pad=True)
        assert n <= math.prod(padded) <= 2 * n
        assert padded[-1] <= 2 * math.ceil(n ** (1 / 3)) + 1


def test_bad_sizes_are_refused() -> None:
    for make, message in (
        (lambda: TTLinear(13, 8, 4, seed=0), "in_features: 13 is prime, so it has no 3 factors; pass pad=True"),
        (lambda: TTLinear(8, 13, 4, seed=0), "out_features: 13 is prime"),
        (lambda: TTLinear(8, 8, 0, seed=0), "rank is 0; give a number of at least 1"),
        (lambda: TTLinear(8, 8, [2, 2], seed=0), r"rank is \[2, 2\]; give a number of at least 1, or 5 of them for 6 cores"),
        (lambda: TTLinear(8, 8, 2, seed=0, in_factors=(2, 2)), r"the factors \(2, 2\) have product 4, and in_features is 8"),
        (lambda: TTEmbedding(8, 8, 2, seed=0, parts=1), r"needs at least two cores, and the factors \(64,\) give 1"),
        (lambda: TTEmbedding(8, 8, 2, seed=0, row_factors=(2, 4), col_factors=(8,)), "must be equally many"),
        (lambda: factorize(0, 2), r"factorize\(0, 2\): both numbers must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    table = TTEmbedding(11, 8, 2, seed=0)  # padded to more rows than 11
    assert math.prod(table.row_factors) > 11
    for index in (11, -1):
        with pytest.raises(IndexError, match="this table has 11 rows"):
            table(torch.tensor([0, index]))


def test_ranks_are_those_that_the_neighbours_can_use() -> None:
    assert TTLinear(64, 64, 100, seed=0).ranks == (1, 4, 16, 64, 16, 4, 1)
    assert TTLinear(64, 64, [100, 2, 100, 100, 100], seed=0).ranks == (1, 4, 2, 8, 16, 4, 1)


# ------------------------------------------------------------------------------------------------------------ contraction orders


def orders(operands: list[Labels], out: Labels, sizes: dict[int, int]) -> Iterator[int]:
    """The cost of every pairwise order, by brute force."""
    if len(operands) == 1:
        yield 0
    for i, j in itertools.combinations(range(len(operands)), 2):
        rest = [own for k, own in enumerate(operands) if k not in (i, j)]
        union = set(operands[i]) | set(operands[j])
        kept = tuple(label for label in union if label in out or any(label in own for own in rest))
        cost = 2 * math.prod(sizes[label] for label in union)
        yield from (cost + more for more in orders([*rest, kept], out, sizes))


@pytest.mark.parametrize("batch", [1, 3, 40, 4000])
@pytest.mark.parametrize(("ins", "outs", "rank"), [((4, 6), (5, 3), 4), ((2, 3), (7, 2), 6), ((30,), (20,), 3)])
def test_the_order_is_the_cheapest_of_all_and_its_cost_is_what_runs(
    ins: tuple[int, ...], outs: tuple[int, ...], rank: int, batch: int
) -> None:
    layer = TTLinear(math.prod(ins), math.prod(outs), rank, seed=0, in_factors=ins, out_factors=outs, bias=False)
    count = len(layer.modes)
    labels: list[Labels] = [(2 * count, *range(count + len(outs), 2 * count)), *layer.core_labels()]
    out = (2 * count, *range(count, count + len(outs)))
    sizes = {2 * count: batch, **dict(enumerate(layer.ranks[1:-1], 1)), **dict(enumerate(layer.modes, count))}
    path = cheapest(tuple(labels), out, tuple(sorted(sizes.items())))
    assert path.flops == min(orders(labels, out, sizes))
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.randn(batch, layer.in_features))
    assert counter.get_total_flops() == path.flops
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() <= 2 * path.flops  # less by the gradient of the input, which is not needed


def test_few_rows_cost_less_than_the_dense_product_and_many_rows_no_more() -> None:
    layer = TTLinear(768, 768, 16, seed=0, bias=False)
    for batch, share in ((1, 0.2), (64, 0.2), (4096, 1.0)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(batch, 768))
        assert counter.get_total_flops() < share * 2 * batch * 768 * 768


def test_a_network_in_two_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match="not connected"):
        cheapest(((0, 1), (2, 3)), (0, 1, 2, 3), tuple((i, 2) for i in range(4)))
