"""The state of one optimizer becomes that of another: what is said to be exact is exact, and the run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from common import LINEAR, copied, parameters, same, small, snapshot, train
from torch import Tensor

from subspace_opt import (
    ConversionError,
    Converted,
    Dim,
    Rule,
    Slot,
    Spec,
    State,
    Step,
    SubspaceOptimizer,
    convert,
    load_spec,
    make_plan,
    register,
    registry,
)
from subspace_opt.cli import main
from subspace_opt.cli.changes.consequences import consequences
from subspace_opt.conversion.moments import Moment, squares
from subspace_opt.spec.difference import differences

SHAPES = {"tall": (9, 6), "wide": (6, 9), "bias": (4,)}
STEPS = 7
DOUBLE = torch.float64


def adamw(params: dict[str, Any], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(params.items()), lr=1e-2, **options)


def made(spec: Spec, params: dict[str, Any], **options: Any) -> SubspaceOptimizer:
    return SubspaceOptimizer(params.items(), spec, modules=dict.fromkeys(params, LINEAR), **options)


def trained(spec: Any, steps: int = STEPS, dtype: torch.dtype = DOUBLE) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    """Parameters and their optimizer after a few updates; `spec`: a preset, a spec, or a function that makes an optimizer."""
    params = parameters(SHAPES, dtype)
    opt = spec(params) if callable(spec) else made(small(spec) if isinstance(spec, str) else spec, params)
    train(opt, params, range(steps))
    return params, opt


def changed(opt: torch.optim.Optimizer, params: dict[str, Any], to: Any, **options: Any) -> Converted:
    spec = small(to) if isinstance(to, str) else to
    return convert(opt.state_dict(), spec, model=list(params.items()), modules=dict.fromkeys(params, LINEAR), **options)


def state_of(result: Converted, name: str) -> dict[str, Tensor]:
    return result.state_dict["state"][list(SHAPES).index(name)]


def told(result: Converted, name: str) -> dict[str, tuple[str, str]]:
    """Status and reason of every slot of one parameter."""
    return {row.slot: (row.status, row.why) for row in result.report if row.parameter == name}


def goes_on(result: Converted, spec: Any, params: dict[str, Any]) -> SubspaceOptimizer:
    """Load the state into an optimizer of the spec and make two updates, which must be finite."""
    opt = made(small(spec) if isinstance(spec, str) else spec, params)
    opt.load_state_dict(result.state_dict)
    train(opt, params, range(STEPS, STEPS + 2))
    assert all(p.isfinite().all() for p in params.values())
    return opt


def near(a: Tensor, b: Tensor, tol: float = 1e-12) -> bool:
    return bool((a - b).norm() <= tol * b.norm())


# ------------------------------------------------------------------------------------------------------------- exactness


def test_adamw_to_cosmos_keeps_the_mean_gradient() -> None:
    params, opt = trained(adamw)
    result = changed(opt, params, "cosmos")
    for name in ("tall", "wide"):
        mean = opt.state[params[name]]["exp_avg"] / (1 - 0.9**STEPS)
        got = state_of(result, name)["momentum.momentum_buffer"] * (1 - 0.95) / (1 - 0.95**STEPS)
        assert near(got, mean)
        assert told(result, name)["momentum.momentum_buffer"][0] == "exact"
        assert told(result, name)["inside.exp_avg_sq"][0] == "approximate"
        assert told(result, name)["selector.basis"][0] == "rebuilt"
        u = state_of(result, name)["selector.basis"]
        assert near(u.mT @ u, torch.eye(3, dtype=DOUBLE))
        assert (state_of(result, name)["inside.exp_avg_sq"] > 0).all()
    bias = state_of(result, "bias")["complement.exp_avg_sq"] / (1 - 0.95**STEPS)
    assert near(bias[0], opt.state[params["bias"]]["exp_avg_sq"] / (1 - 0.999**STEPS))
    after = goes_on(result, "cosmos", params)
    assert [int(after.state[p]["step"]) for p in params.values()] == [STEPS + 2] * 3


def test_torchs_adamw_to_ours_goes_on_with_the_same_updates() -> None:
    params, opt = trained(adamw)
    twin = copied(params)
    ours = made(load_spec("adamw"), twin)
    ours.load_state_dict(changed(opt, params, "adamw", lr=1e-2, weight_decay=1e-2).state_dict)
    train(opt, params, range(STEPS, STEPS + 3))
    train(ours, twin, range(STEPS, STEPS + 3))
    assert all(near(twin[name], params[name]) for name in params)


@pytest.mark.parametrize("preset", ["cosmos", "soap", "galore", "trion"])
def test_a_change_to_itself_changes_no_bit(preset: str) -> None:
    params, opt = trained(preset)
    result, twin = changed(opt, params, preset), copied(params)
    assert {row.status for row in result.report} == {"exact"}
    after = made(small(preset), twin)
    after.load_state_dict(result.state_dict)
    train(opt, params, range(STEPS, STEPS + 3))
    train(after, twin, range(STEPS, STEPS + 3))
    assert same(snapshot(opt, params), snapshot(after, twin))


def test_galores_momentum_is_lifted() -> None:
    params, opt = trained("galore")
    result = changed(opt, params, "cosmos")
    held = opt.state[params["tall"]]
    mean = held["inside.exp_avg"] @ held["selector.basis"].mT / (1 - 0.9**STEPS)  # 9 x 6: a basis of the shorter side, the columns
    got = state_of(result, "tall")
    assert near(got["momentum.momentum_buffer"] * 0.05 / (1 - 0.95**STEPS), mean)
    assert told(result, "tall")["momentum.momentum_buffer"][0] == "approximate"
    assert "nothing outside" in told(result, "tall")["momentum.momentum_buffer"][1]
    old, new = held["selector.basis"], got["selector.basis"]
    assert near(old @ (old.mT @ new), new)  # the same span
    goes_on(result, "cosmos", params)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_change_of_rank_keeps_the_leading_directions(rank: int) -> None:
    params, opt = trained("cosmos")
    spec = load_spec(small("cosmos"), {"matrix.selector.rank": rank})
    result = changed(opt, params, spec)
    held, got = opt.state[params["tall"]], state_of(result, "tall")
    assert torch.equal(got["momentum.momentum_buffer"], held["momentum.momentum_buffer"])
    u, covariance = held["selector.basis"], held["selector.covariance"]
    leading = u @ torch.linalg.eigh(covariance)[1].flip(-1)[:, :rank]
    new = got["selector.basis"]
    assert near(new.mT @ new, torch.eye(rank, dtype=DOUBLE))
    assert near(new @ (new.mT @ leading), leading, 1e-6)  # all of them, and for a higher rank others too
    assert (got["inside.exp_avg_sq"] > 0).all()
    assert [told(result, "tall")[slot][0] for slot in ("momentum.momentum_buffer", "inside.exp_avg_sq")] == ["exact", "approximate"]
    goes_on(result, spec, params)


def test_soap_to_cosmos_takes_the_covariances_leading_eigenvectors() -> None:
    params, opt = trained("soap")
    result = changed(opt, params, "cosmos")
    _, vectors = torch.linalg.eigh(opt.state[params["tall"]]["selector.cols.covariance"])
    lead, u = vectors.flip(-1)[:, :3], state_of(result, "tall")["selector.basis"]
    assert near(u @ (u.mT @ lead), lead, 1e-6)
    held = opt.state[params["tall"]]
    mean = held["selector.rows.basis"] @ held["inside.0.exp_avg"] @ held["selector.cols.basis"].mT / (1 - 0.95 ** (STEPS - 1))
    n = STEPS - 1  # SOAP's first gradient makes no update
    assert near(state_of(result, "tall")["momentum.momentum_buffer"] * 0.05 / (1 - 0.95**n), mean)
    assert told(result, "tall")["momentum.momentum_buffer"][0] == "exact"
    assert float(state_of(result, "tall")["step"]) == n
    goes_on(result, "cosmos", params)


def test_second_moments_keep_the_mean_and_rotate_the_variance_by_squares() -> None:
    draws = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 5, 4, generator=draws, dtype=DOUBLE)
    variance = torch.rand(1, 5, 4, generator=draws, dtype=DOUBLE)
    q = torch.linalg.qr(torch.randn(1, 4, 4, generator=draws, dtype=DOUBLE))[0]
    square = Moment(mean.square() + variance)
    got = squares(square, Moment(mean), None, q)
    assert near(got, (mean @ q).square() + variance @ q.square())
    assert near(got.sum(-1), square.value.sum(-1))  # a rotation keeps the energy of a row
    assert torch.equal(squares(square, None, None, None), square.value)
    half = squares(Moment(square.value @ q.square()[..., :2], right=q[..., :2]), None, None, q)
    assert (half[..., 2:] > 0).all()  # directions without a known energy are not divided by 0


def test_other_dtypes_are_said_to_round() -> None:
    params, opt = trained("adamw", dtype=torch.float32)
    spec = load_spec("adamw", {"all.state_dtype": {"exp_avg": "bf16"}})
    result = changed(opt, params, spec)
    assert told(result, "tall")["complement.exp_avg"] == ("approximate", "same rule in the same coordinates: kept; rounded to bfloat16")
    assert told(result, "tall")["complement.exp_avg_sq"][0] == "exact"
    again = changed(goes_on(result, spec, params), params, spec)
    assert told(again, "tall")["complement.exp_avg"][0] == "exact"


# ------------------------------------------------------------------------------------- what the old state does not tell


def test_second_moments_come_from_the_momentum_if_there_are_none() -> None:
    params, opt = trained("muon")
    result = changed(opt, params, "cosmos")
    status, why = told(result, "tall")["inside.exp_avg_sq"]
    assert status == "rebuilt"
    assert "energy" in why
    mean = opt.state[params["tall"]]["momentum.exp_avg"] / (1 - 0.95**STEPS)
    assert near(state_of(result, "tall")["inside.exp_avg_sq"].sum(), _held_energy(mean, state_of(result, "tall")) * (1 - 0.95**STEPS), 0.5)
    goes_on(result, "cosmos", params)


def _held_energy(mean: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The energy of gradients that are mostly noise, for the share of directions that the basis has."""
    u = state["selector.basis"]
    return mean.square().sum() * (1.95 / 0.05) * u.size(-1) / u.size(-2)


def test_a_parameter_of_which_nothing_is_known_starts_anew() -> None:
    sgd = load_spec({"name": "plain", "pipelines": {"all": {"complement": "sgd"}}, "routes": [{"use": "all"}]})
    params, opt = trained(sgd)
    result = changed(opt, params, "cosmos")
    assert result.state_dict["state"] == {}
    assert {row.status for row in result.report} == {"reset"}
    assert "starts anew" in told(result, "tall")["all slots"][1]
    after = goes_on(result, "cosmos", params)
    assert int(after.state[params["tall"]]["step"]) == 2  # its bias corrections begin again


def test_sgds_momentum_needs_a_counter() -> None:
    params, opt = trained(lambda params: torch.optim.SGD(list(params.items()), lr=1e-2, momentum=0.9))
    with pytest.raises(ConversionError, match=r"no counter `step`.*step=1000"):
        changed(opt, params, "cosmos")
    result = changed(opt, params, "cosmos", step=STEPS)
    mean = opt.state[params["tall"]]["momentum_buffer"] * 0.1 / (1 - 0.9**STEPS)
    assert near(state_of(result, "tall")["momentum.momentum_buffer"] * 0.05 / (1 - 0.95**STEPS), mean)


def test_old_slots_without_use_are_listed() -> None:
    params, opt = trained("adamw")
    result = changed(opt, params, "lion")
    assert told(result, "tall")["complement.exp_avg_sq"] == ("dropped", "the new pipeline has no use for it")
    assert result.report.counts()["dropped"] == len(SHAPES)


# ------------------------------------------------------------------------------------------------------ kinds and groups


@pytest.fixture
def twice() -> Iterator[str]:
    """A rule of a plugin: an average whose weights sum up to 2."""
    before = dict(registry._kinds["rule"])

    @register
    class Twice(Rule):
        kind: Literal["twice"] = "twice"

        def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
            return {"own_mean": Slot((rows, cols))}

        def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
            m = state["own_mean"] * 0.8 + x * 0.4
            return m, {"own_mean": m}

    yield "twice"
    registry._kinds["rule"].clear()
    registry._kinds["rule"].update(before)


def test_kinds_of_plugins_are_converted(twice: str) -> None:
    spec = load_spec({"name": "own", "pipelines": {"matrix": {"complement": [twice, "muon"]}}})
    params, opt = trained(adamw)
    there = changed(opt, params, spec)
    assert told(there, "tall")["complement.0.own_mean"][0] == "exact"
    mean = opt.state[params["tall"]]["exp_avg"] / (1 - 0.9**STEPS)
    assert near(state_of(there, "tall")["complement.0.own_mean"] / (2 * (1 - 0.8**STEPS)), mean)
    back = convert(there.state_dict, "adamw", model=list(params.items()), modules=dict.fromkeys(params, LINEAR))
    assert near(state_of(back, "tall")["complement.exp_avg"] / (1 - 0.9**STEPS), mean)


def test_groups_keep_the_ratios_of_their_rates() -> None:
    params = parameters(SHAPES, DOUBLE)
    groups = [
        {"params": [("tall", params["tall"]), ("wide", params["wide"])], "weight_decay": 0.1},
        {"params": [("bias", params["bias"])], "weight_decay": 0.0, "lr": 5e-3},
    ]
    opt = torch.optim.AdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    train(opt, params, range(3))
    result = changed(opt, params, "cosmos")
    found = [(group["lr"], group["initial_lr"], group["weight_decay"]) for group in result.state_dict["param_groups"]]
    assert found == [pytest.approx(numbers) for numbers in ((1e-3, 2e-3, 0.1), (5e-4, 1e-3, 0.0))]
    assert scheduler.last_epoch == 0
    same_name = changed(opt, params, load_spec("cosmos", {"name": "torch.optim.AdamW"}))
    assert same_name.state_dict["param_groups"][0]["lr"] == 5e-3


def test_parameters_without_names_are_matched_by_position() -> None:
    params = parameters(SHAPES, DOUBLE)
    opt = torch.optim.AdamW(list(params.values()))
    train(opt, params, range(2))
    result = changed(opt, params, "cosmos")
    assert state_of(result, "wide")["momentum.momentum_buffer"].shape == (6, 9)
    with pytest.raises(ConversionError, match="3 parameters without names and the given model has 2"):
        convert(opt.state_dict(), "cosmos", model=list(params.items())[:2])


BAD = [
    ({"state": {}}, "needs `state` and `param_groups`"),
    (
        {"state": {0: {"row_var": torch.ones(2)}}, "param_groups": [{"params": [0], "lr": 1.0}]},
        "cannot be converted: its slots are row_var",
    ),
    (
        {
            "state": {0: {"exp_avg": torch.ones(2, 2), "step": 3.0}},
            "param_groups": [{"params": [0], "lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}],
        },
        r"'tall'.*shape \(2, 2\), and the parameter has \(9, 6\)",
    ),
    (
        {"state": {}, "param_groups": [{"params": [0], "param_names": ["other"], "lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8}]},
        "lacks: other",
    ),
]


@pytest.mark.parametrize(("state", "message"), BAD)
def test_what_cannot_be_converted_is_named(state: dict[str, Any], message: str) -> None:
    params = parameters({"tall": (9, 6)})
    with pytest.raises(ConversionError, match=message):
        convert(state, "cosmos", model=list(params.items()), modules=dict.fromkeys(params, LINEAR))


def test_weights_are_asked_for_if_the_new_spec_reads_them() -> None:
    params, opt = trained("adamw")
    spec = load_spec(small("galore"), {"matrix.selector.source": "weight"})
    meta = {name: torch.nn.Parameter(p.to("meta")) for name, p in params.items()}
    with pytest.raises(ConversionError, match=r"'tall'.*from the weights.*give the model with its weights"):
        changed(opt, meta, spec)
    assert told(changed(opt, params, spec), "tall")["selector.basis"] == ("rebuilt", "first basis of 'svd', from the weights")


# ------------------------------------------------------------------------------------------------------------ commands


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    return int(left.value.code or 0)


@pytest.mark.filterwarnings("ignore:spec 'cosmos' routes parameters by role")  # the checkpoint has names and no model
def test_the_command_converts_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params, opt = trained(adamw, dtype=torch.float32)
    source, out = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({"model": {name: p.detach() for name, p in params.items()}, "optimizer": opt.state_dict(), "epoch": 3}, source)
    words = ("convert", str(source), "--to", "cosmos", "--out", str(out), "--set", "matrix.selector.rank=2")
    assert call(*words) == 0
    shown = capsys.readouterr().out
    assert "momentum.momentum_buffer  exact" in shown
    assert "lr 0.01 -> 0.002" in shown
    saved = torch.load(out, weights_only=True)
    assert saved["epoch"] == 3
    after = SubspaceOptimizer(params.items(), "cosmos", overrides={"matrix.selector.rank": 2})
    after.load_state_dict(saved["optimizer"])
    assert call(*words) == 2
    assert "exists; give another name" in capsys.readouterr().err
    assert call("convert", str(tmp_path / "none.pt"), "--to", "cosmos", "--out", str(tmp_path / "x.pt")) == 2
    assert "does not exist" in capsys.readouterr().err
    torch.save(opt.state_dict(), source)
    assert call("convert", str(source), "--to", "cosmos", "--out", str(tmp_path / "x.pt")) == 2
    assert "give --model NAME" in capsys.readouterr().err


def test_a_difference_names_places_and_makes_defaults_explicit(capsys: pytest.CaptureFixture[str]) -> None:
    found = {change.path: (change.old, change.new) for change in differences(load_spec("galore"), load_spec("cosmos"))}
    assert found["matrix.selector.kind"] == ("svd", "eigen")
    assert found["matrix.selector.every"] == (200, 1)  # a default of `eigen`
    assert found["matrix.momentum.kind"] == (None, "heavy_ball")
    assert found["defaults.lr"] == (1e-2, 2e-3)
    assert "matrix.selector.timing" not in found  # equal
    lone = {change.path for change in differences(load_spec("adamw"), load_spec("muon"))}
    assert {"all / matrix.complement.kind", "routes.0"} <= lone
    assert differences(load_spec("soap"), load_spec("soap")) == []
    assert call("diff", "cosmos", "cosmos", "--set", "matrix.selector.rank=128", "--json") == 0
    (only,) = json.loads(capsys.readouterr().out)["changes"]
    assert (only["path"], only["old"], only["new"]) == ("matrix.selector.rank", 64, 128)
    assert call("diff", "galore", "cosmos") == 0
    assert "heavy_ball" in capsys.readouterr().out


def test_consequences_add_up() -> None:
    params = parameters({"tall": (64, 32), "bias": (8,)})
    plans = [made(load_spec("cosmos", {"matrix.selector.rank": rank}), params).plan for rank in (4, 8)]
    found = consequences(*plans)
    assert found.old.state_bytes == plans[0].total_bytes < plans[1].total_bytes == found.new.state_bytes
    counters = 4 * len(params)
    assert sum(slot.old_bytes for slot in found.slots) == plans[0].total_bytes - counters
    assert [(route.parameter, route.old, route.new) for route in found.routes] == [("tall", "matrix, rank 4", "matrix, rank 8")]
    assert found.new.flops > found.old.flops > 0
    entries = [row.entry for row in plans[0]]
    assert consequences(make_plan(load_spec("muon"), entries), make_plan(load_spec("muon"), entries)).routes == ()
