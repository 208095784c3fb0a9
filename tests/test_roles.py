"""Does every parameter get its role and say what decided it, and is a fused weight cut into the matrices that the model uses?"""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from common import LINEAR, parameters, small
from families import FAMILIES, PHI3_NAMES
from torch import Tensor, nn

from subspace_opt import CheckpointError, Entry, SpecError, SubspaceOptimizer, build, load_spec, make_plan
from subspace_opt.plan import Role
from subspace_opt.plan.views import make_view
from subspace_opt.spec import parse_spec

PAGE = Path(__file__).parent.parent / "docs" / "roles.md"
MATRIX = ("hidden", "fused", "conv")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """transformers warns of configs that are smaller than any that it ships."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        yield


def seen(model: nn.Module, **options: Any) -> dict[str, tuple[str, str, str]]:
    """Role, reason and matrices of every parameter that is no weight of a plain linear layer, in the first layer of a model."""
    out = {}
    for row in build("muon", model, **options).plan:
        shape = "x".join(map(str, row.entry.shape))
        plain = row.role.name == "hidden" and row.role.why.endswith("Linear") and "Parametrized" not in row.role.why
        if len(row.entry.shape) > 1 and not plain:
            shown = str(row.view) if row.pipeline == "matrix" and str(row.view) != shape else ""
            out[row.entry.name] = (row.role.name, row.role.why, shown)
    return out


# ---------------------------------------------------------------------------------------------------------------------- families


@every_family
def test_every_parameter_of_a_family_has_its_role(family: str) -> None:
    assert seen(FAMILIES[family].make()) == FAMILIES[family].expected


@every_family
def test_presets_open_subspaces_for_hidden_matrices_alone(family: str) -> None:
    model = FAMILIES[family].make()
    for preset in ("cosmos", "galore", {"pipelines": {"matrix": {"complement": "muon"}}}):
        for row in build(preset, model).plan:
            assert (row.pipeline == "matrix") == (row.role.name in MATRIX), row.entry.name
    for row in build("soap", model).plan:
        assert (row.pipeline == "matrix") == (row.role.name in (*MATRIX, "embedding", "head", "patch")), row.entry.name
    assert all(len(row.splits) == 1 for row in build("adamw", model).plan), "an update by entries needs no parts"


def rendered() -> str:
    """The table of the page."""
    lines = ["| family | parameter | role | decided by | matrices |", "| --- | --- | --- | --- | --- |"]
    for name, family in FAMILIES.items():
        for parameter, (role, why, matrices) in family.expected.items():
            lines.append(f"| {name} | `{parameter}` | {role} | {why} | {matrices or 'one'} |")
    return "\n".join(lines)


def test_the_page_shows_the_families() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert rendered() in text, f"put this table into {PAGE.name}:\n\n{rendered()}"


# ------------------------------------------------------------------------------------------------------------------------- parts


OUTPUTS = {  # the layer that takes what the values have become
    "Phi-3": "o_proj",
    "GPT-2": "attn.c_proj",
    "GPT-NeoX": "attention.dense",
    "Falcon": "self_attention.dense",
    "Bloom": "self_attention.dense",
    "DeepSeek-V3": "o_proj",
}


@pytest.mark.parametrize("family", OUTPUTS)
@pytest.mark.parametrize("part", ["k", "v"])
def test_without_the_rows_of_the_values_nothing_attends(family: str, part: str) -> None:
    """Rows that are no values of the model would leave some of them."""
    torch.manual_seed(0)
    model = FAMILIES[family].make().eval()
    params = dict(model.named_parameters())
    for row in build("muon", model).plan:
        if {"v", part} <= {block.name for block, _ in row.splits}:
            p = params[row.entry.name].detach()
            blocks = [b.clone() for b in row.view.cut(row.view.whole(p))]
            blocks[[block.name for block in row.view.blocks].index(part)].zero_()
            p.copy_(row.view.restore(blocks, p.shape))
            bias = params.get(row.entry.name.removesuffix("weight") + "bias")
            if bias is not None:
                bias.detach().zero_()
    taken: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(OUTPUTS[family]):
            module.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    model(torch.arange(1, 9).unsqueeze(0))
    assert taken
    assert all((float(x.detach().abs().max()) == 0.0) == (part == "v") for x in taken)


class SharedKeys(nn.Module):
    """An attention whose fused weight holds, for each key head, two query heads, the key and the value; torchtitan's `FusedQKVLinear`."""

    def __init__(self) -> None:
        super().__init__()
        self.heads_per_kv, self.head_dim = 2, 3
        self.wqkv = nn.Linear(5, 3 * (2 + 2) * 3)


def test_query_heads_that_share_a_key_head_are_gathered() -> None:
    model = SharedKeys()
    row = build("muon", model).plan.rows[0]
    assert [(block.name, block.rows) for block, _ in row.splits] == [("q", 18), ("k", 9), ("v", 9)]
    heads = model.wqkv.weight.detach().reshape(3, 4, 3, 5)  # as its forward function splits the outputs
    q, k, v = row.view.cut(row.view.whole(model.wqkv.weight.detach()))
    assert torch.equal(q.reshape(3, 2, 3, 5), heads[:, :2])
    assert torch.equal(k.reshape(3, 3, 5), heads[:, 2])
    assert torch.equal(v.reshape(3, 3, 5), heads[:, 3])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_in_turn_are_gathered_and_put_back(transposed: bool, count: int) -> None:
    shape = (*((2,) if count > 1 else ()), *((3, 10) if transposed else (10, 3)))
    view = make_view(shape, split={"q": 6, "v": 4}, groups=2, transposed=transposed)
    tensor = torch.arange(30.0 * count).reshape(shape)
    whole = view.whole(tensor)
    q, v = view.cut(whole)
    assert torch.equal(q, whole[:, [0, 1, 2, 5, 6, 7]])
    assert torch.equal(v, whole[:, [3, 4, 8, 9]])
    assert torch.equal(view.restore([q, v], tensor.shape), tensor)


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["cosmos", "muon", "galore", "soap", "dion", "trion"])
def test_a_weight_whose_rows_alternate_moves_like_its_parts(preset: str, dtype: torch.dtype, rounding: Any) -> None:
    """The weight and the same one with its rows sorted have the same updates."""
    order = [0, 1, 2, 5, 6, 7, 3, 4, 8, 9]
    alternating = Role("fused", "test", (("q", 6), ("v", 4)), groups=2)
    sorted_rows = Role("fused", "test", (("q", 6), ("v", 4)))
    start = parameters({"w": (10, 7)}, dtype)["w"].detach()
    ends = []
    for role, rows in ((alternating, slice(None)), (sorted_rows, order)):
        p = nn.Parameter(start[rows].clone())
        opt = SubspaceOptimizer(
            [("w", p)], small(preset), model_roles={"w": role}, modules={"w": LINEAR}, rounding=rounding, weight_decay=0.1
        )
        for step in range(5):
            p.grad = torch.randn(10, 7, generator=torch.Generator().manual_seed(step)).to(dtype)[rows]
            opt.step()
        assert [block.name for block, _ in opt.plan.rows[0].splits] == ["q", "v"]
        ends.append(p.detach())
    assert torch.allclose(ends[0][order], ends[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(ends[1], start[order])


# ----------------------------------------------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("transformer.wte.weight", (48, 16), "embedding"),
        ("model.embed_tokens.weight", (48, 16), "embedding"),
        ("transformer.wpe.weight", (10, 16), "position"),
        ("pos_embed", (1, 5, 16), "position"),
        ("blocks.0.attn.relative_position_bias_table", (9, 4), "position"),
        ("cls_token", (1, 1, 16), "token"),
        ("lm_head.weight", (48, 16), "head"),
        ("heads.head.weight", (5, 16), "head"),
        ("decoder.multihead_attn.in_proj_weight", (48, 16), "hidden"),
        ("layers.0.moe.gate.weight", (4, 16), "router"),
        ("layers.0.moe.experts.w1", (4, 16, 8), "hidden"),
        ("layers.0.mlp.gate.weight", (24, 16), "hidden"),
        ("layers.0.router.weight", (4, 16), "router"),
        ("layers.0.mixer.A_log", (32, 4), "ssm"),
        ("layers.0.norm.weight", (16,), "vector"),
        ("layers.0.fc.bias", (16,), "bias"),
        ("layers.0.fc.weight", (16, 1), "vector"),
        ("layers.0.fc.weight", (1, 16), "vector"),
        ("layers.0.fc.weight", (16, 16), "hidden"),
        ("scale", (), "vector"),
        ("time_mix", (1, 1, 16), "vector"),
    ],
)
def test_names_and_shapes_tell_roles_without_a_model(name: str, shape: tuple[int, ...], role: str) -> None:
    entries = [Entry(name, shape), Entry("layers.0.moe.experts.w2", (4, 8, 16))]
    assert make_plan(load_spec("muon"), entries).rows[0].role.name == role


def test_a_head_is_guessed_from_its_shape_only_if_the_model_names_none() -> None:
    model = nn.Sequential(nn.Embedding(24, 8), nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 24))
    assert [row.role.name for row in build("muon", model).plan if row.role.name != "bias"] == ["embedding", "head", "hidden", "head"]
    model.get_output_embeddings = lambda: model[3]  # type: ignore[assignment]
    assert [row.role.name for row in build("muon", model).plan if row.role.name != "bias"] == ["embedding", "hidden", "hidden", "head"]


def test_a_classifier_is_named_as_timm_names_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model.get_classifier = lambda: model[1]  # type: ignore[assignment]
    row = build("muon", model).plan.by_name["1.weight"]
    assert (str(row.role), row.pipeline) == ("head by model get_classifier()", "other")


def test_wrappers_change_no_role() -> None:
    bare = FAMILIES["Phi-3"].make()
    wrapped = nn.Module()
    wrapped.add_module("_orig_mod", copy.deepcopy(bare))
    assert seen(wrapped) == seen(bare)


# -------------------------------------------------------------------------------------------------------------------- corrections


def test_the_user_corrects_roles_in_build_and_in_a_spec() -> None:
    model = FAMILIES["Phi-3"].make()
    qkv, gate_up = PHI3_NAMES
    rows = build("muon", model, roles={"*.qkv_proj.*": "hidden", "*.down_proj.*": "vector"}).plan.by_name
    assert (rows[qkv].role.name, str(rows[qkv].view), rows[qkv].pipeline) == ("hidden", "32x16", "matrix")
    assert rows[qkv].why == "routes.0: role hidden|fused|conv; hidden by roles '*.qkv_proj.*'"
    assert rows["model.layers.0.mlp.down_proj.weight"].pipeline == "other"
    assert len(rows[gate_up].splits) == 2
    spec = load_spec("muon", {"roles": {"*.qkv_proj.*": "hidden", "*": "vector"}})
    assert {row.pipeline for row in build(spec, model).plan if row.entry.name != qkv} == {"other"}
    assert build(spec, model).plan.by_name[qkv].pipeline == "matrix", "the first glob decides"
    assert build(spec, model, roles={"*.gate_up_proj.*": "fused"}).plan.by_name[gate_up].pipeline == "matrix", "before the spec's own"


def test_a_correction_is_saved_with_the_state() -> None:
    model = FAMILIES["nn.LSTM"].make()
    whole = build("muon", model, roles={"weight_*": "hidden"})
    model(torch.ones(2, 6))[0].sum().backward()
    whole.step()
    spec = load_spec(json.loads(whole.state_dict()["param_groups"][0]["spec"]))
    again = build(spec, model)
    again.load_state_dict(whole.state_dict())
    assert all(len(row.splits) == 1 for row in again.plan)
    with pytest.raises(CheckpointError, match="build the optimizer from the checkpoint's spec"):
        build("muon", model).load_state_dict(whole.state_dict())


def test_a_route_may_cut_or_leave_whole() -> None:
    model = FAMILIES["nn.MultiheadAttention"].make()
    routes = [{"role": "fused", "split": None, "use": "matrix"}, {"role": "hidden", "use": "matrix"}, {"use": "other"}]
    for split, view in ((None, "48x16"), ({"qk": 32, "v": 16}, "qk 32x16 + v 16x16"), ("auto", "q 16x16 + k 16x16 + v 16x16")):
        routes[0]["split"] = split
        row = build(load_spec("muon", {"routes": routes}), model).plan.by_name["in_proj_weight"]
        assert str(row.view) == view
    spec = load_spec("muon", {"routes": [{**routes[0], "split": None}, *routes[1:]]})
    assert parse_spec(spec.to_yaml()) == spec


@pytest.mark.parametrize(
    ("roles", "error", "message"),
    [
        ({"*.weight": "hiden"}, SpecError, "roles: 'hiden', given to '*.weight', is not a role; did you mean 'hidden'?"),
        ({"q_proj": "hidden"}, ValueError, "roles: 'q_proj' matches no parameter; known: 0.bias, 0.weight"),
        ({"0.weight": "fused"}, SpecError, "roles: '0.weight' makes '0.weight' fused, and its parts are not known; give it a route with"),
    ],
)
def test_a_bad_correction_is_an_error(roles: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build("muon", nn.Sequential(nn.Linear(4, 4)), roles=roles)


def test_raw_matrices_of_no_known_role_are_reported_once() -> None:
    model = nn.Module()
    for i in range(7):
        model.register_parameter(f"mixing{i}", nn.Parameter(torch.ones(3, 4)))
    text = (
        "spec 'muon' routes parameters by role, and neither module nor name tells the role of 'mixing0', 'mixing1', 'mixing2', 'mixing3', "
        "'mixing4' and 2 more. 'mixing0' goes to 'matrix' as a hidden matrix (routes.0: role hidden|fused|conv). Say what it is, "
        "roles={'mixing0': 'hidden'}"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$") as caught:
        opt = build("muon", model)
    opt.explain()  # a second warning would be an error
    assert len(caught) == 1
    build("muon", model, roles={"mixing*": "hidden"})
    build("adamw", model)


# --------------------------------------------------------------------------------------------- modules that tell their own roles


class Cores(nn.Module):
    """A module whose parameters have names that tell nothing."""

    def __init__(self, **roles: str) -> None:
        super().__init__()
        self.first, self.second, self.head_scale = (nn.Parameter(torch.ones(4, 6)) for _ in range(3))
        self.parameter_roles = roles


def test_a_module_tells_the_roles_of_its_own_parameters() -> None:
    model = nn.Sequential(Cores(first="embedding", second="hidden", head_scale="hidden"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is a guess
        rows = build("muon", model).plan.rows
    assert {row.entry.name: (row.role.name, row.pipeline) for row in rows} == {
        "0.first": ("embedding", "other"),
        "0.second": ("hidden", "matrix"),
        "0.head_scale": ("hidden", "matrix"),
    }
    assert {row.role.why for row in rows} == {"module Cores, parameter_roles"}
    with pytest.warns(UserWarning, match=r"tells the role of '0\.first'"):
        found = {row.entry.name: row.role.name for row in build("muon", nn.Sequential(Cores(second="hidden"))).plan.rows}
    assert found == {"0.first": "hidden", "0.second": "hidden", "0.head_scale": "head"}


@pytest.mark.parametrize("role", ["hiden", "fused"])
def test_a_module_with_a_wrong_role_is_named(role: str) -> None:
    with pytest.raises(SpecError, match=rf"module '0' \(Cores\): parameter_roles\['first'\] is '{role}'; use one of embedding, "):
        build("muon", nn.Sequential(Cores(first=role)))
