"""The rule passes the conformance kit, equals torch's Adafactor, and has the state that it declares; a spec finds it by its name."""

from pathlib import Path

import pytest
import torch
from subspace_opt_adafactor import Adafactor

from subspace_opt import SubspaceOptimizer, load_spec
from subspace_opt.registry import kinds
from subspace_opt.testing import Check, checks, spec_checks

EXAMPLE = Path(__file__).parent.parent / "example.yaml"


@pytest.mark.parametrize("check", [*checks(Adafactor), *checks('adafactor={"clip": null, "decay": 1.0}')], ids=str)
def test_the_rule_conforms(check: Check) -> None:
    check()


@pytest.mark.parametrize("check", spec_checks(EXAMPLE), ids=str)
def test_the_example_conforms(check: Check) -> None:
    check()


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def optimizer(p: torch.nn.Parameter, **options: object) -> SubspaceOptimizer:
    spec = {"pipelines": {"all": {"complement": {"kind": "adafactor", **options}}}, "routes": [{"use": "all"}]}
    return SubspaceOptimizer([("w", p)], spec, lr=1.0)


def test_it_is_torchs_adafactor_but_for_the_relative_step() -> None:
    ours, theirs = (torch.nn.Parameter(normal(7, 5, seed=0)) for _ in range(2))
    mine, reference = optimizer(ours), torch.optim.Adafactor([theirs], lr=1.0, eps=(None, 1e-3), weight_decay=0.0)
    for t in range(1, 8):
        before, start = ours.detach().clone(), theirs.detach().clone()
        relative = max(1e-3, start.square().mean().sqrt().item()) * t**-0.5
        ours.grad, theirs.grad = (t * normal(7, 5, seed=t) for _ in range(2))
        mine.step()
        reference.step()
        torch.testing.assert_close(before - ours, (start - theirs) / relative, rtol=1e-10, atol=1e-12)


def test_it_is_exact_where_the_squares_have_rank_one() -> None:
    p = torch.nn.Parameter(normal(6, 4, seed=0))
    factor, sides = optimizer(p, clip=None), (normal(6, 1, seed=1), normal(1, 4, seed=2))
    before, mean = p.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    for t in range(1, 5):
        p.grad = t * sides[0] * sides[1]
        mean += t**-0.8 * (p.grad.square() - mean)
        before -= p.grad / mean.sqrt()
        factor.step()
    torch.testing.assert_close(p.detach(), before)


def test_state_is_one_number_for_each_row_and_column() -> None:
    p = torch.nn.Parameter(normal(6, 4, seed=0))
    assert optimizer(p).plan.total_bytes == (6 + 4) * 8 + 4  # and the counter


def test_the_kind_is_found_by_its_entry_point() -> None:
    assert kinds("rule")["adafactor"] is Adafactor
    assert isinstance(load_spec(EXAMPLE).pipelines["matrix"].inside[0], Adafactor)
