"""The dictionary is orthonormal, the chosen columns capture the most, and a spec finds the selector by its name."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from subspace_opt_hadamard import Hadamard, hadamard, sylvester

from subspace_opt import Dim, Step, build, load_spec
from subspace_opt.registry import kinds

EXAMPLE = Path(__file__).parent.parent / "example.yaml"
ONE = torch.tensor(1.0, dtype=torch.float64)
FIRST = Step(t=ONE, age=ONE, first=True, refresh=True)


def refreshed(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The basis that the selector takes from a stack."""
    selector = Hadamard(rank=rank)
    rows, cols = Dim("rows", x.size(-2)), Dim("cols", x.size(-1))
    step = FIRST._replace(constants={name: make() for name, make in selector.constants(rows, cols).items()})
    slots = selector.slots(rows, cols)
    state = {name: x.new_zeros(x.size(0), *slot.shape, dtype=slot.dtype) for name, slot in slots.items()}
    state, _ = selector.refresh(x, state, step)
    basis = selector.basis(state, step).right
    assert basis is not None
    return basis


@pytest.mark.parametrize("n", [*range(1, 20), 63, 96, 768])
def test_orthonormal_for_every_size(n: int) -> None:
    h = hadamard(n)
    torch.testing.assert_close(h.T @ h, torch.eye(n, dtype=torch.float64))


def test_a_power_of_two_gives_the_walsh_hadamard_matrix() -> None:
    assert torch.equal(hadamard(2).sign(), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    assert torch.equal(hadamard(64), sylvester(64))
    torch.testing.assert_close(hadamard(64).abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))


def test_no_other_columns_capture_more() -> None:
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    captured = (x @ refreshed(x, rank=2)).square().sum((-2, -1))
    h = hadamard(6)
    others = torch.stack([(x @ h[:, pair]).square().sum((-2, -1)) for pair in combinations(range(6), 2)])
    torch.testing.assert_close(captured, others.max(0).values)


def test_matrices_of_a_stack_do_not_mix() -> None:
    x = torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = refreshed(x, rank=3)
    for i in range(4):
        assert torch.equal(together[i : i + 1], refreshed(x[i : i + 1], rank=3))


def test_the_kind_is_found_by_its_entry_point() -> None:
    assert kinds("selector")["hadamard"] is Hadamard
    assert isinstance(load_spec(EXAMPLE).pipelines["matrix"].selector, Hadamard)


def test_the_example_trains() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.Tanh(), torch.nn.Linear(48, 8))
    optimizer = build(EXAMPLE, model, lr=1e-2)
    x, y = torch.randn(64, 24), torch.randn(64, 8)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
