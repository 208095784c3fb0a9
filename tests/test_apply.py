"""The last place, `apply`: each rule against its formula, and what zero gradients, rounding, experts and groups make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subspace_opt
from subspace_opt import SpecError, SubspaceOptimizer, WeightError, build, load_spec
from subspace_opt.algebra import Step
from subspace_opt.algebra.frame import Frame
from subspace_opt.algebra.pipeline import Pipeline
from subspace_opt.engine import strategies
from subspace_opt.engine.homes import Memory
from subspace_opt.engine.moment import step_of
from subspace_opt.engine.stacking import stacks
from subspace_opt.engine.work import Options
from tests.common import copied, give, gradient, optimizer, parameters

SHAPES = {"tall": (7, 4), "mate": (7, 4), "wide": (4, 7), "vector": (5,)}
LR, DECAY = 0.05, 0.3


def spec(apply: Any = None, decay: str = "before", **places: Any) -> subspace_opt.Spec:
    """A spec that sends everything through one pipeline, plain gradient descent unless `places` says otherwise."""
    pipeline = {"complement": "sgd", "decay": decay, "apply": apply, **places}
    return subspace_opt.Spec.model_validate({"name": "trial", "pipelines": {"all": pipeline}, "routes": [{"use": "all"}]})


# ------------------------------------------------------------------------------------------------------------ the formulas

Formula = Callable[[Tensor, Tensor, float], Tensor]  # weight, gradient, norm of the weight at the start -> new weight
KEPT = 1 - LR * DECAY


def brake(w: Tensor, u: Tensor, outward: float, inward: float) -> Tensor:
    w = KEPT * w
    new = w - LR * u
    start, end = float(w.norm()), float(new.norm())
    return new / end * (start + (outward if end > start else inward) * (end - start))


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def polar(x: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


def cautious(w: Tensor, u: Tensor, start: float) -> Tensor:
    flat = [x - LR * DECAY * x * (x * g >= 0) - LR * g for x, g in zip(w.flatten().tolist(), u.flatten().tolist(), strict=True)]
    return torch.tensor(flat, dtype=w.dtype).view(w.shape)


SVD = {"kind": "orthogonalize", "method": "svd"}
FORMULAS: dict[str, tuple[Any, str, Formula]] = {
    "decay": ("decay", "before", lambda w, u, start: KEPT * w - LR * u),
    "decay after": ({"kind": "decay", "when": "after"}, "before", lambda w, u, start: KEPT * (w - LR * u)),
    "cautious": ("cautious", "before", cautious),
    "relative": ("relative", "before", lambda w, u, start: KEPT * w - LR * u * (KEPT * w).norm() / u.norm()),
    "relative, decay after": ("relative", "after", lambda w, u, start: KEPT * (w - LR * u * w.norm() / u.norm())),
    "hyperball": ("hyperball", "before", lambda w, u, start: start * unit(KEPT * w - LR * start * unit(u))),
    "hyperball of 2": (
        {"kind": "hyperball", "radius": 2.0},
        "before",
        lambda w, u, start: 2 * unit(KEPT * w - LR * 2 * unit(u)),
    ),
    "brake": ("radial_brake", "before", lambda w, u, start: brake(w, u, 0.5, 1.0)),
    "brake inwards": ({"kind": "radial_brake", "outward": 1.0, "inward": 0.3}, "before", lambda w, u, start: brake(w, u, 1.0, 0.3)),
    "retract": ({"kind": "retract", "by": SVD}, "before", lambda w, u, start: polar(KEPT * w - LR * u)),
    "cautious, relative": (
        ["cautious", "relative"],
        "before",
        lambda w, u, start: (c := cautious(w, u, start) + LR * u) - LR * u * c.norm() / u.norm(),
    ),
    "coupled, retract": ({"kind": "retract", "by": SVD}, "coupled", lambda w, u, start: polar(w - LR * (u + DECAY * w))),
}


def normalized(formula: Formula) -> Formula:
    """The formula on a vector as the matrix of one row that it is."""
    return lambda w, u, start: formula(w.view(1, -1), u.view(1, -1), start).view(w.shape) if w.dim() == 1 else formula(w, u, start)


@pytest.mark.parametrize("stacking", ["never", "always"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_rule_is_its_formula(name: str, stacking: Any) -> None:
    """Norms are those of each matrix, also in a stack."""
    apply, decay, formula = FORMULAS[name]
    params = parameters(SHAPES, torch.float64)
    start = {key: float(p.detach().norm()) for key, p in params.items()}
    expected = {key: p.detach().clone() for key, p in params.items()}
    opt = optimizer(spec(apply, decay), params, lr=LR, weight_decay=DECAY, stacking=stacking)
    for step in range(4):
        give(params, step)
        opt.step()
        for key, p in params.items():
            grad = gradient(key, tuple(p.shape), step, torch.float64)
            expected[key] = normalized(formula)(expected[key], grad, start[key])
            assert torch.allclose(p.detach(), expected[key], rtol=1e-12, atol=1e-13), (key, step)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_words_and_the_rule_are_one_decay(when: str) -> None:
    ends = []
    for apply, decay in ((None, when), ({"kind": "decay", "when": when}, "before")):
        params = parameters(SHAPES, torch.float64)
        opt = optimizer(spec(apply, decay, momentum="ema"), params, lr=LR, weight_decay=DECAY)
        for step in range(5):
            give(params, step)
            opt.step()
        ends.append(params)
    for key, p in ends[0].items():
        assert torch.allclose(p, ends[1][key], rtol=1e-13, atol=1e-14), key


def test_a_rule_that_decays_replaces_the_pipelines_decay() -> None:
    """`decay: before` is the default, and a weight must not decay twice."""
    assert load_spec(spec("cautious")).pipelines["all"].decay_beside_rules is None
    assert load_spec(spec("hyperball")).pipelines["all"].decay_beside_rules == "before"


# ------------------------------------------------------------------------------------------------------- zeros and silence

PROJECTIONS = ["hyperball", {"kind": "hyperball", "radius": 2.0}, {"kind": "retract", "by": SVD}, "relative", "radial_brake", "cautious"]


@pytest.mark.parametrize("apply", PROJECTIONS, ids=str)
def test_a_weight_without_a_gradient_so_far_only_decays(apply: Any) -> None:
    """Zero gradients start nothing: such a step initialises the state when a checkpoint is loaded, with lr 0."""
    params = parameters({"tall": (7, 4)}, torch.float64)
    before = params["tall"].detach().clone()
    opt = optimizer(spec(apply), params, lr=0.0, weight_decay=DECAY)
    params["tall"].grad = torch.zeros_like(params["tall"])
    opt.step()
    assert torch.equal(params["tall"], before)
    opt.param_groups[0]["lr"] = LR
    opt.step()
    assert torch.allclose(params["tall"], KEPT * before, rtol=1e-14)
    assert int(opt.state[params["tall"]]["step"]) == 0


ZERO: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "relative": ("relative", lambda w: KEPT * w),
    "hyperball": ({"kind": "hyperball", "radius": 2.0}, lambda w: 2 * w / w.norm()),
    "radial_brake": ("radial_brake", lambda w: KEPT * w),
    "retract": ({"kind": "retract", "by": SVD}, polar),
    "cautious": ("cautious", lambda w: KEPT * w),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_zero_update_of_a_weight_that_has_begun(name: str) -> None:
    """Decay and projection go on, and nothing is divided by 0."""
    apply, expected = ZERO[name]
    params = parameters({"tall": (7, 4)}, torch.float64)
    opt = optimizer(spec(apply), params, lr=LR, weight_decay=DECAY)
    give(params, 0)
    opt.step()
    before = params["tall"].detach().clone()
    params["tall"].grad = torch.zeros_like(params["tall"])
    opt.step()
    assert torch.allclose(params["tall"], expected(before), rtol=1e-12)


@pytest.mark.parametrize("apply", PROJECTIONS, ids=str)
def test_with_lr_0_only_projections_move_the_weight(apply: Any) -> None:
    params = parameters({"tall": (7, 4)}, torch.float64)
    before = params["tall"].detach().clone()
    opt = optimizer(spec(apply), params, lr=0.0, weight_decay=DECAY)
    give(params, 0)
    opt.step()
    still = apply in ("hyperball", "relative", "radial_brake", "cautious")
    assert torch.allclose(params["tall"], before, rtol=1e-14) == still


def test_a_weight_moved_off_its_sphere_comes_back() -> None:
    """The radius is that of the first update, not that of the present weight."""
    params = parameters({"tall": (7, 4)}, torch.float64)
    radius = float(params["tall"].detach().norm())
    opt = optimizer(spec("hyperball"), params, lr=LR)
    for step in range(3):
        give(params, step)
        opt.step()
        assert abs(float(params["tall"].detach().norm()) - radius) < 1e-12
        params["tall"].data.mul_(3.0)


def test_a_weight_that_starts_at_0_has_no_sphere() -> None:
    params = {"fine": nn.Parameter(torch.ones(3, 3)), "empty": nn.Parameter(torch.zeros(3, 3))}
    opt = optimizer(spec("hyperball"), params)
    give(params, 0)
    with pytest.raises(WeightError, match=r"'empty': `hyperball` keeps the norm .* initialise the weight, give a `radius`"):
        opt.step()


def test_a_matrix_whose_decomposition_fails_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsuccessful retraction is a failed decomposition: the weight is left alone, and the next update tries again."""
    params = parameters({"tall": (7, 4), "wide": (4, 7)}, torch.float64)
    opt = optimizer(spec({"kind": "retract", "by": SVD}), params, lr=LR)
    give(params, 0)
    opt.step()
    before = {key: p.detach().clone() for key, p in params.items()}
    own = torch.linalg.svd

    def fails(x: Tensor, *args: Any, **options: Any) -> Any:
        if x.size(-2) > x.size(-1):
            raise torch.linalg.LinAlgError("no convergence")
        return own(x, *args, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    give(params, 1)
    with pytest.warns(RuntimeWarning, match="a decomposition for 'tall' failed"):
        opt.step()
    assert torch.equal(params["tall"], before["tall"])
    assert not torch.equal(params["wide"], before["wide"])


def test_experts_keep_their_own_norms_from_their_own_start() -> None:
    """An expert that is routed nothing at first begins with its first gradient."""
    experts = nn.Parameter(gradient("experts", (3, 5, 4), 99, torch.float64) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
    params = {"experts": experts}
    opt = optimizer(spec("hyperball"), params, lr=LR, weight_decay=DECAY)
    norms = experts.detach().flatten(1).norm(dim=1)
    for step in range(4):
        give(params, step)
        assert experts.grad is not None
        if step < 2:
            experts.grad[1] = 0
        opt.step()
    norms[1] *= KEPT**2  # it decayed while it waited
    assert torch.allclose(experts.detach().flatten(1).norm(dim=1), norms, rtol=1e-13)
    assert torch.allclose(opt.state[experts]["apply.radius"], norms, rtol=1e-13)


# ------------------------------------------------------------------------------------------------------------ low precision


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_the_rule_sees_the_weight_and_rounding_its_result(rounding: Any) -> None:
    """bfloat16 keeps 8 bits. With Kahan's compensation the sum of both is on the sphere and orthogonal to 16 bits."""
    limits = {"nearest": 2**-8, "stochastic": 2**-7, "kahan": 2**-14}
    params = parameters({"tall": (7, 4)}, torch.bfloat16)
    opt = optimizer(spec({"kind": "retract", "by": SVD}), params, lr=LR, rounding=rounding)
    for step in range(12):
        give(params, step)
        opt.step()
    w = params["tall"].detach().double() + opt.state[params["tall"]].get("compensation", torch.zeros(())).double()
    off = float((w.mT @ w - torch.eye(4)).abs().max())
    assert off < 4 * limits[rounding]
    if rounding == "nearest":
        assert off > limits["kahan"]  # or the limit of kahan would show nothing


def test_hyperball_in_bfloat16_follows_float32() -> None:
    ends = {}
    for dtype, rounding in ((torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "kahan")):
        params = parameters({"tall": (24, 16)}, torch.bfloat16)
        params = {key: nn.Parameter(p.detach().to(dtype)) for key, p in params.items()}
        opt = SubspaceOptimizer(params.items(), spec("hyperball", momentum="ema"), lr=1e-3, weight_decay=0.0, rounding=rounding)  # type: ignore[arg-type]
        for step in range(60):
            for key, p in params.items():
                p.grad = gradient(key, tuple(p.shape), step % 3, torch.bfloat16).to(dtype)
            opt.step()
        ends[dtype, rounding] = params["tall"].detach().double()
    exact = ends[torch.float32, "nearest"]
    gaps = {key: float((end - exact).norm()) for key, end in ends.items()}
    assert gaps[torch.bfloat16, "kahan"] < 0.3 * gaps[torch.bfloat16, "nearest"], gaps


# -------------------------------------------------------------------------------------------------------- groups and tensors


def test_groups_of_other_rates_share_no_stack() -> None:
    """Each matrix is updated with its own group's lr and decay, as if it were alone."""
    start = parameters({"a": (7, 4), "b": (7, 4), "c": (7, 4)}, torch.float64)
    rates = {"a": (0.05, 0.3), "b": (0.1, 0.3), "c": (0.05, 0.0)}
    together, alone = copied(start), copied(start)

    def group(params: dict[str, nn.Parameter], key: str) -> dict[str, Any]:
        return {"params": [(key, params[key])], "lr": rates[key][0], "weight_decay": rates[key][1]}

    opts = [SubspaceOptimizer([group(together, key) for key in rates], spec("cautious"), stacking="always")]
    singles = [SubspaceOptimizer([group(alone, key)], spec("cautious")) for key in rates]
    for params, own in ((together, opts), (alone, singles)):
        for step in range(3):
            give(params, step)
            for opt in own:
                opt.step()
    for key in rates:
        assert torch.allclose(together[key], alone[key], rtol=1e-14), key


def test_learning_rates_on_a_device_stay_there() -> None:
    """A stack of matrices with a tensor each gets one number per matrix, `(B, 1, 1)`."""
    params = parameters({"a": (7, 4), "b": (7, 4)}, torch.float32)
    opt = optimizer(spec("cautious"), params, lr=0.1, stacking="always")
    give(params, 0)
    work, _ = opt._ready(list(opt._planned_parameters()))
    for item, rate in zip(work, (0.25, 0.5), strict=True):
        item.lr = torch.tensor(rate, dtype=torch.float64)
    (stack,) = stacks(work, Options(stacking="always"), Memory())
    lr = step_of(stack, Options(), {}).lr
    assert isinstance(lr, Tensor)
    assert (lr.dtype, lr.flatten().tolist(), lr.shape) == (torch.float32, [0.25, 0.5], (2, 1, 1))


def test_a_rate_for_each_matrix_is_the_rate_of_that_matrix() -> None:
    frame = Frame.of(Pipeline.model_validate({"complement": "sgd", "apply": ["decay", "relative"]}), 5, 3)
    g, w = (torch.stack([gradient(f"{name}{b}", (5, 3), 0, torch.float64) for b in range(2)]) for name in "gw")
    one = torch.ones((), dtype=torch.float64)
    step = Step(t=one, age=one, first=True, decay=0.2, rows=frame.rows, cols=frame.cols)
    both, _ = frame.update(g, w, {}, step._replace(lr=torch.tensor([0.1, 0.3], dtype=torch.float64).view(2, 1, 1)))
    for b, lr in enumerate((0.1, 0.3)):
        single, _ = frame.update(g[b : b + 1], w[b : b + 1], {}, step._replace(lr=lr))
        assert torch.allclose(both.dense()[b], single.dense()[0], rtol=1e-13)


def test_plan_checkpoint_and_dcp_know_the_radius() -> None:
    model = nn.Linear(4, 7, bias=False)
    opt = build("muon-hyperball", model)
    assert opt.plan.rows[0].state["apply.radius"] == ((), torch.float32)
    model.weight.grad = torch.ones_like(model.weight)
    norm = model.weight.detach().norm()
    opt.step()
    saved = opt.state_dict()
    assert torch.equal(opt.state[model.weight]["apply.radius"], norm)
    twin = build("muon-hyperball", nn.Linear(4, 7, bias=False))
    twin.load_state_dict(saved)
    assert torch.equal(twin.state[twin.param_groups[0]["params"][0]]["apply.radius"], norm)


# ------------------------------------------------------------------------------------------------------------- wrong specs

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two decays": ({"apply": ["decay", "cautious"]}, "decays the weight 2 times, by decay and cautious; keep one of them"),
    "a word and a rule": ({"apply": "cautious", "decay": "after"}, "`decay: after` and 'cautious' in `apply` both decay the weight; set"),
    "a gradient and a rule": ({"apply": "decay", "decay": "coupled"}, "`decay: coupled` and 'decay' in `apply` both decay the weight"),
    "a rule of another family": ({"apply": "muon"}, "unknown weight rule kind 'muon'; that is a rule; known: cautious, decay"),
    "a weight rule in another place": ({"finish": "hyperball"}, "unknown rule kind 'hyperball'; that is a weight_rule"),
    "a misspelt kind": ({"apply": "hyperbal"}, "did you mean 'hyperball'?"),
    "a retraction with state": ({"apply": {"kind": "retract", "by": "adam"}}, "'adam' needs more than the weight, or makes it 0"),
    "a retraction to 0": ({"apply": {"kind": "retract", "by": "none"}}, "'none' needs more than the weight, or makes it 0"),
    "a radius of 0": ({"apply": {"kind": "hyperball", "radius": 0.0}}, "radius"),
    "an unknown option": ({"apply": {"kind": "relative", "epsilon": 1.0}}, "epsilon"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_spec_is_refused(what: str) -> None:
    places, message = WRONG[what]
    with pytest.raises(SpecError) as caught:
        load_spec({"pipelines": {"matrix": {"complement": "sgd", **places}}})
    assert message in str(caught.value)


def test_overrides_reach_the_place() -> None:
    changed = load_spec("muon-hyperball", {"matrix.apply.radius": 3.0}).pipelines["matrix"].apply
    assert [rule.model_dump() for rule in changed] == [{"kind": "hyperball", "radius": 3.0}]
    assert load_spec("muon", {"matrix.apply": "relative"}).pipelines["matrix"].apply[0].model_dump()["kind"] == "relative"


def test_only_pipelines_with_rules_need_the_weight() -> None:
    """Without rules, owners of sharded matrices get no weights, and fused kernels and lifts stay in use."""
    assert not Frame.of(load_spec("muon").pipelines["matrix"], 5, 3).needs_weight
    assert Frame.of(load_spec("muon-hyperball").pipelines["matrix"], 5, 3).needs_weight
    assert strategies.fused(Frame.of(load_spec("adamw").pipelines["all"], 1, 5)) is not None
    assert strategies.fused(Frame.of(load_spec("adamw", {"all.apply": "cautious"}).pipelines["all"], 1, 5)) is None


def test_entries_are_updated_apart_if_all_rules_are_elementwise() -> None:
    """Ranks then exchange nothing for an embedding with cautious decay; a norm needs the whole matrix."""
    for apply, apart in (("cautious", True), ("decay", True), ("hyperball", False), (["cautious", "relative"], False)):
        frame = Frame.of(load_spec("adamw", {"all.apply": apply}).pipelines["all"], 6, 5)
        assert (strategies.is_elementwise(frame), strategies.is_by_rows(frame)) == (apart, apart), apply
