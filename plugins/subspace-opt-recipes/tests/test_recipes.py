"""Every preset is found by its name, has a source, and passes the conformance kit."""

import pytest
import torch

from subspace_opt import build, load_spec
from subspace_opt.spec import preset_names
from subspace_opt.testing import Check, spec_checks

PRESETS = ("dct-soap-muon", "flora", "grass", "signum")


def test_the_presets_are_found_by_their_entry_point() -> None:
    assert set(PRESETS) <= set(preset_names())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_is(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    assert spec.source
    assert spec.notes


@pytest.mark.parametrize("check", [check for name in PRESETS for check in spec_checks(name)], ids=str)
def test_a_preset_conforms(check: Check) -> None:
    check()


def test_grass_moves_the_rows_that_it_picks_and_no_others() -> None:
    p = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = build("grass", [("w", p)], overrides={"matrix.selector.rank": 2}, modules={"w": frozenset({"linear"})})
    p.grad = torch.outer(torch.tensor([1.0, 5.0, 2.0, 0.5, 9.0, 3.0]), torch.ones(4))
    optimizer.step()
    assert p.abs().amax(1).nonzero().flatten().tolist() == [1, 4]
