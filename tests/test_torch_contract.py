"""Does every preset keep what a `torch.optim.Optimizer` promises?"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from common import (
    LINEAR,
    PRESETS,
    SHAPES,
    copied,
    differences,
    finite,
    flat,
    give,
    gradient,
    optimizer,
    parameters,
    same,
    same_tensor,
    small,
    snapshot,
    train,
)
from selection import covering
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import subspace_opt
from subspace_opt import SubspaceOptimizer

every_preset = pytest.mark.parametrize("preset", PRESETS)
RETRACTED = {"spel"}  # every update, even one of size 0, brings the weight into a set


def is_at(opt: SubspaceOptimizer, p: Tensor) -> float:
    """The number of updates of a parameter."""
    return float(opt.state[p]["step"])


# ------------------------------------------------------------------------------------------------------------------- direction


def problem(contiguous: bool = True) -> tuple[dict[str, nn.Parameter], Callable[[], Tensor]]:
    """Least squares, as in PyTorch's own tests: a weight, a bias and one sample."""
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn((10, 5) if contiguous else (10, 5, 2), generator=draw)
    bias = torch.randn(10 if contiguous else (10, 2), generator=draw)
    sample = torch.randn(5, generator=draw)
    if not contiguous:
        weight, bias = weight[..., 0], bias[..., 0]
        assert not weight.is_contiguous()
        assert not bias.is_contiguous()
    params = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    return params, lambda: (params["weight"].mv(sample) + params["bias"]).pow(2).sum()


def descend(opt: SubspaceOptimizer, loss: Callable[[], Tensor], steps: int = 20) -> list[float]:
    seen = []
    for _ in range(steps):
        opt.zero_grad()
        value = loss()
        value.backward()
        seen.append(value.item())
        opt.step()
    return [*seen, loss().item()]


@pytest.mark.all_presets
@every_preset
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_in_the_right_direction(preset: str, contiguous: bool, maximize: bool) -> None:
    params, loss = problem(contiguous)
    opt = optimizer(preset, params, maximize=maximize, weight_decay=0.0)
    losses = descend(opt, loss)[preset in RETRACTED :]  # the first update brings the weight into the set
    assert losses[-1] > losses[0] if maximize else losses[-1] < losses[0]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.4, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.4, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, power=0.9, total_iters=12),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=12),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, base_lr=0.1 * rate(o), max_lr=rate(o), step_size_up=3, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=rate(o), total_steps=12, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, total_iters=2), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def rate(opt: torch.optim.Optimizer) -> float:
    return float(opt.defaults["lr"])


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    theirs = {
        name
        for name, cls in vars(schedulers).items()
        if inspect.isclass(cls) and issubclass(cls, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert theirs - {"LRScheduler"} == set(SCHEDULERS)


@every_preset
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_does_what_setting_lr_by_hand_does(preset: str, scheduler: str) -> None:
    params, loss = problem()
    opt = optimizer(preset, params)
    schedule = SCHEDULERS[scheduler](opt)
    rates, losses = [], []
    for _ in range(8):
        opt.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step(value.item()) if scheduler == "ReduceLROnPlateau" else schedule.step()
    assert len(set(rates)) > 1
    assert loss().item() < losses[0]

    again, loss = problem()
    by_hand = optimizer(preset, again)
    for lr in rates:
        by_hand.zero_grad()
        loss().backward()
        by_hand.param_groups[0]["lr"] = lr
        by_hand.step()
    assert same(snapshot(opt, params), snapshot(by_hand, again))


# ---------------------------------------------------------------------------------------------------------------- lr and groups


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in RETRACTED])
def test_a_rate_of_almost_nothing_leaves_weights_in_place(preset: str) -> None:
    params = parameters()
    before = copied(params)
    train(optimizer(preset, params, lr=1e-28), params, range(4))
    assert all(same_tensor(params[n], before[n]) for n in params)


@every_preset
def test_a_group_has_its_own_rate_and_decay(preset: str) -> None:
    """Two groups move like two optimizers."""
    spec, params = small(preset), parameters()
    halves = [{n: params[n] for n in ("tall", "bias")}, {n: params[n] for n in ("wide", "square", "mate", "scalar")}]
    rates = [{"lr": 1e-2, "weight_decay": 0.5}, {"lr": 3e-3, "weight_decay": 0.0}]
    alone = [copied(half) for half in halves]
    together = SubspaceOptimizer(
        [{"params": half.items(), **own} for half, own in zip(halves, rates, strict=True)],
        spec,
        modules=dict.fromkeys(params, LINEAR),
        stacking="never",  # without stacks, so that bits agree: a batched product rounds differently
    )
    train(together, params, range(5))
    for half, own in zip(alone, rates, strict=True):
        train(optimizer(spec, half, stacking="never", **own), half, range(5))
        assert all(same_tensor(params[n], p) for n, p in half.items())


@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_rate_is_a_rate(preset: str, dtype: torch.dtype) -> None:
    runs = []
    for lr in (0.0078125, torch.tensor(0.0078125, dtype=dtype), torch.tensor([0.0078125], dtype=dtype)):
        params = parameters()
        opt = optimizer(preset, params, lr=lr)
        train(opt, params, range(4))
        opt.param_groups[0]["lr"] = lr / 2
        train(opt, params, range(4, 6))
        runs.append(snapshot(opt, params))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_a_tensor_rate_is_read_at_every_step() -> None:
    lr = torch.tensor(0.5)
    params = parameters({"bias": (4,)})
    opt = optimizer("adamw", params, lr=lr, weight_decay=0.0)
    train(opt, params, range(1))
    before = params["bias"].detach().clone()
    lr.zero_()
    train(opt, params, range(1, 3))
    assert torch.equal(params["bias"], before)


@every_preset
def test_a_group_may_come_later(preset: str) -> None:
    """A parameter added at step 3 moves like one without a gradient until then, and like one alone in an optimizer."""
    late = {"mate": SHAPES["mate"], "bias": SHAPES["bias"]}
    params, twins, lone = parameters(), parameters(), parameters(late)
    opt = optimizer(preset, {n: p for n, p in params.items() if n not in late})
    opt._modules.update(dict.fromkeys(late, LINEAR))
    other = optimizer(preset, twins)
    for step in range(8):
        if step == 3:
            opt.add_param_group({"params": [(n, params[n]) for n in late]})
        give(params, step)
        give(twins, step, missing=tuple(late) if step < 3 else ())
        opt.step()
        other.step()
    train(optimizer(preset, lone), lone, range(3, 8))
    assert same(snapshot(opt, params), snapshot(other, twins))
    assert all(torch.allclose(params[n], lone[n], rtol=1e-4, atol=1e-6) for n in late)
    assert is_at(opt, params["mate"]) == is_at(other, twins["mate"]) == 5


def test_groups_may_have_overrides_specs_and_pipelines_of_their_own() -> None:
    params = parameters(dict.fromkeys("abcde", (7, 4)))
    groups = [
        {"params": [("a", params["a"])]},
        {"params": [("b", params["b"])], "overrides": {"matrix.selector.rank": 2}},
        {"params": [("c", params["c"])], "spec": "muon"},
        {"params": [("d", params["d"])], "use": "other"},
        {"params": [("e", params["e"])], "spec": "galore", "overrides": {"matrix.selector.rank": 1}, "lr": 0.5},
    ]
    opt = SubspaceOptimizer(groups, small("cosmos"), modules=dict.fromkeys(params, LINEAR))
    train(opt, params, range(2))
    rows = opt.plan.by_name
    assert [rows[n].pipeline for n in "abcde"] == ["matrix", "matrix", "matrix", "other", "matrix"]
    assert [rows[n].ranks for n in "abcde"] == [[3], [2], [], [], [1]]
    assert [opt.spec_of(g).name for g in opt.param_groups] == ["cosmos", "cosmos", "muon", "cosmos", "galore"]
    assert set(opt.state[params["c"]]) == {"step", "momentum.exp_avg"}
    assert set(opt.state[params["d"]]) == {"step", "complement.exp_avg", "complement.exp_avg_sq"}

    alone = parameters({"e": (7, 4)})
    other = SubspaceOptimizer(alone.items(), "galore", lr=0.5, overrides={"matrix.selector.rank": 1}, modules={"e": LINEAR})
    other.param_groups[0]["weight_decay"] = opt.param_groups[4]["weight_decay"]
    train(other, alone, range(2))
    assert same_tensor(alone["e"], params["e"])


# ---------------------------------------------------------------------------------------------------------------------- refusals


def test_what_is_no_parameter_list_is_refused() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        SubspaceOptimizer(p, "adamw")
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        SubspaceOptimizer(["weight"], "adamw")
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        SubspaceOptimizer([p * 2], "adamw")
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        SubspaceOptimizer([], "adamw")
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        SubspaceOptimizer([p, p], "adamw")
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        SubspaceOptimizer([{"params": [p]}, {"params": [p]}], "adamw")


def test_half_named_parameters_are_refused() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="Some param names are missing"):
        SubspaceOptimizer([("a", p), q], "adamw")
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        SubspaceOptimizer([{"params": [("a", p)]}, {"params": [q]}], "adamw")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("weight_dekay", "did you mean 'weight_decay'?"),
        ("learning_rate", "known: "),
        ("rank", "options of the spec go into `overrides`"),
    ],
)
def test_an_unknown_key_of_a_group_is_refused(key: str, hint: str) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"unknown key '{key}'") as caught:
        SubspaceOptimizer([{"params": [p], key: 0.1}], "adamw")
    assert hint in str(caught.value)


@pytest.mark.parametrize("where", ["whole", "group"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"Invalid learning rate: -1\.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": "fast"}, "Invalid learning rate: fast"),
        ({"lr": torch.tensor([1.0, 2.0])}, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.5}, r"Invalid weight_decay value: -0\.5"),
        ({"weight_decay": float("inf")}, "Invalid weight_decay value: inf"),
    ],
)
def test_a_bad_rate_is_refused(options: dict[str, Any], message: str, where: str) -> None:
    p = nn.Parameter(torch.ones(3))
    params, whole = ([p], options) if where == "whole" else ([{"params": [p], **options}], {})
    with pytest.raises(ValueError, match=message):
        SubspaceOptimizer(params, "adamw", **whole)


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("nonfinite", "rais", "did you mean 'raise'?"),
        ("rounding", "down", "known: kahan, nearest, stochastic"),
        ("stacking", "alwys", "did you mean 'always'?"),
    ],
)
def test_an_unknown_choice_is_refused(option: str, value: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is '{value}'") as caught:
        SubspaceOptimizer([nn.Parameter(torch.ones(3))], "adamw", **{option: value})
    assert hint in str(caught.value)


@every_preset
def test_a_refused_group_leaves_no_trace(preset: str) -> None:
    params = parameters()
    opt, twin = optimizer(preset, params), parameters()
    other = optimizer(preset, twin)
    for bad in (
        {"params": [("z", nn.Parameter(torch.ones(3, 3, dtype=torch.complex64)))]},
        {"params": [("z", nn.Parameter(torch.ones(3, 3)))], "use": "nowhere"},
        {"params": [("z", nn.Parameter(torch.ones(3, 3)))], "overrides": {"nowhere.rank": 1}},
        {"params": [("z", nn.Parameter(torch.ones(3, 3)))], "lr": -1.0},
    ):
        with pytest.raises(ValueError):  # noqa: PT011  four messages, each pinned elsewhere
            opt.add_param_group(bad)
    assert len(opt.param_groups) == 1
    train(opt, params, range(2))
    train(other, twin, range(2))
    assert same(snapshot(opt, params), snapshot(other, twin))


@every_preset
def test_a_complex_parameter_is_refused(preset: str) -> None:
    with pytest.raises(ValueError, match=r"of shape \(3, 3\) is complex; optimize its real and imaginary parts"):
        optimizer(preset, {"z": nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))})


@every_preset
def test_a_sparse_gradient_is_refused_before_anything_moves(preset: str) -> None:
    params = parameters()
    opt = optimizer(preset, params)
    train(opt, params, range(2))
    before = snapshot(opt, params)
    give(params, 2)
    params["mate"].grad = gradient("mate", (7, 4), 2).to_sparse()
    with pytest.raises(RuntimeError, match="'mate' has a sparse gradient"):
        opt.step()
    assert same(snapshot(opt, params), before)


# ----------------------------------------------------------------------------------------------------------------------- closures


@every_preset
def test_a_closure_is_called_once_with_gradients_on_and_its_value_returned(preset: str) -> None:
    params, loss = problem()
    twins, other_loss = problem()
    opt, twin = optimizer(preset, params), optimizer(preset, twins)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.no_grad():
        first = opt.step(closure)
    opt.step(closure)
    assert calls == [True, True]
    assert isinstance(first, Tensor)
    seen = descend(twin, other_loss, steps=2)
    assert first.item() == seen[0]
    assert same(snapshot(opt, params), snapshot(twin, twins))
    assert twin.step() is None
    assert torch.is_grad_enabled()


def test_a_closure_that_raises_changes_nothing() -> None:
    params = parameters()
    opt = optimizer("cosmos", params)
    train(opt, params, range(2))
    before = snapshot(opt, params)

    def closure() -> float:
        raise KeyError("no batch")

    with pytest.raises(KeyError):
        opt.step(closure)
    assert same(snapshot(opt, params), before)


# ------------------------------------------------------------------------------------------------------------- missing gradients


@every_preset
def test_no_gradients_no_change(preset: str) -> None:
    params = parameters()
    opt = optimizer(preset, params, weight_decay=0.5)
    opt.step()
    assert not opt.state
    train(opt, params, range(3))
    before = snapshot(opt, params)
    opt.zero_grad()
    opt.step()
    assert same(snapshot(opt, params), before)


@pytest.mark.all_presets
@every_preset
def test_a_missing_gradient_leaves_parameter_and_state_alone(preset: str) -> None:
    """It gets no decay and no count. With the next gradient it goes on as if there had been no gap."""
    params, twins = parameters(), parameters()
    opt, twin = optimizer(preset, params, weight_decay=0.5), optimizer(preset, twins, weight_decay=0.5)
    train(opt, params, range(3))
    before = snapshot(opt, params)
    for step in range(3, 6):
        give(params, step, missing=("tall", "bias"))
        opt.step()
    after = snapshot(opt, params)
    for key in before:
        kept = key.split("/")[0] in ("tall", "bias")
        assert same_tensor(before[key], after[key]) or not kept, key
    assert not same_tensor(before["wide"], after["wide"])
    train(opt, params, range(6, 9))

    # The twin never sees the three gradients that were missing.
    for step in (0, 1, 2, 6, 7, 8):
        give(twins, step)
        twin.step()
    for name in ("tall", "bias"):
        assert torch.allclose(params[name], twins[name], rtol=1e-4, atol=1e-6)
        assert is_at(opt, params[name]) == is_at(twin, twins[name]) == 6


@every_preset
def test_a_zero_gradient_moves_no_weight_that_has_no_memory(preset: str) -> None:
    params = parameters()
    opt = optimizer(preset, params, weight_decay=0.0)
    before = copied(params)
    for _ in range(3):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        opt.step()
    assert all(same_tensor(params[n], before[n]) for n in params)
    assert all(opt.state[p] for p in params.values())  # the state exists, because a checkpoint may need it as a template


@every_preset
def test_a_parameter_may_be_frozen_and_thawed(preset: str) -> None:
    params, twins = parameters(), parameters()
    opt, twin = optimizer(preset, params), optimizer(preset, twins)
    train(opt, params, range(3))
    train(twin, twins, range(3))
    params["tall"].requires_grad_(False)
    for step in range(3, 5):
        give(params, step, missing=("tall",))
        give(twins, step, missing=("tall",))
        opt.step()
        twin.step()
    assert opt.plan.by_name["tall"].state_bytes == 0
    params["tall"].requires_grad_(True)
    train(opt, params, range(5, 8))
    train(twin, twins, range(5, 8))
    assert same(snapshot(opt, params), snapshot(twin, twins))
    assert opt.plan.by_name["tall"].state_bytes > 0


# -------------------------------------------------------------------------------------------------------------------------- hooks


@every_preset
def test_step_hooks_fire_in_order_and_can_be_removed(preset: str) -> None:
    params = parameters()
    opt = optimizer(preset, params)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append("global pre")),
        opt.register_step_pre_hook(lambda o, a, k: seen.append(f"pre {is_new(o, params)}")),
        opt.register_step_post_hook(lambda o, a, k: seen.append(f"post {is_new(o, params)}")),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append("global post")),
    ]
    try:
        train(opt, params, range(1))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre True", "post False", "global post"]
    train(opt, params, range(1, 2))
    assert len(seen) == 4


def is_new(opt: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> bool:
    return not opt.state


def test_a_step_hook_may_change_the_arguments() -> None:
    params, loss = problem()
    opt = optimizer("adamw", params)

    def closure() -> float:
        loss().backward()
        return 7.0

    handle = opt.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": closure}))
    assert opt.step() == 7.0
    handle.remove()
    assert opt.step() is None


@every_preset
def test_state_dict_hooks_fire_in_order_and_may_edit(preset: str) -> None:
    params = parameters()
    opt = optimizer(preset, params)
    train(opt, params, range(1))
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    opt.register_state_dict_pre_hook(lambda o: seen.append("first"), prepend=True)
    opt.register_state_dict_post_hook(lambda o, s: {**s, "note": torch.tensor(3)})
    opt.register_state_dict_post_hook(lambda o, s: seen.append(f"post {'note' in s}"), prepend=True)
    saved = opt.state_dict()
    assert seen == ["first", "pre", "post False"]
    assert saved["note"] == 3

    other = optimizer(preset, parameters())
    order: list[str] = []

    def halve(o: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        order.append("pre")
        groups = [{**g, "lr": g["lr"] / 2} for g in state["param_groups"]]
        return {**state, "param_groups": groups}

    def take_note(o: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        del state["note"]  # in place, on a copy

    other.register_load_state_dict_pre_hook(take_note)
    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_pre_hook(lambda o, s: order.append("first"), prepend=True)
    other.register_load_state_dict_post_hook(lambda o: order.append(f"post {bool(o.state)}"))
    other.register_load_state_dict_post_hook(lambda o: order.append(f"early {bool(o.state)}"), prepend=True)
    other.load_state_dict(saved)
    assert order == ["first", "pre", "early True", "post True"]
    assert "note" in saved
    assert other.param_groups[0]["lr"] == saved["param_groups"][0]["lr"] / 2
    assert other.param_groups[0]["lr"] != saved["param_groups"][0]["lr"]  # the caller's dictionary is unchanged


# ------------------------------------------------------------------------------------------------------------- copies, text, disk


@every_preset
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_to_the_bit(preset: str, how: str) -> None:
    params = parameters(dtype=torch.bfloat16)
    opt = optimizer(preset, params, nonfinite="skip", rounding="stochastic", seed=5, stacking="never", lr=0.01)
    train(opt, params, range(4))
    opt.skipped["tall"] = 2
    opt.failures["wide"] = 1
    pair = (opt, params)
    twin, twins = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert type(twin) is type(opt)
    assert twin.param_groups[0]["params"][0] is twins["tall"]
    public = {n for n in vars(opt) if not n.startswith("_")} | {"_options", "_overrides", "_modules", "_strict"}
    for name in public - {"state", "param_groups", "defaults"}:
        assert getattr(twin, name) == getattr(opt, name), name
        assert getattr(twin, name) is not getattr(opt, name) or name == "_strict", name
    assert twin.defaults == opt.defaults
    assert repr(twin) == repr(opt)
    assert str(twin.plan) == str(opt.plan)
    assert same(snapshot(twin, twins), snapshot(opt, params))
    train(opt, params, range(4, 8))
    train(twin, twins, range(4, 8))
    assert same(snapshot(twin, twins), snapshot(opt, params))
    assert all(p.data_ptr() != q.data_ptr() for (_, p), (_, q) in zip(flat(opt), flat(twin), strict=True))


@every_preset
def test_the_text_of_an_optimizer_names_its_spec_and_rates(preset: str) -> None:
    opt = optimizer(preset, parameters(), lr=0.125)
    text = repr(opt)
    assert text.startswith("SubspaceOptimizer (")
    assert "lr: 0.125" in text
    assert f"    spec: {small(preset).name}\n" in text


@every_preset
def test_a_state_dict_passes_through_a_file_without_pickled_objects(preset: str) -> None:
    params = parameters(dtype=torch.bfloat16)
    opt = optimizer(preset, params, rounding="kahan")
    train(opt, params, range(4))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    saved = opt.state_dict()
    assert loaded["param_groups"] == saved["param_groups"]
    for number, state in saved["state"].items():
        assert same(loaded["state"][number], state)
    other = optimizer(preset, copied(params), rounding="kahan")
    other.load_state_dict(state_dict=loaded)  # by keyword, as torch's checkpoints call it
    assert same(dict(flat(other)), dict(flat(opt)))


@every_preset
def test_state_dicts_are_deterministic(preset: str) -> None:
    """The original and a clone loaded from its state give equal weights and equal dictionaries ten steps later."""
    params = parameters()
    opt = optimizer(preset, params)
    train(opt, params, range(3))
    twins = copied(params)
    twin = optimizer(preset, twins)
    twin.load_state_dict(opt.state_dict())
    train(opt, params, range(3, 13))
    train(twin, twins, range(3, 13))
    a, b = opt.state_dict(), twin.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    assert all(same(a["state"][i], b["state"][i]) for i in a["state"])
    assert [list(s) for s in a["state"].values()] == [list(s) for s in b["state"].values()]
    assert same(snapshot(opt, params), snapshot(twin, twins))


@every_preset
def test_state_holds_only_plain_tensors_and_their_storages_nothing_else(preset: str) -> None:
    params = parameters(dtype=torch.bfloat16)
    opt = optimizer(preset, params, rounding="kahan")
    train(opt, params, range(4))
    assert held(opt) == sum(value.numel() * value.itemsize for _, value in flat(opt)) == opt.plan.total_bytes
    for key, value in flat(opt):
        assert type(value) is Tensor, key
        assert value.is_contiguous(), key
        assert not value.requires_grad, key


@every_preset
@pytest.mark.parametrize("into", ["named", "unnamed"])
@pytest.mark.parametrize("source", ["named", "unnamed"])
def test_states_load_from_named_and_unnamed_into_named_and_unnamed(preset: str, source: str, into: str) -> None:
    def made(params: dict[str, nn.Parameter], named: str) -> SubspaceOptimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # without names the modules are unknown
            return SubspaceOptimizer(params.items() if named == "named" else params.values(), small(preset))

    params = parameters()
    opt = made(params, source)
    train(opt, params, range(3))
    twins = copied(params)
    twin = made(twins, into)
    twin.load_state_dict(opt.state_dict())
    assert [v for _, v in flat(opt)]
    for p, q in zip(params.values(), twins.values(), strict=True):
        assert same(opt.state[p], twin.state[q])
    # Names are saved and loaded. A dictionary without names keeps the optimizer's names.
    names = list(params) if "named" in (source, into) else None
    assert twin.param_groups[0].get("param_names") == names
    # Draws depend on names, so a run with names resumes to the bit.
    train(opt, params, range(3, 7))
    train(twin, twins, range(3, 7))
    if source == "named" or into == "unnamed":
        assert same(snapshot(opt, params), snapshot(twin, twins))


@every_preset
def test_a_step_that_is_a_number_loads(preset: str) -> None:
    params = parameters()
    opt = optimizer(preset, params)
    train(opt, params, range(4))
    saved = opt.state_dict()
    saved["state"] = {i: {**s, "step": int(s["step"])} for i, s in saved["state"].items()}
    twins = copied(params)
    twin = optimizer(preset, twins)
    twin.load_state_dict(saved)
    train(opt, params, range(4, 7))
    train(twin, twins, range(4, 7))
    assert same(snapshot(opt, params), snapshot(twin, twins))


# --------------------------------------------------------------------------------------------------------------------- GradScaler


@every_preset
def test_a_grad_scaler_skips_a_step_with_infinities(preset: str) -> None:
    params, twins = parameters(), parameters()
    opt, twin = optimizer(preset, params), optimizer(preset, twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        give(params, step)
        for p in params.values():
            assert p.grad is not None
            p.grad *= 1024.0 if step < 2 else 512.0
        if step == 1:
            assert params["wide"].grad is not None
            params["wide"].grad[0, 0] = float("inf")
            before = snapshot(opt, params)
        scaler.scale(torch.zeros(()))  # the scale is made lazily
        scaler.step(opt)
        scaler.update()
        if step == 1:
            assert same(snapshot(opt, params), before)
            assert scaler.get_scale() == 512.0
    for step in (0, 2, 3):
        give(twins, step)
        twin.step()
    assert same(snapshot(opt, params), snapshot(twin, twins))


# --------------------------------------------------------------------------------------------------- shapes and ways of storing


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)  # a product rounds differently with other strides


ODD: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: ones(),
    "1-d": lambda: ones(6),
    "empty vector": lambda: ones(0),
    "empty matrix": lambda: ones(0, 4),
    "1 x n": lambda: ones(1, 6),
    "n x 1": lambda: ones(6, 1),
    "3-d": lambda: ones(3, 5, 4),
    "4-d": lambda: ones(6, 2, 3, 3),
    "5-d": lambda: ones(4, 2, 2, 2, 3),
    "channels last": lambda: ones(6, 2, 3, 3).to(memory_format=torch.channels_last),
    "every second column": lambda: ones(6, 8)[:, ::2],
    "stored transposed": lambda: ones(4, 6).mT,
    "experts inside out": lambda: ones(6, 4, 3).permute(2, 0, 1),
    "a slice of a larger one": lambda: ones(3, 9)[:, 2:7],
}


def filled(make: Callable[[], Tensor]) -> nn.Parameter:
    x = make()
    return nn.Parameter(x.copy_(gradient("value", tuple(x.shape), 0, torch.float64)))


def check_moves_like_its_contiguous_twin(spec: Any, make: Callable[[], Tensor]) -> None:
    p = filled(make)
    q = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    strides, pointer = p.stride(), p.data_ptr()
    params, twins = {"weight": p}, {"weight": q}
    opt, twin = optimizer(spec, params), optimizer(spec, twins)
    for step in range(5):
        give(params, step)
        give(twins, step)
        if step % 2:  # autograd may return such a gradient
            p.grad = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p.grad)
        opt.step()
        twin.step()
    assert finite(snapshot(opt, params))
    assert max(differences(snapshot(opt, params), snapshot(twin, twins)).values()) < 1e-7
    assert (p.stride(), p.data_ptr()) == (strides, pointer)
    assert p.numel() == 0 or not torch.equal(p, filled(make))


@every_preset
@pytest.mark.parametrize("kind", ODD)
def test_every_shape_and_storage_moves_like_its_contiguous_twin(preset: str, kind: str) -> None:
    check_moves_like_its_contiguous_twin(preset, ODD[kind])


@every_preset
@pytest.mark.parametrize(
    ("route", "kind"),
    [
        (route, kind)
        for route in ({"heads": 2}, {"split": {"q": 2, "k": 4}}, {"split": {"q": 2, "k": 2}, "transposed": True}, {"view": "modes"})
        for kind in ("stored transposed", "every second column", "experts inside out", "channels last")
        if not ("transposed" in route and kind != "every second column")
    ],
)
def test_a_cut_or_turned_weight_may_be_stored_in_any_way(preset: str, route: dict[str, Any], kind: str) -> None:
    """This includes storage that cannot be viewed as matrices, so they are copied out and back."""
    spec = small(preset)
    own = subspace_opt.spec.Route(use=next(iter(spec.pipelines)), **route)
    check_moves_like_its_contiguous_twin(spec.model_copy(update={"routes": (own, *spec.routes)}), ODD[kind])


# -------------------------------------------------------------------------------------------------------------- side effects


@pytest.mark.all_presets
@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_only_read(preset: str, dtype: torch.dtype, maximize: bool) -> None:
    params = parameters({**SHAPES, "conv": (4, 3, 2, 2)}, dtype)
    opt = optimizer(preset, params, maximize=maximize, weight_decay=0.1)
    for step in range(5):
        give(params, step)
        if step == 3:  # too large to be squared: brought into range on a copy
            params["tall"].grad = params["tall"].grad * 1e30
        grads = {n: (p.grad, p.grad.clone(), p.grad.data_ptr(), p.grad._version) for n, p in params.items()}
        opt.step()
        for name, (own, values, pointer, version) in grads.items():
            assert params[name].grad is own
            assert same_tensor(own, values)
            assert (own.data_ptr(), own._version) == (pointer, version)


@pytest.mark.all_presets
@every_preset
def test_no_global_generator_is_touched(preset: str) -> None:
    """Other seeds give the same run, and the generators' states are unchanged."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        params = parameters(dtype=torch.bfloat16)
        opt = optimizer(preset, params, rounding="stochastic")
        train(opt, params, range(5))
        opt.load_state_dict(opt.state_dict())
        copy.deepcopy(opt)
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()
        assert before[2] == random.getstate()
        runs.append(snapshot(opt, params))
    assert same(runs[0], runs[1])


@every_preset
def test_the_order_of_parameters_does_not_matter(preset: str) -> None:
    params, twins = parameters(), parameters()
    backwards = dict(reversed(twins.items()))
    opt, twin = optimizer(preset, params), optimizer(preset, backwards)
    train(opt, params, range(5))
    train(twin, backwards, range(5))
    assert same(snapshot(opt, params), snapshot(twin, twins))


class Eventful:
    """A run with many events: the rates jump, a parameter is frozen and unfrozen, and state is loaded again."""

    def __init__(self, preset: str) -> None:
        self.params = parameters({"tall": (6, 3), "mate": (6, 3), "bias": (3,)})
        self.opt = optimizer(preset, self.params)

    def go(self, steps: range) -> None:
        mate = self.params["mate"]
        for step in steps:
            self.opt.param_groups[0]["lr"] = 1e-3 / (1 + step % 7)
            if step % 10 == 4:
                mate.requires_grad_(step % 20 == 4)
                self.opt.load_state_dict(self.opt.state_dict())
            give(self.params, step, missing=() if mate.requires_grad else ("mate",))
            self.opt.step()
        self.opt.zero_grad()


@pytest.mark.slow
@pytest.mark.usefixtures("new_objects_only")
def test_memory_does_not_grow() -> None:
    """After 60 steps there are no more tensors and no larger state. Presets are tested together, and each alone if that fails."""
    runs = {preset: Eventful(preset) for preset in sorted(covering())}
    for run in runs.values():
        run.go(range(30))
    before, sizes = tensors(), {preset: held(run.opt) for preset, run in runs.items()}
    for run in runs.values():
        run.go(range(30, 90))
    assert not [preset for preset, run in runs.items() if held(run.opt) > sizes[preset]]
    if tensors() > before:
        assert not [preset for preset, run in runs.items() if grows(run)], f"{tensors()} tensors, {before} before"
        pytest.fail(f"{tensors()} tensors, {before} before, and no preset alone adds any")


def grows(run: Eventful) -> bool:
    before = tensors()
    run.go(range(90, 150))
    return tensors() > before


def held(opt: SubspaceOptimizer) -> int:
    """Bytes of the storages of the state."""
    return sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for _, v in flat(opt)}.values())


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())
