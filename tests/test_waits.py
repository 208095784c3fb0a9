"""No step waits for a device: flags stay on the device and gate the update, and the host reads them at the next step.

A CPU waits for nothing and inspects gradients at once. A switch makes it take the way of other devices, so results can be compared.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspace_opt import NonFiniteGradient, SubspaceOptimizer, load_spec, step_in_backward
from subspace_opt.engine.flags import watch
from tests.common import PRESETS, Params, differences, give, gradient, optimizer, parameters, same, snapshot
from tests.selection import covering

SHAPES = {"tall": (7, 4), "mate": (7, 4), "wide": (4, 6), "experts": (2, 5, 4), "bias": (4,)}
FEW = sorted(covering())
BAD = "mate"
Ways = dict[str, Any]
WAYS: dict[str, tuple[str, Ways]] = {
    **{preset: (preset, {}) for preset in FEW},
    "galore with decay": ("galore", {"weight_decay": 0.1}),
    "adamw with decay": ("adamw", {"weight_decay": 0.1}),
    "muon in bfloat16": ("muon", {"dtype": torch.bfloat16, "weight_decay": 0.1}),
    "cosmos, stochastic rounding": ("cosmos", {"dtype": torch.bfloat16, "rounding": "stochastic"}),
    "galore, Kahan's rounding": ("galore", {"dtype": torch.bfloat16, "rounding": "kahan"}),
    "muon, lr as a tensor": ("muon", {"lr": torch.tensor(0.02), "weight_decay": 0.1}),
}
any_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ALSO_ON_CPU", True)


def started(way: str, **options: Any) -> tuple[SubspaceOptimizer, Params]:
    preset, given = WAYS[way]
    given = {**given, **options}
    params = parameters(SHAPES, given.pop("dtype", torch.float32))
    return optimizer(preset, params, **given), params


def spoilt(params: Params, step: int, value: float = torch.nan) -> None:
    give(params, step)
    grad = params[BAD].grad
    assert grad is not None
    grad.view(-1)[1] = value


@any_way
def test_flags_change_no_bit_of_finite_steps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that is too large to be squared is scaled by the same number, known to the device alone.

    Inspected at once, such a gradient takes the general way instead of a fused kernel, which differs in round-off.
    """
    ends = []
    for also in (False, True):
        monkeypatch.setattr(watch, "ALSO_ON_CPU", also)
        opt, params = started(way)
        for step in range(5):
            give(params, step)
            if step == 3:
                for name in ("tall", "experts"):
                    params[name].grad = gradient(name, SHAPES[name], step, params[name].dtype) * 1e20
            opt.step()
        opt.check()
        ends.append(snapshot(opt, params))
    if way.startswith("adamw"):
        assert max(differences(*ends).values()) < 1e-6
    else:
        assert same(*ends)


@any_way
def test_nothing_changes_after_nan_until_the_error_is_raised(way: str, deferred: None) -> None:
    opt, params = started(way)
    for step in range(3):
        give(params, step)
        opt.step()
    before = snapshot(opt, params)
    twin = None
    for ask in (lambda: opt.step(), opt.check, opt.state_dict):
        spoilt(params, 3, torch.inf if twin else torch.nan)
        opt.step()
        with pytest.raises(NonFiniteGradient, match=f"the gradient of {BAD} held NaN or infinity in an earlier step; nothing has been"):
            ask()
        assert same(snapshot(opt, params), before)
        assert opt.check() is None
        twin = ask
    give(params, 3)
    opt.step()
    assert not same(snapshot(opt, params), before)


@any_way
def test_skip_leaves_one_parameter_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have the bits that they have if gradients are inspected at once, and so has this one after its next gradient."""
    ends = []
    for also in (False, True):
        monkeypatch.setattr(watch, "ALSO_ON_CPU", also)
        opt, params = started(way, nonfinite="skip", stacking="never")
        for step in range(6):
            give(params, step)
            if step in (2, 3):
                spoilt(params, step)
                opt.check()
                was = snapshot(opt, params)
            opt.step()
            if step == 3:
                opt.check()
                now = snapshot(opt, params)
                assert all(torch.equal(now[key], was[key]) for key in now if key.split("/")[0] == BAD)
        assert opt.state_dict()["state"]
        assert opt.skipped == {BAD: 2}
        ends.append(snapshot(opt, params))
    assert same(*ends)


def test_a_stack_may_hold_a_parameter_that_is_skipped(deferred: None) -> None:
    opt, params = started("cosmos", nonfinite="skip", stacking="always")
    for step in range(4):
        give(params, step)
        if step == 3:
            spoilt(params, step)
            before = snapshot(opt, params)
        opt.step()
    opt.check()
    after = snapshot(opt, params)
    assert opt.skipped == {BAD: 1}
    assert all(torch.equal(after[key], before[key]) == (key.split("/")[0] == BAD) for key in after if key in params)


def test_codes_stay_too(deferred: None) -> None:
    pytest.importorskip("torchao")
    for bits in ("8bit", "4bit"):
        params = parameters({BAD: (64, 128)})
        opt = optimizer("lion", params, state_dtype=bits)
        for step in range(2):
            give(params, step)
            opt.step()
        stored = opt.state[params[BAD]]["complement.exp_avg"]
        before = params[BAD].detach().clone(), stored.codes.clone(), stored.scale.clone()
        spoilt(params, 2)
        opt.step()
        assert all(torch.equal(a, b) for a, b in zip(before, (params[BAD], stored.codes, stored.scale), strict=True))


def test_a_requested_refresh_outlives_the_error(deferred: None) -> None:
    opt, params = started("galore", overrides={"matrix.selector.every": None})
    for step in range(2):
        give(params, step)
        opt.step()
    basis = opt.state[params["tall"]]["selector.basis"].clone()
    opt.refresh_bases()
    spoilt(params, 2)
    opt.step()
    with pytest.raises(NonFiniteGradient):
        opt.check()
    for step, is_old in ((3, False), (4, True)):
        give(params, step)
        opt.step()
        assert torch.equal(opt.state[params["tall"]]["selector.basis"], basis) == is_old
        basis = opt.state[params["tall"]]["selector.basis"].clone()


def test_a_failed_decomposition_closes_the_gate_of_its_matrix(deferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is warned of at the next step, the refresh is repeated, and the third failure in a row raises."""
    opt, params = started("cosmos", stacking="never")
    for step in range(2):
        give(params, step)
        opt.step()
    before = snapshot(opt, params)
    fine = torch.linalg.householder_product

    def broken(a: Tensor, tau: Tensor) -> Tensor:
        return fine(a, tau) * torch.where((a.shape[-2:] == (6, 3)) & torch.tensor(True), torch.nan, 1.0)

    monkeypatch.setattr("subspace_opt.algebra.guards.linalg.all_finite", lambda x: True)
    monkeypatch.setattr(torch.linalg, "householder_product", broken)
    for step in (2, 3, 4):
        give(params, step)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            opt.step()
        assert [str(w.message)[:30] for w in said] == ["a decomposition for 'wide' gav"] * (step > 2)
    with pytest.raises(torch.linalg.LinAlgError, match="the decomposition for 'wide' failed 3 times in a row"):
        opt.check()
    after = snapshot(opt, params)
    changed = {key for key in params if not torch.equal(after[key], before[key])}
    assert changed == set(params) - {"wide"}
    assert all(bool(value.isfinite().all()) for value in after.values())


def test_copies_and_loaded_states_hold_no_flag(deferred: None) -> None:
    opt, params = started("cosmos")
    give(params, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    spoilt(params, 1)
    opt.step()
    with pytest.raises(NonFiniteGradient):
        copy.deepcopy(opt)
    spoilt(params, 1)
    opt.step()
    opt.load_state_dict(saved)
    assert opt.check() is None


def test_updates_in_backward_stop_at_the_first_bad_gradient(deferred: None) -> None:
    """`backward()` runs from the last layer to the first, so the last layer has been updated by then."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    opt = step_in_backward(model, load_spec("muon"))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        if i == 2:
            model[1].weight.register_hook(lambda grad: grad * torch.nan)
            before = [p.detach().clone() for p in model.parameters()]
        model(x).square().mean().backward()
        opt.step()
    assert [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)] == [True, True, False]
    with pytest.raises(NonFiniteGradient, match=r"gradient of 0\.weight, 1\.weight held .* had been updated by then|1\.weight held"):
        model(x).square().mean().backward()
    assert torch.equal(model[0].weight, before[0])


POLICIES = ["raise", "skip", "propagate"]


@pytest.mark.parametrize(
    ("policy", "presets", "steps"),
    [
        ("raise", FEW, 5),
        ("skip", ["adamw", "cosmos"], 5),
        *(pytest.param(policy, PRESETS, 20, marks=pytest.mark.slow) for policy in POLICIES),
    ],
    ids=lambda value: f"{len(value)} presets" if isinstance(value, list) else str(value),
)
def test_no_step_reads_a_number_back(policy: Any, presets: list[str], steps: int) -> None:
    """On the meta device tensors hold no numbers, and every read raises. Flags count as clear there."""
    for preset in presets:
        params = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in {"matrix": (5, 4), "bias": (4,)}.items()}
        opt = optimizer(preset, params, nonfinite=policy)
        for p in params.values():
            p.grad = torch.empty_like(p)
        for _ in range(steps):
            opt.step()
        opt.check()
        with pytest.raises(RuntimeError):
            params["bias"].sum().item()
