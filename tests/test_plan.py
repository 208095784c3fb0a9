"""Does the plan give the actual routes, views, ranks and bytes, and does a fused weight train like separate weights?"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from common import LINEAR, PRESETS, SHAPES, Params, flat, give, optimizer, parameters, small, train
from torch import Tensor, nn

from subspace_opt import Entry, Spec, SpecError, SubspaceOptimizer, build, load_spec, make_plan
from subspace_opt.engine.work import Piece
from subspace_opt.plan import COUNTERS
from subspace_opt.plan.modules import module_kinds
from subspace_opt.plan.names import canonical_name
from subspace_opt.spec import Route

every_preset = pytest.mark.parametrize("preset", PRESETS)

# One module for every kind of view.
ALL: dict[str, tuple[int, ...]] = {
    **SHAPES,
    "experts": (3, 5, 4),
    "conv": (6, 2, 3, 3),
    "qkv": (12, 4),
    "heads": (8, 4),
    "stored_transposed": (4, 6),
    "empty": (0, 4),
}
CUTS = (
    Route(use="", name=("qkv",), split={"q": 6, "k": 3, "v": 3}),
    Route(use="", name=("heads",), heads=4),
    Route(use="", name=("stored_transposed",), transposed=True),
    Route(use="", name=("conv",), view="modes"),
)


def cut(spec: Spec, routes: tuple[Route, ...] = CUTS) -> Spec:
    """The spec with more routes to its first pipeline, placed before its own routes."""
    own = tuple(route.model_copy(update={"use": next(iter(spec.pipelines))}) for route in routes)
    return spec.model_copy(update={"routes": (*own, *spec.routes)})


# ------------------------------------------------------------------------------------------------------------------------- bytes


def held(opt: SubspaceOptimizer) -> tuple[int, int]:
    """Bytes of all state: those of the entries, and those of the storages."""
    tensors = [value for _, value in flat(opt)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(t.numel() * t.itemsize for t in tensors), sum(storages.values())


@pytest.mark.all_presets(dtype=[torch.float32, torch.bfloat16])
@every_preset
@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_planned_bytes_are_allocated_bytes(preset: str, dtype: torch.dtype, rounding: Any) -> None:
    params = parameters(ALL, dtype)
    opt = optimizer(cut(small(preset)), params, rounding=rounding)
    planned, constants = opt.plan.total_bytes, opt.plan.constants
    train(opt, params, range(4))
    assert held(opt) == (planned, planned)
    for row in opt.plan:
        own = sum(v.numel() * v.itemsize for v in opt.state[params[row.entry.name]].values())
        assert row.state_bytes == own, row.entry.name
    tables = [t.numel() * t.itemsize for t in opt._memory.tables.values()]
    assert sorted(tables) == sorted(constants.values())


def test_tables_of_two_precisions_are_counted_twice() -> None:
    params = {**parameters({"a": (6, 6)}), **parameters({"b": (6, 6)}, torch.float64)}
    opt = optimizer("trion", params)
    train(opt, params, range(1))
    assert sum(opt.plan.constants.values()) == sum(t.numel() * t.itemsize for t in opt._memory.tables.values()) == 36 * 12


@every_preset
def test_the_plan_of_a_model_without_memory_is_that_of_the_model(preset: str) -> None:
    """Plans from meta parameters and from shapes give the same text, and make no tensor."""
    spec = cut(small(preset))
    real = optimizer(spec, parameters(ALL))
    meta = optimizer(spec, {n: nn.Parameter(torch.empty(s, device="meta")) for n, s in ALL.items()})
    group = real.param_groups[0]
    entries = [Entry(n, s, modules=LINEAR, lr=group["lr"], weight_decay=group["weight_decay"]) for n, s in ALL.items()]
    shapes = make_plan(spec, entries)
    assert str(meta.plan) == str(real.plan) == str(shapes)
    assert meta.plan.to_dict() == real.plan.to_dict() == shapes.to_dict()


def test_adamw_holds_what_the_plan_says_of_adamw() -> None:
    params = parameters(ALL, torch.bfloat16)
    opt = optimizer("galore", params)
    adamw = torch.optim.AdamW(params.values())
    train(adamw, params, range(1))
    assert opt.plan.adamw_bytes == sum(v.numel() * v.itemsize for s in adamw.state.values() for v in s.values())


def test_a_frozen_parameter_is_planned_without_state() -> None:
    params = parameters({"a": (4, 4), "b": (4, 4)})
    params["b"].requires_grad_(False)
    opt = optimizer("cosmos", params)
    assert opt.plan.by_name["b"].state_bytes == 0
    assert opt.plan.total_bytes == opt.plan.by_name["a"].state_bytes > 0
    assert "matrix (frozen)" in str(opt.plan)


# ------------------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("rank", "shape", "shown"),
    [(128, (7, 4), 4), (3, (7, 4), 3), (1, (7, 4), 1), (0.5, (16, 10), 5), (0.25, (6, 6), 2), (0.01, (8, 8), 1)],
)
def test_the_rank_is_clamped_and_shown(rank: float, shape: tuple[int, int], shown: int) -> None:
    row = optimizer(small("galore", rank), parameters({"w": shape})).plan.by_name["w"]
    assert row.ranks == [shown]
    assert row.state["selector.basis"][0] == (min(shape), shown)
    assert row.state["inside.exp_avg"][0] == (max(shape), shown)
    assert row.to_dict()["rank"] == [shown]


def test_a_full_basis_has_no_complement_and_its_state_is_not_planned() -> None:
    params = parameters({"full": (7, 3), "part": (7, 4)})
    spec = load_spec("cosmos", {"matrix.selector.rank": 3, "matrix.complement": ["muon", {"kind": "ema"}]})
    rows = optimizer(spec, params).plan.by_name
    assert "complement.1.exp_avg" in rows["part"].state
    assert not any(key.startswith("complement") for key in rows["full"].state)


# ----------------------------------------------------------------------------------------------------------------------- explain


def test_explain_tells_of_every_parameter_where_it_goes_and_why() -> None:
    params = parameters({"tall": (7, 4), "head.weight": (9, 4), "bias": (4,), "qkv": (12, 4)})
    spec = load_spec(cut(small("muon"), CUTS[:1]), {"matrix.lr_scale": 0.5, "matrix.decay_scale": 2.0, "other.decay_scale": 0.0})
    opt = SubspaceOptimizer(
        [
            {"params": [(n, params[n]) for n in ("tall", "head.weight", "bias")]},
            {"params": [("qkv", params["qkv"])], "weight_decay": 0.25},
        ],
        spec,
        modules={"tall": LINEAR, "qkv": LINEAR},
        weight_decay=0.125,
    )
    opt.param_groups[0]["weight_decay"] = 0.0625  # scheduled since
    plan = opt.explain()
    assert next(iter(plan)).to_dict() == {
        "name": "tall",
        "shape": [7, 4],
        "role": "hidden",
        "view": "7x4",
        "pipeline": "matrix",
        "rank": [],
        "lr_scale": 0.5,
        "weight_decay": 0.125,
        "state_bytes": 7 * 4 * 4 + 4,
        "stored": {},
        "adamw_bytes": 2 * 7 * 4 * 4 + 4,
        "why": "routes.1: role hidden|fused|conv; hidden by module kind linear",
    }
    lines = [" ".join(line.split()) for line in str(plan).splitlines()]
    assert lines[:4] == [
        "parameter shape role seen as pipeline rank lr x decay state why",
        "tall 7x4 hidden 7x4 matrix - 0.5 0.125 116 routes.1: role hidden|fused|conv; hidden by module kind linear",
        "head.weight 9x4 head 9x4 other - 0.015 0 292 routes.2: everything else; head by name head",
        "bias 4 bias 1x4 other - 0.015 0 36 routes.2: everything else; bias by name bias",
    ]
    why = "routes.0: name qkv, split {'q': 6, 'k': 3, 'v': 3}; hidden by module kind linear"
    assert lines[4] == f"qkv 12x4 hidden q 6x4 + k 3x4 + v 3x4 matrix - 0.5 0.5 196 {why}"
    total = plan.total_bytes
    assert lines[5] == f"total state {total:,} bytes ({total / plan.adamw_bytes:.2f} x AdamW's {plan.adamw_bytes:,})"
    assert len(lines) == 6
    assert len(plan) == 4


def test_explain_says_when_a_group_chose_the_pipeline() -> None:
    params = parameters({"w": (4, 4)})
    opt = SubspaceOptimizer([{"params": list(params.items()), "use": "other"}], "muon")
    assert opt.plan.by_name["w"].pipeline == "other"
    assert opt.plan.by_name["w"].why == "its group's `use`"


# ----------------------------------------------------------------------------------------------------------------------- routing


def routed(
    routes: list[dict[str, Any]], params: Params, modules: dict[str, frozenset[str]] | None = None, **options: Any
) -> dict[str, str]:
    """The pipeline, a, b or c, of every parameter."""
    pipeline = {"complement": "sgd"}
    used = {route["use"] for route in routes}
    spec = {"pipelines": {name: pipeline for name in "abc" if name in used}, "routes": routes}
    opt = SubspaceOptimizer(params.items(), spec, modules=modules or dict.fromkeys(params, LINEAR), **options)
    return {row.entry.name: row.pipeline for row in opt.plan}


def test_the_first_route_that_accepts_is_taken() -> None:
    params = parameters({"x.weight": (4, 4), "y.weight": (4, 4), "y.bias": (4,)})
    routes = [{"name": "x.*", "use": "a"}, {"name": "*.weight", "use": "b"}, {"use": "c"}]
    assert routed(routes, params) == {"x.weight": "a", "y.weight": "b", "y.bias": "c"}
    assert routed([routes[1], routes[0], routes[2]], params | parameters({"x.bias": (4,)})) == {
        "x.weight": "b",
        "y.weight": "b",
        "y.bias": "c",
        "x.bias": "a",
    }


def test_globs_are_whole_case_sensitive_and_any_of_several() -> None:
    params = parameters(dict.fromkeys(("Head", "head", "my_head", "layers.3.q", "layers.10.q", "layers.3.k"), (4,)))
    routes = [{"name": ["head", "layers.[0-9].q"], "use": "a"}, {"name": "*head", "use": "b"}, {"use": "c"}]
    assert routed(routes, params) == {
        "Head": "c",
        "head": "a",
        "my_head": "b",
        "layers.3.q": "a",
        "layers.10.q": "c",
        "layers.3.k": "c",
    }


@pytest.mark.parametrize(
    ("condition", "accepted"),
    [
        ({"min_dims": 2}, {"matrix", "row", "experts", "conv"}),
        ({"max_dims": 1}, {"vector", "number"}),
        ({"min_dims": 1, "max_dims": 2}, {"vector", "matrix", "row"}),
        ({"min_dims": 3}, {"experts", "conv"}),
        ({"min_side": 4}, {"matrix", "conv"}),
        ({"min_side": 3}, {"matrix", "experts", "conv"}),
        ({"max_side": 8}, {"vector", "number", "matrix", "row", "experts"}),
        ({"max_side": 7, "min_dims": 2}, {"row", "experts"}),
        ({"min_dims": 0}, {"vector", "number", "matrix", "row", "experts", "conv"}),
    ],
)
def test_dimensions_and_sides_are_those_of_the_matrices(condition: dict[str, int], accepted: set[str]) -> None:
    """Experts (5, 3, 6) are matrices of 3 x 6, a kernel (4, 2, 3, 3) one of 4 x 18."""
    params = parameters({"vector": (5,), "number": (), "matrix": (4, 8), "row": (1, 6), "experts": (5, 3, 6), "conv": (4, 2, 3, 3)})
    found = routed([{**condition, "use": "a"}, {"use": "b"}], params) if len(accepted) < 6 else routed([{**condition, "use": "a"}], params)
    assert {name for name, use in found.items() if use == "a"} == accepted


def test_all_conditions_of_a_route_must_hold() -> None:
    params = parameters({"q": (4, 4), "bias_q": (4,), "k": (4, 4)})
    assert routed([{"name": "*q", "min_dims": 2, "use": "a"}, {"use": "b"}], params) == {"q": "a", "bias_q": "b", "k": "b"}


def test_a_parameter_that_no_route_accepts_is_an_error() -> None:
    with pytest.raises(
        SpecError, match=r"parameter 'bias' of shape \(4,\) and role bias is accepted by no route of 'unnamed'; add a route without"
    ):
        routed([{"min_dims": 2, "use": "a"}], parameters({"w": (4, 4), "bias": (4,)}))


def test_strict_wants_every_route_taken() -> None:
    params = parameters({"w": (4, 4), "bias": (4,)})
    routes = [{"name": "q*", "use": "a"}, {"min_dims": 2, "use": "a"}, {"use": "b"}]
    assert routed(routes, params) == {"w": "a", "bias": "b"}
    with pytest.raises(SpecError, match=r"routes\.0 \(name q\*\) of 'unnamed' matches no parameter; correct it, or leave out strict"):
        routed(routes, params, strict=True)
    assert routed(routes[1:], params, strict=True) == {"w": "a", "bias": "b"}


@pytest.mark.parametrize(
    ("route", "shape", "message"),
    [
        ({"split": {"q": 2, "k": 3}}, (6, 4), r"has 6 rows, and `split` \(q 2 \+ k 3 = 5\) does not fill them"),
        ({"heads": 4}, (6, 4), "has 6 rows, which 4 heads do not divide"),
        ({"heads": 2}, (6,), "is not a matrix, so `split` and `heads` have no rows to cut"),
        ({"transposed": True}, (6,), "is not a matrix, so it cannot be stored transposed"),
        ({"heads": 2, "transposed": True, "view": "stack"}, (3, 4, 6), "is a stack of transposed matrices, whose rows `heads` cannot cut"),
    ],
)
def test_a_shape_that_does_not_fit_its_route_is_an_error(route: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SpecError, match=rf"parameter 'w' of shape \({shape[0]},.*\) {message} \(routes\.0 of 'unnamed'\)"):
        routed([{**route, "use": "a"}], parameters({"w": shape}))


def test_a_group_may_name_only_a_pipeline_of_its_spec() -> None:
    params = parameters({"w": (4, 4)})
    with pytest.raises(SpecError, match="parameter group of 'w': use 'matrices' is not a pipeline of 'muon'; known: matrix, other"):
        SubspaceOptimizer([{"params": list(params.items()), "use": "matrices"}], "muon")


@pytest.mark.parametrize("name", ["_orig_mod.layer.weight", "layer._orig_mod.weight", "layer._checkpoint_wrapped_module._orig_mod.weight"])
def test_names_are_those_without_wrappers(name: str) -> None:
    assert canonical_name(name) == "layer.weight"
    assert routed(
        [{"name": "layer.weight", "use": "a"}, {"use": "b"}], {name: nn.Parameter(torch.ones(3)), "z": nn.Parameter(torch.ones(2))}
    ) == {
        name: "a",
        "z": "b",
    }


# ----------------------------------------------------------------------------------------------------------------------- modules


class Conv1D(nn.Module):
    """GPT-2's linear layer as in transformers: weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


class MyRmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Model(nn.Module):
    def __init__(self, tied: bool = False, vocabulary: int = 11, named: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 6)
        self.bag = nn.EmbeddingBag(5, 6)
        self.conv = nn.Conv2d(2, 4, 3)
        self.conv1 = nn.Conv1d(2, 4, 3)
        self.norm = nn.LayerNorm(6)
        self.own_norm = MyRmsNorm(6)
        self.fc = Conv1D(8, 6)
        self.mlp = nn.Linear(6, 6)
        self.unembed = nn.Linear(6, vocabulary if not named else 7, bias=False)
        self.free = nn.Parameter(torch.ones(6, 3))
        if tied:
            self.unembed.weight = self.embed.weight
        if named:
            self.get_output_embeddings = lambda: self.unembed


FREE = {"free": "hidden"}  # otherwise a guess, and a warning


def kinds(model: nn.Module) -> dict[str, set[str]]:
    found = module_kinds(model)
    return {name: set(found.get(id(p), ())) for name, p in model.named_parameters()}


def test_modules_tell_what_a_parameter_is() -> None:
    assert kinds(Model()) == {
        "free": set(),
        "embed.weight": {"embedding"},
        "bag.weight": {"embedding"},
        "conv.weight": {"conv"},
        "conv.bias": {"conv"},
        "conv1.weight": {"conv"},
        "conv1.bias": {"conv"},
        "norm.weight": {"norm"},
        "norm.bias": {"norm"},
        "own_norm.weight": {"norm"},
        "fc.weight": {"linear", "transposed"},
        "fc.bias": {"linear"},
        "mlp.weight": {"linear"},
        "mlp.bias": {"linear"},
        "unembed.weight": {"linear", "head"},
    }


def test_a_head_is_what_the_model_says_or_what_is_as_wide_as_the_vocabulary() -> None:
    assert kinds(Model())["unembed.weight"] == {"linear", "head"}
    named = kinds(Model(named=True))  # seven outputs, eleven words
    assert named["unembed.weight"] == {"linear", "head"}
    assert named["mlp.weight"] == {"linear"}


def test_a_vocabulary_as_small_as_the_width_makes_heads_of_no_inner_layers() -> None:
    found = kinds(Model(vocabulary=6))
    assert found["mlp.weight"] == {"linear"}
    assert found["unembed.weight"] == {"linear", "head"}


@every_preset
def test_a_tied_weight_is_one_parameter_embedding_and_head(preset: str) -> None:
    model = Model(tied=True)
    assert kinds(model)["embed.weight"] == {"embedding", "linear", "head"}
    opt = build(small(preset), model, roles=FREE)
    assert [row.entry.name for row in opt.plan].count("embed.weight") == 1
    assert "unembed.weight" not in opt.plan.by_name
    assert len(opt.plan) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if ("hidden", "fused", "conv") in {route.role for route in load_spec(name).routes}]
)
def test_presets_keep_embeddings_and_heads_out_of_their_subspaces(preset: str) -> None:
    rows = build(small(preset), Model(), roles=FREE).plan.by_name
    found = {name: row.pipeline for name, row in rows.items()}
    assert {found[n] for n in ("embed.weight", "bag.weight", "unembed.weight", "norm.weight", "mlp.bias")} == {"other"}
    assert {found[n] for n in ("conv.weight", "fc.weight", "mlp.weight", "free")} == {"matrix"}


def test_without_a_model_a_warning_names_the_matrices_whose_role_is_a_guess() -> None:
    params = parameters({"a": (4, 4), "b": (4, 4), "lm_head.weight": (4, 4)})
    text = "spec 'cosmos' routes parameters by role, and no model was given, and no name tells the role of 'a', 'b'. 'a' goes"
    with pytest.warns(UserWarning, match=re.escape(text)):
        SubspaceOptimizer(params.items(), small("cosmos"))
    SubspaceOptimizer(params.items(), "adamw")  # has no such route
    SubspaceOptimizer([{"params": list(params.items()), "use": "matrix"}], small("cosmos"))


def test_a_transposed_layer_and_a_kernel_are_seen_as_matrices() -> None:
    rows = build(small("galore"), Model(), roles=FREE).plan.by_name
    assert str(rows["fc.weight"].view) == "8x6, stored transposed"
    assert str(rows["conv.weight"].view) == "4x18"
    assert str(rows["conv1.weight"].view) == "4x6"
    assert str(rows["embed.weight"].view) == "11x6"


def test_wrapped_models_are_routed_and_named_like_bare_ones() -> None:
    bare = Model()
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", bare)
    plans = [build(small("cosmos"), model, roles=FREE).plan for model in (bare, wrapped)]
    assert str(plans[0]) == str(plans[1])
    assert [row.entry.name for row in plans[1]] == [n for n, _ in bare.named_parameters()]


def test_a_model_without_parameters_is_an_error() -> None:
    with pytest.raises(SpecError, match="the model has no parameters"):
        build("cosmos", nn.ReLU())


# ------------------------------------------------------------------------------------------------- cut weights are weights of their own


def run(spec: Spec, values: dict[str, Tensor], grads: dict[str, list[Tensor]]) -> tuple[SubspaceOptimizer, dict[str, Tensor]]:
    """The optimizer and the weights after all gradients."""
    params = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    opt = optimizer(spec, params, weight_decay=0.1)
    for step in range(len(next(iter(grads.values())))):
        for name, p in params.items():
            p.grad = grads[name][step].clone()
        opt.step()
    return opt, {name: p.detach() for name, p in params.items()}


def draw(*shape: int, steps: int = 7) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    both = torch.randn(steps + 1, *shape, generator=generator, dtype=torch.float64)
    return both[0], list(both[1:])


@every_preset
@pytest.mark.parametrize("kind", ["split", "heads", "experts", "split experts"])
def test_a_fused_weight_moves_like_its_parts_alone(preset: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(preset)
    if kind == "split":
        value, grads = draw(15, 4)
        route = Route(use="", name=("fused",), split={"q": 7, "k": 5, "v": 3})
        cuts = {"q": slice(0, 7), "k": slice(7, 12), "v": slice(12, 15)}
    elif kind == "heads":
        value, grads = draw(15, 4)
        route = Route(use="", name=("fused",), heads=3)
        cuts = {n: slice(5 * i, 5 * i + 5) for i, n in enumerate("qkv")}
    elif kind == "experts":
        value, grads = draw(3, 5, 4)
        route = Route(use="", name=("fused",), view="stack")
        cuts = dict(enumerate(range(3)))
    else:
        value, grads = draw(2, 7, 4)
        route = Route(use="", name=("fused",), view="stack", split={"q": 4, "k": 3})
        cuts = {f"{e}{n}": (e, s) for e in range(2) for n, s in (("q", slice(0, 4)), ("k", slice(4, 7)))}
    same_draws(monkeypatch)
    spec = cut(spec, (route, Route(use="", min_dims=2)))
    _, fused = run(spec, {"fused": value}, {"fused": grads})
    _, alone = run(spec, {str(n): value[c] for n, c in cuts.items()}, {str(n): [g[c] for g in grads] for n, c in cuts.items()})
    for name, part in cuts.items():
        assert torch.allclose(fused["fused"][part], alone[str(name)], rtol=1e-9, atol=1e-9), name
    assert not torch.allclose(fused["fused"], value)


def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random draws depend on name, block and step. Here a part and its twin get the same draws."""
    from subspace_opt.engine import moment

    def noise(piece: Piece, call: int, shape: tuple[int, ...], seed: int) -> Tensor:
        one = torch.randn(shape, generator=torch.Generator().manual_seed(call))
        return one.expand(piece.stop - piece.start, *shape)

    monkeypatch.setattr(moment, "_noise", noise)


@every_preset
def test_a_weight_stored_transposed_moves_like_its_transpose(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, grads = draw(5, 4)
    same_draws(monkeypatch)
    spec = cut(small(preset), (Route(use="", name=("stored",), transposed=True), Route(use="", min_dims=2)))
    opt, end = run(spec, {"stored": value.mT.contiguous(), "plain": value}, {"stored": [g.mT.contiguous() for g in grads], "plain": grads})
    assert torch.allclose(end["stored"].mT, end["plain"], rtol=1e-9, atol=1e-9)
    assert opt.plan.by_name["stored"].state == opt.plan.by_name["plain"].state


@every_preset
def test_a_kernel_moves_like_its_matrix(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, grads = draw(6, 2, 3, 2)
    same_draws(monkeypatch)
    spec = cut(small(preset), (Route(use="", min_dims=2),))
    _, end = run(spec, {"kernel": value, "flat": value.flatten(1)}, {"kernel": grads, "flat": [g.flatten(1) for g in grads]})
    assert torch.allclose(end["kernel"].flatten(1), end["flat"], rtol=1e-9, atol=1e-9)


@every_preset
def test_blocks_have_state_of_their_own_under_their_names(preset: str) -> None:
    params = parameters({"qkv": (12, 4)})
    opt = optimizer(cut(small(preset)), params)
    give(params, 0)
    opt.step()
    keys = {key.split(".")[0] for key in opt.state[params["qkv"]]}
    assert keys <= {*COUNTERS, "q", "k", "v"}
    assert {"q", "k", "v"} <= keys


def test_every_state_of_the_plan_is_there_after_one_step() -> None:
    params = parameters(ALL)
    opt = optimizer(cut(small("cosmos")), params)
    train(opt, params, range(1))
    for row in opt.plan:
        state = opt.state[params[row.entry.name]]
        assert {k: (tuple(v.shape), v.dtype) for k, v in state.items()} == row.state
