"""The optimizer for its caller: wrong arguments, compilation, copies, its representation, and steps without gradients."""

from __future__ import annotations

import copy
import html
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import PRESETS, copied, flat, give, optimizer, parameters, train
from pool import run_ranks
from ranks import make_zoo, mesh_of, place
from torch import Tensor, nn

import subspace_opt
from subspace_opt import Spec, SpecError, SubspaceOptimizer, build, load_spec, step_in_backward
from subspace_opt.engine import lowbit
from subspace_opt.optimizer import EMPTY_STEPS, OPTIONS

# --------------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("given", "kind"),
    [([nn.Parameter(torch.ones(2))], "list"), (nn.Parameter(torch.ones(2)), "Parameter"), (("late", 1), "tuple"), (None, "NoneType")],
)
def test_a_group_must_be_a_dict(given: Any, kind: str) -> None:
    opt = optimizer("cosmos", parameters())
    with pytest.raises(TypeError, match=rf"a parameter group is a dict, such as \{{'params': \[weight\].*, and this is a {kind}$"):
        opt.add_param_group(given)
    assert len(opt.param_groups) == 1


def test_groups_and_tensors_cannot_be_mixed() -> None:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="a parameter group is a dict"):
        SubspaceOptimizer([{"params": [one]}, two], "adamw")  # type: ignore[list-item]


class Model(nn.Module):
    """An embedding, which only the model tells from a matrix by name, and two hidden matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)


def split_in_two(model: nn.Module) -> list[dict[str, Any]]:
    """Groups as trainers make them: without names."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]


def test_groups_without_names_take_names_and_roles_from_the_model() -> None:
    model = Model()
    opt = SubspaceOptimizer(split_in_two(model), "cosmos", model=model)
    found = {row.entry.name: (row.role.name, row.pipeline) for row in opt.plan}
    assert found == {row.entry.name: (row.role.name, row.pipeline) for row in build("cosmos", model).plan}
    assert found["table.weight"] == ("embedding", "other")
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    flat = SubspaceOptimizer(model.parameters(), "cosmos", model=model)
    assert flat.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    named = SubspaceOptimizer([{"params": [("_orig_mod.first.weight", model.first.weight)]}], "cosmos", model=model)
    assert [row.entry.name for row in named.plan] == ["_orig_mod.first.weight"], "given names stay"
    with pytest.raises(ValueError, match=r"^a parameter of shape \(4, 4\) is not in the given model; pass the model whose"):
        SubspaceOptimizer([nn.Parameter(torch.ones(4, 4))], "cosmos", model=model)


def test_a_model_stands_for_its_parameters() -> None:
    model = Model()
    assert SubspaceOptimizer(model, "cosmos").explain().to_dict() == build("cosmos", model).explain().to_dict()


def test_groups_without_names_are_refused_if_routes_ask_for_roles() -> None:
    text = (
        "spec 'cosmos' routes parameters by role, and these parameter groups have no names, so the roles of 3 matrices are unknown: "
        "embeddings would be updated as hidden matrices. Pass the model too: model=model"
    )
    with pytest.raises(SpecError, match=f"^{re.escape(text)}$"):
        SubspaceOptimizer(split_in_two(Model()), "cosmos")
    SubspaceOptimizer(split_in_two(Model()), "adamw")
    SubspaceOptimizer(split_in_two(Model()), "cosmos", roles={"*": "hidden"})
    with pytest.warns(UserWarning, match="no model was given"):
        SubspaceOptimizer(Model().parameters(), "cosmos")


# ------------------------------------------------------------------------------------------------------------------ compilation

# Dynamo itself reads the gradient of the loss, which is not a leaf.
as_dynamo_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)), torch.randn(6, 8)


def ordinary(model: nn.Module, spec: str = "cosmos", **options: Any) -> SubspaceOptimizer:
    """`build` with the arguments in the order of `step_in_backward`."""
    return build(spec, model, **options)


both_kinds = pytest.mark.parametrize("make", [ordinary, step_in_backward])


def weights_after(preset: str, compiled: str, make: Callable[..., Any] = ordinary, backend: str = "eager", steps: int = 3) -> list[Tensor]:
    """The weights after some steps. `compiled`: None, the optimizer's step, or the whole training step."""
    torch._dynamo.reset()
    model, x = network()
    opt = make(model, preset, lr=1e-2, weight_decay=0.1)

    def training_step() -> Tensor:
        loss: Tensor = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    call: Callable[[], Any] = training_step
    if compiled == "step":
        opt.step = torch.compile(opt.step, backend=backend)
    elif compiled == "training step":
        call = torch.compile(training_step, backend=backend)
    for _ in range(steps):
        call()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.slow
@as_dynamo_warns
@pytest.mark.parametrize("preset", ["adamw", "cosmos"])
@pytest.mark.parametrize("compiled", ["step", "training step"])
def test_a_compiled_step_is_the_step(preset: str, compiled: str) -> None:
    for a, b in zip(weights_after(preset, ""), weights_after(preset, compiled), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@as_dynamo_warns
def test_a_compiled_training_step_has_compiled_gradients_and_the_same_update() -> None:
    for a, b in zip(weights_after("cosmos", ""), weights_after("cosmos", "training step", backend="aot_eager"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@as_dynamo_warns
@pytest.mark.parametrize("compiled", ["step", "training step"])
def test_a_compiled_step_ends_an_iteration_of_updates_in_backward(compiled: str) -> None:
    for a, b in zip(weights_after("cosmos", "", step_in_backward), weights_after("cosmos", compiled, step_in_backward), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@as_dynamo_warns
def test_a_compiled_step_takes_a_closure() -> None:
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, x = network()
        opt = build("muon", model, lr=1e-2)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step

        def closure(model: nn.Module = model, x: Tensor = x, opt: Any = opt) -> float:
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return float(loss.detach())

        losses = [step(closure) for _ in range(2)]
        ends.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


# ----------------------------------------------------------------------------------------------------------- copies of coded state

LARGE = {"tall": (96, 64), "wide": (64, 96), "bias": (96,)}


def everything(opt: SubspaceOptimizer, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Weights and state, including codes and scales."""
    out = {name: p.detach().clone() for name, p in params.items()}
    for name, value in flat(opt):
        coded = lowbit.found(value) is not None
        out |= {f"{name}/{part}": getattr(value, part).clone() for part in ("codes", "scale")} if coded else {name: value.clone()}
    return out


def agree(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("word", ["8bit", "4bit"])
@pytest.mark.parametrize("preset", ["adamw", "cosmos", "muon"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_with_codes_goes_on_to_the_bit_and_alone(preset: str, word: Any, how: str) -> None:
    params = parameters(LARGE)
    opt = optimizer(preset, params, state_dtype=word, lr=0.01)
    train(opt, params, range(3))
    assert any("/codes" in name for name in everything(opt, params))
    twin, twins = copy.deepcopy((opt, params)) if how == "deepcopy" else pickle.loads(pickle.dumps((opt, params)))
    assert [id(p) for p in twin.param_groups[0]["params"]] == [id(p) for p in twins.values()]
    assert {id(p) for p in twin.state} == {id(p) for p in twins.values()}
    at_the_cut = everything(opt, params)
    assert agree(at_the_cut, everything(twin, twins))
    train(twin, twins, range(3, 6))
    assert agree(at_the_cut, everything(opt, params))  # the copy has storages of its own
    train(opt, params, range(3, 6))
    assert agree(everything(opt, params), everything(twin, twins))


def test_a_deep_copy_of_a_state_with_codes_is_a_copy() -> None:
    params = parameters(LARGE)
    opt = optimizer("adamw", params, state_dtype="8bit")
    train(opt, params, range(2))
    best = copy.deepcopy(opt.state_dict())
    before, start = everything(opt, params), copied(params)
    train(opt, params, range(2, 5))
    assert not agree(before, everything(opt, params))
    opt.load_state_dict(best)
    for name, p in params.items():
        p.data.copy_(start[name].data)
    assert agree(before, everything(opt, params))


@pytest.mark.slow
def test_an_unpickled_optimizer_can_be_copied_in_a_fresh_process(tmp_path: Any) -> None:
    params = parameters(LARGE)
    opt = optimizer("adamw", params, state_dtype="8bit")
    train(opt, params, range(1))
    (tmp_path / "opt").write_bytes(pickle.dumps(opt))
    code = f"import copy, pickle; opt = pickle.load(open({str(tmp_path / 'opt')!r}, 'rb')); print(len(copy.deepcopy(opt).state))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3"]


def test_a_copy_of_an_optimizer_alone_trains_parameters_of_its_own() -> None:
    """As in torch.optim: parameters are copied with the optimizer unless the model is copied in the same call."""
    params = parameters(LARGE)
    opt = optimizer("muon", params, state_dtype="4bit")
    train(opt, params, range(1))
    twin = copy.deepcopy(opt)
    assert not {id(p) for p in params.values()} & {id(p) for p in twin.param_groups[0]["params"]}


# ------------------------------------------------------------------------------------------------------------------- what is shown


def described() -> SubspaceOptimizer:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 50))
    opt = build("cosmos", model, lr=3e-3, weight_decay=0.1, overrides={"matrix.selector.rank": 4})
    opt.add_param_group({"params": [("<b>late", nn.Parameter(torch.ones(3, 8, 8)))], "lr": 0.25, "maximize": True, "use": "matrix"})
    return opt


def test_the_text_of_an_optimizer_is_for_people() -> None:
    opt = described()
    rows = opt.plan.rows
    bytes_of = {name: sum(row.state_bytes for row in rows[:5] if row.pipeline == name) for name in ("matrix", "other")}
    assert repr(opt).splitlines() == [
        "SubspaceOptimizer (",
        "Parameter Group 0",
        "    spec: cosmos",
        "    lr: 0.003",
        "    weight_decay: 0.1",
        f"    other: 4 parameters, 4 matrices, {bytes_of['other']:,} bytes of state",
        f"    matrix: 1 parameter, 1 matrix, {bytes_of['matrix']:,} bytes of state",
        "Parameter Group 1",
        "    spec: cosmos",
        "    lr: 0.25",
        "    weight_decay: 0.1",
        "    maximize: True",
        f"    matrix: 1 parameter, 3 matrices, {rows[5].state_bytes:,} bytes of state",
        ")",
    ]


def test_the_text_of_an_optimizer_follows_its_rates_and_frozen_parameters() -> None:
    opt = described()
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    opt.param_groups[1]["params"][0].requires_grad_(False)
    assert "    lr: 0.5\n" in repr(opt)
    assert "matrix: 1 parameter (1 frozen), 3 matrices, 0 bytes of state" in repr(opt)


def test_the_text_of_a_plan_is_a_summary_and_its_print_the_table() -> None:
    plan = described().plan
    text = repr(plan)
    assert text.startswith(f"Plan('cosmos', 6 parameters, {plan.total_bytes:,} bytes of state, ")
    assert "\n  matrix: 2 parameters, 4 matrices, " in text
    assert len(text.splitlines()) == 3
    assert len(str(plan).splitlines()) == 1 + 6 + 1
    assert repr(subspace_opt.make_plan(load_spec("adamw"), [])) == "Plan('', 0 parameters, 0 bytes of state)"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_text_of_a_spec_has_a_line_for_each_pipeline(preset: str) -> None:
    spec = load_spec(preset)
    first, *lines = repr(spec).splitlines()
    assert first == f"Spec('{preset}')"
    assert [line.split()[0] for line in lines] == [*spec.pipelines, "routes"]
    assert str(spec) == repr(spec)
    assert all(len(line) < 400 for line in lines)


def test_the_text_of_a_spec_is_in_its_own_words() -> None:
    spec = load_spec("cosmos", {"matrix.selector.rank": 4, "matrix.complement": [{"kind": "muon", "steps": 3}, "scale"]})
    assert repr(spec).splitlines()[1:] == [
        "  matrix  momentum=heavy_ball(nesterov=True, debias=True), selector=eigen(rank=4), inside=soap, "
        "complement=[muon(steps=3), scale], mix={complement: 0.2}, finish=rms_normalize(scale=0.2)",
        "  other   complement=adam(beta1=0.95, beta2=0.95)",
        "  routes  role hidden|fused|conv -> matrix; everything else -> other",
    ]


@pytest.mark.parametrize("what", ["optimizer", "plan", "spec"])
def test_a_notebook_shows_a_table_that_is_escaped_and_has_no_colours(what: str) -> None:
    opt = described()
    plain = load_spec("cosmos").model_dump(mode="json") | {"name": "<script>alert(1)</script>"}
    shown: Any = {"optimizer": opt, "plan": opt.plan, "spec": Spec.model_validate(plain)}[what]
    page = shown._repr_html_()
    tags = set(re.findall(r"</?(\w+)", page))
    assert tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    for tag in tags:
        assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>")
    assert "color" not in page
    assert "background" not in page
    text = html.unescape(page)
    expected = {"optimizer": "lr 0.25, weight_decay 0.1, maximize True", "plan": "<b>late", "spec": "<script>alert(1)</script>"}
    assert expected[what] in text
    assert "<b>" not in page


def test_the_table_of_a_large_plan_ends_and_says_so() -> None:
    entries = [subspace_opt.Entry(f"layer{i}", (8, 8)) for i in range(205)]
    page = subspace_opt.make_plan(load_spec("muon"), entries)._repr_html_()
    assert page.count("<tr>") == 1 + 200
    assert page.endswith("<p>5 more parameters; print(plan) shows all</p>")


# -------------------------------------------------------------------------------------------------- options of other optimizers


def said(**options: Any) -> str:
    spec = options.pop("spec", "cosmos")
    with pytest.raises(TypeError) as error:
        build(spec, nn.Linear(8, 8), **options)
    return str(error.value)


def overrides_in(message: str) -> dict[str, Any]:
    found = re.search(r"use overrides=(\{.*?\})", message)
    assert found, message
    return dict(eval(found[1]))


@pytest.mark.parametrize(
    ("spec", "given", "expected"),
    [
        ("cosmos", {"betas": (0.9, 0.95)}, {"other.complement.beta1": 0.9, "other.complement.beta2": 0.95}),
        ("cosmos", {"rank": 64}, {"matrix.selector.rank": 64}),
        ("cosmos", {"momentum": 0.9}, {"matrix.momentum.beta": 0.9}),
        ("cosmos", {"nesterov": False}, {"matrix.momentum.nesterov": False}),
        ("muon", {"ns_steps": 4, "mu": 0.8}, {"matrix.complement.steps": 4, "matrix.momentum.beta": 0.8}),
        ("dion", {"mu": 0.8}, {"matrix.feedback": 0.8}),
        ("galore", {"update_proj_gap": 50}, {"matrix.selector.every": 50}),
        ("galore", {"scale": 0.5, "proj_type": "reverse_std"}, {"matrix.mix.inside": 0.5, "matrix.orient": "long"}),
        ("apollo", {"scale": 0.5}, {"matrix.complement.3.factor": 0.5}),
        ("golore", {"rank": 8}, {"matrix.selector.first.rank": 8, "matrix.selector.then.rank": 8}),
        ("golore", {"update_proj_gap": 8}, {"matrix.selector.every": 8}),
        ("adamw", {"eps": 1e-5}, {"all.complement.eps": 1e-5}),
        ("adamw", {"beta2": 0.9}, {"all.complement.beta2": 0.9}),
        ("soap", {"shampoo_beta": 0.9, "precondition_frequency": 3}, {}),
    ],
)
def test_options_of_other_optimizers_are_translated(spec: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    message = said(spec=spec, **given)
    found = overrides_in(message)
    assert not expected or found == expected
    assert f"part of the spec '{spec}'" in message
    load_spec(spec, found)  # the replacement that the message suggests is accepted


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "given", [{"betas": (0.8, 0.9)}, {"eps": 1e-5}, {"rank": 2}, {"momentum": 0.7}, {"scale": 0.5}, {"update_proj_gap": 7}], ids=str
)
def test_every_translation_is_accepted_by_its_spec(preset: str, given: dict[str, Any]) -> None:
    message = said(spec=preset, **given)
    if "has no counterpart" in message:
        assert message == f"'{next(iter(given))}' has no counterpart in spec '{preset}', leave it out"
        return
    found = overrides_in(message)
    assert set(found.values()) <= set(next(iter(given.values()))) if "betas" in given else set(found.values()) == set(given.values())
    if (preset, *given) != ("dion", "update_proj_gap"):  # its selector declares a refresh at every update
        load_spec(preset, found)


@pytest.mark.parametrize("word", ["fused", "foreach", "differentiable"])
def test_options_that_are_not_needed_are_said_so(word: str) -> None:
    assert said(**{word: True}).startswith(f"'{word}' is not needed, leave it out: ")


def test_the_spec_in_force_decides() -> None:
    """Overrides of the call are part of the spec."""
    message = said(spec="cosmos", overrides={"matrix.complement": "adam"}, betas=(0.9, 0.95))
    assert overrides_in(message).keys() >= {"matrix.complement.beta1", "other.complement.beta1"}


def test_several_options_are_said_at_once() -> None:
    message = said(rank=8, betas=(0.9, 0.99), fused=True, nonfinit="skip", zzz=1)
    assert message.startswith("'rank', 'betas' are part of the spec 'cosmos'; use overrides=")
    assert "; 'fused' is not needed" in message
    assert "; 'nonfinit' is no option; did you mean 'nonfinite'?" in message
    assert message.endswith(f"; 'zzz' is no option; known: {', '.join(sorted(OPTIONS))}")


@both_kinds
def test_an_unknown_option_makes_no_optimizer(make: Callable[..., Any]) -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(TypeError, match="'nesterov' is part of the spec 'cosmos'"):
        make(model, "cosmos", nesterov=True)
    assert not model.weight._post_accumulate_grad_hooks
    with pytest.raises(TypeError, match="'momentum' is part of the spec 'muon'"):
        SubspaceOptimizer(model.parameters(), "muon", momentum=0.9)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- steps without gradients


def warned(opt: Any, steps: int) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            opt.step()
    return [w for w in found if "no parameter had a gradient" in str(w.message)]


@both_kinds
def test_steps_without_any_gradient_warn_once(make: Callable[..., Any]) -> None:
    opt = make(network()[0])
    assert not warned(opt, EMPTY_STEPS - 1)
    (warning,) = warned(opt, 1)
    assert warning.filename == __file__
    for cause in ("replaced", "to_empty", "frozen", r"zero_grad() runs between"):
        assert cause in str(warning.message)
    assert not warned(opt, 10)


@both_kinds
def test_a_step_with_a_gradient_starts_the_count_again(make: Callable[..., Any]) -> None:
    model, x = network()
    opt = make(model)
    for _ in range(3):
        assert not warned(opt, EMPTY_STEPS - 1)
        model(x).sum().backward()
        assert not warned(opt, 1)
        opt.zero_grad()
    assert len(warned(opt, EMPTY_STEPS)) == 1


def test_one_gradient_is_enough() -> None:
    params = parameters()
    opt = optimizer("cosmos", params)
    for step in range(5):
        give(params, step, missing=tuple(params)[1:])
        assert not warned(opt, 1)


@pytest.mark.parametrize(
    "cause", ["replaced", "zero_grad", "frozen"], ids=["parameters replaced after the build", "zero_grad before step", "a frozen model"]
)
def test_the_usual_causes_are_found(cause: str) -> None:
    model, x = network()
    model.requires_grad_(cause != "frozen")
    opt = build("muon", model)
    if cause == "replaced":
        model[0].weight = nn.Parameter(torch.ones(12, 8))  # type: ignore[index, union-attr]
        for p in list(model.parameters())[1:]:
            p.requires_grad_(False)
    seen = []
    for _ in range(EMPTY_STEPS):
        loss = model(x).square().mean()
        if loss.requires_grad:
            loss.backward()
        if cause == "zero_grad":
            opt.zero_grad()
        seen += warned(opt, 1)
    assert len(seen) == 1


def warnings_on_this_rank(gradients: tuple[int, ...]) -> int:
    """The number of warnings on this rank in a run in which only some ranks have a gradient of one sharded parameter."""
    model = place(make_zoo(), "fsdp", mesh_of("fsdp", dist.get_world_size()))
    opt = build("cosmos", model, lr=1e-3)
    count = 0
    for _ in range(EMPTY_STEPS + 1):
        p = model.square.weight
        p.grad = torch.ones_like(p) if dist.get_rank() in gradients else None
        count += len(warned(opt, 1))
    return count


@pytest.mark.slow
def test_ranks_without_a_gradient_warn_only_if_no_rank_has_one() -> None:
    assert run_ranks(2, warnings_on_this_rank, ()) == [1, 1]
    assert run_ranks(2, warnings_on_this_rank, (0,)) == [0, 0]


def test_an_optimizer_without_parameters_does_not_warn() -> None:
    opt = SubspaceOptimizer([{"params": []}], "adamw")
    assert not warned(opt, 5)
