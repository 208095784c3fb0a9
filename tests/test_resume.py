"""Does a run resumed after any update end in the same bits, and is a state that does not fit refused before anything changes?"""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import LINEAR, PRESETS, SHAPES, copied, flat, give, optimizer, parameters, same, small, snapshot, train
from selection import covering
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from subspace_opt import CheckpointError, SubspaceOptimizer, load_spec
from subspace_opt.checkpoint import migrations as checkpoint
from subspace_opt.plan import COUNTERS

every_preset = pytest.mark.parametrize("preset", PRESETS)
STEPS = 9  # with a refresh at every third update, there are cuts before, at and after several refreshes
KINDS = {
    "float32": (torch.float32, "nearest"),
    "float64": (torch.float64, "nearest"),
    "bfloat16": (torch.bfloat16, "nearest"),
    "bfloat16 stochastic": (torch.bfloat16, "stochastic"),
    "bfloat16 kahan": (torch.bfloat16, "kahan"),
    "float16 stochastic": (torch.float16, "stochastic"),
}
# Plain shapes, experts and a fused weight: matrices of one parameter share a checkpoint and a count.
ALL: dict[str, tuple[int, ...]] = {**SHAPES, "experts": (2, 4, 3)}
Saved = dict[str, Any]


def gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Gradients of a step: one parameter starts late and another pauses, so that ages differ."""
    missing = {0: ("mate",), 1: ("mate", "scalar"), 4: ("wide",), 5: ("wide", "bias")}.get(step, ())
    give(params, step, missing=missing)


def to_disk(opt: SubspaceOptimizer, params: dict[str, nn.Parameter]) -> bytes:
    file = io.BytesIO()
    torch.save({"optimizer": opt.state_dict(), "params": {n: p.detach() for n, p in params.items()}}, file)
    return file.getvalue()


def from_disk(saved: bytes) -> Saved:
    loaded: Saved = torch.load(io.BytesIO(saved), weights_only=True)
    return loaded


def put(values: dict[str, Tensor], params: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(values[name])


# --------------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.all_presets(kind=["float32", "bfloat16"])
@every_preset
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_goes_on_to_the_bit(preset: str, kind: str) -> None:
    """A saved state is loaded into an optimizer that has made other updates, with parameters in another order and other global seeds. After
    each cut one update gives all weights and state of the run without a cut. The second cut goes through a file and on to the end.
    """
    dtype, rounding = KINDS[kind]
    torch.manual_seed(1)
    params = parameters(ALL, dtype)
    opt = optimizer(preset, params, rounding=rounding)
    saved, after = [], []
    for step in range(STEPS):
        saved.append(copy.deepcopy({"optimizer": opt.state_dict(), "params": {n: p.detach() for n, p in params.items()}}))
        gradients(params, step)
        opt.step()
        after.append(snapshot(opt, params))

    others = dict(reversed(parameters(ALL, dtype, seed=7).items()))
    dirty = optimizer(preset, others, rounding=rounding, lr=0.5, weight_decay=0.25)
    train(dirty, others, range(2), seed=9)
    for cut, loaded in enumerate(saved):
        torch.manual_seed(100 + cut)
        np.random.seed(cut)
        if cut == 1:
            file = io.BytesIO()
            torch.save(loaded, file)
            loaded = from_disk(file.getvalue())
        put(loaded["params"], others)
        dirty.load_state_dict(loaded["optimizer"])
        assert dirty.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
        for step in range(cut, STEPS if cut == 1 else cut + 1):
            gradients(others, step)
            dirty.step()
            assert same(snapshot(dirty, others), after[step]), f"cut at {cut}, after update {step + 1}"


CHILD = """
import sys, torch
from test_resume import ALL, STEPS, from_disk, gradients, put
from common import optimizer, parameters, snapshot
torch.manual_seed(4321)
ends = {}
for preset, (cut, file) in torch.load(sys.argv[1], weights_only=True).items():
    params = parameters(ALL, torch.bfloat16, seed=3)
    opt = optimizer(preset, params, rounding="stochastic")
    loaded = from_disk(file)
    put(loaded["params"], params)
    opt.load_state_dict(loaded["optimizer"])
    for step in range(cut, STEPS):
        gradients(params, step)
        opt.step()
    ends[preset] = snapshot(opt, params)
torch.save(ends, sys.argv[2])
"""


@pytest.mark.slow
def test_another_process_goes_on_to_the_bit(tmp_path: Path) -> None:
    """The process has another hash seed, which changes the order of sets and the hashes of strings."""
    saved, ends, presets = {}, {}, sorted(covering())
    for number, preset in enumerate(presets):
        params = parameters(ALL, torch.bfloat16)
        opt = optimizer(preset, params, rounding="stochastic")
        for step in range(STEPS):
            if step == 1 + number % (STEPS - 1):
                saved[preset] = (step, to_disk(opt, params))
            gradients(params, step)
            opt.step()
        ends[preset] = snapshot(opt, params)
    torch.save(saved, tmp_path / "cut.pt")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{CHILD}", "cut.pt", "end.pt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "77"},
        check=True,
    )
    theirs = torch.load(tmp_path / "end.pt", weights_only=True)
    assert [preset for preset in presets if not same(theirs[preset], ends[preset])] == []


@every_preset
def test_loading_keeps_dtypes_and_takes_storages_of_its_own(preset: str) -> None:
    """torch's own loader casts all state to the parameter's dtype, indices too; and it may share tensors with the dictionary."""
    params = parameters(ALL, torch.bfloat16)
    opt = optimizer(preset, params, rounding="kahan")
    train(opt, params, range(4))
    saved = opt.state_dict()
    twins = copied(params)
    twin = optimizer(preset, twins, rounding="kahan")
    twin.load_state_dict(saved)
    before = snapshot(twin, twins)
    assert {v.dtype for k, v in before.items() if k.endswith(COUNTERS)} == {torch.float32}
    train(opt, params, range(4, 6))
    for state in saved["state"].values():
        for value in state.values():
            value.zero_()
    assert same(snapshot(twin, twins), before)


def test_a_group_without_parameters_and_several_groups_are_matched_by_name() -> None:
    params = parameters(ALL)
    names = list(params)

    def made(params: dict[str, nn.Parameter], groups: list[list[str]]) -> SubspaceOptimizer:
        given = [{"params": [(n, params[n]) for n in group], "weight_decay": 0.0 if "bias" in group else 0.125} for group in groups]
        given.append({"params": [], "param_names": [], "lr": 0.75})
        return SubspaceOptimizer(given, small("cosmos"), modules=dict.fromkeys(params, LINEAR))

    first, second = [n for n in names if len(ALL[n]) > 1], [n for n in names if len(ALL[n]) < 2]
    opt = made(params, [first, second])
    train(opt, params, range(4))
    twins = copied(params)
    twin = made(twins, [second[::-1], first[::-1]])
    twin.param_groups[0]["lr"] = 0.5
    twin.load_state_dict(opt.state_dict())
    assert [g["weight_decay"] for g in twin.param_groups] == [0.0, 0.125, 0.1]
    assert [g["lr"] for g in twin.param_groups] == [2e-3, 2e-3, 0.75]
    assert twin.param_groups[0]["param_names"] == second[::-1]
    train(opt, params, range(4, 7))
    train(twin, twins, range(4, 7))
    assert same(snapshot(opt, params), snapshot(twin, twins))

    merged = optimizer("cosmos", twins)
    with pytest.raises(CheckpointError, match="the parameters of group 0 were saved in groups that differ in weight_decay; group them as"):
        merged.load_state_dict(opt.state_dict())


def test_a_refresh_that_was_asked_for_is_made_once() -> None:
    params = parameters({"tall": (7, 4)})
    opt = optimizer(small("galore", every=100), params)
    seen = []
    for step in range(6):
        if step == 3:
            opt.refresh_bases()
        train(opt, params, range(step, step + 1))
        seen.append(opt.state[params["tall"]]["selector.basis"].clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False]


def test_a_refresh_that_was_asked_for_survives_a_cut() -> None:
    runs = []
    for cut in (False, True):
        params = parameters()
        opt = optimizer("galore", params)
        train(opt, params, range(4))
        opt.refresh_bases()
        if cut:
            file = from_disk(to_disk(opt, params))["optimizer"]
            opt = optimizer("galore", params)
            opt.load_state_dict(file)
        train(opt, params, range(4, 5))
        runs.append(snapshot(opt, params))
    assert same(runs[0], runs[1])
    params = parameters()
    opt = optimizer("galore", params)
    train(opt, params, range(5))
    assert not same(snapshot(opt, params), runs[0])  # the option does make a difference


# ---------------------------------------------------------------------------------------------------------------------- refusals


def refused(opt: SubspaceOptimizer, params: dict[str, nn.Parameter], state: Any, *said: str) -> None:
    """The state is refused with this message, and nothing has changed."""
    before, groups = snapshot(opt, params), copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups])
    identities = [id(value) for _, value in flat(opt)]
    with pytest.raises(CheckpointError) as caught:
        opt.load_state_dict(state)
    for words in said:
        assert words in str(caught.value)
    assert same(snapshot(opt, params), before)
    assert [id(value) for _, value in flat(opt)] == identities
    assert [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] == groups


@pytest.fixture
def trained() -> tuple[SubspaceOptimizer, dict[str, nn.Parameter]]:
    params = parameters()
    opt = optimizer("cosmos", params)
    train(opt, params, range(2))
    return opt, params


Trained = tuple[SubspaceOptimizer, dict[str, nn.Parameter]]


def state_of(spec: Any, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, **options: Any) -> Saved:
    params = parameters(shapes, dtype)
    opt = optimizer(spec, params, **options)
    train(opt, params, range(2))
    saved: Saved = opt.state_dict()
    return saved


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        ({"matrix.selector.rank": 2}, "pipelines.matrix.selector.rank is 2 there and 3 here"),
        ({"matrix.inside.eps": 1e-6}, "pipelines.matrix.inside.0.eps is 1e-06 there and 1e-08 here"),
        ({"matrix.complement": "sgd"}, "pipelines.matrix.complement.0.bound is only in this spec"),
        ({"matrix.orient": "left"}, "pipelines.matrix.orient is 'left' there and 'right' here"),
        ({"matrix.finish": None}, "pipelines.matrix.finish is [] there and "),
        ({"routes": [{"min_dims": 2, "name": "t*", "use": "matrix"}, {"use": "other"}]}, "routes.0.min_dims is 2 there and None here"),
    ],
)
def test_another_spec_is_refused_with_the_first_difference(trained: Trained, overrides: dict[str, Any], difference: str) -> None:
    spec = load_spec(small("cosmos"), overrides)
    refused(*trained, state_of(spec), "the checkpoint has spec 'cosmos' and this optimizer has 'cosmos'", difference)


BEFORE_ROLES = [
    {"module": ["embedding", "head"], "use": "other"},
    {"name": ["*head*"], "use": "other"},
    {"min_dims": 2, "use": "matrix"},
    {"use": "other"},
]


def without_roles(saved: Saved, routes: list[dict[str, Any]]) -> Saved:
    """The state as a version before roles saved it: other routes, and fields that its specs did not have left out."""
    for group in saved["param_groups"]:
        spec = json.loads(group["spec"])
        del spec["roles"]
        empty = {"name": [], "module": [], "min_dims": None, "max_dims": None, "min_side": None, "max_side": None}
        rest = {"view": "auto", "split": None, "heads": None, "transposed": None}
        spec["routes"] = [{**empty, **rest, **route} for route in routes]
        group["spec"] = json.dumps(spec)
    return saved


def test_a_state_saved_before_roles_goes_on_to_the_bit(trained: Trained) -> None:
    """Its routes are other words for the same pipelines and views, and they stay in force."""
    opt, params = trained
    saved = without_roles(copy.deepcopy(opt.state_dict()), BEFORE_ROLES)
    other_params = copied(params)
    other = optimizer(small("cosmos"), other_params)
    other.load_state_dict(saved)
    assert [str(route) for route in other.spec_of(other.param_groups[0]).routes][1:3] == [
        "name *head*, split None",
        "min_dims 2, split None",
    ]
    for pair in ((opt, params), (other, other_params)):
        train(*pair, range(9, 12))
    assert same(snapshot(opt, params), snapshot(other, other_params))


def test_a_state_saved_before_roles_is_refused_where_a_role_changes_the_pipeline() -> None:
    shapes = {"w": (6, 6), "column": (6, 1)}
    params = parameters(shapes)
    opt = optimizer(small("cosmos"), params)
    train(opt, params, range(2))
    saved = without_roles(state_of(load_spec(small("cosmos"), {"routes": BEFORE_ROLES}), shapes), BEFORE_ROLES)
    refused(opt, params, saved, "build the optimizer from the checkpoint's spec")
    optimizer(json.loads(saved["param_groups"][0]["spec"]), parameters(shapes)).load_state_dict(saved)


def test_blocks_cut_in_another_order_are_refused() -> None:
    """Two mappings in different order are equal; two fused weights are not."""
    routes = [{"name": "tall", "split": order, "use": "matrix"} for order in ({"q": 4, "k": 3}, {"k": 3, "q": 4})]
    specs = [load_spec(small("cosmos"), {"routes": [route, {"use": "other"}]}) for route in routes]
    params = parameters()
    opt = optimizer(specs[0], params)
    train(opt, params, range(2))
    refused(opt, params, state_of(specs[1]), "routes.0.split cuts the rows into k, q there and q, k here")


def test_what_a_spec_says_beside_the_mathematics_may_differ(trained: Trained) -> None:
    opt, _ = trained
    saved = state_of(load_spec(small("cosmos"), {"name": "mine", "defaults.lr": 0.5, "notes": "a copy"}))
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.5


def test_another_preset_is_refused(trained: Trained) -> None:
    refused(*trained, state_of("galore"), "the checkpoint has spec 'galore' and this optimizer has 'cosmos'", "pipelines.")


def test_another_optimizer_is_refused(trained: Trained) -> None:
    opt, params = trained
    twins = copied(params)
    adam = torch.optim.AdamW(twins.items())
    train(adam, twins, range(1))
    refused(opt, params, adam.state_dict(), "another optimizer saved this checkpoint: its parameter groups have no `spec`")


@pytest.mark.parametrize("junk", [None, [], {}, {"state": {}}, "checkpoint.pt"])
def test_what_is_no_state_is_refused(trained: Trained, junk: Any) -> None:
    refused(*trained, junk, "this is not an optimizer's state dictionary: it needs `state` and `param_groups`")


def test_another_model_is_refused_with_the_names(trained: Trained) -> None:
    fewer = {n: s for n, s in SHAPES.items() if n != "wide"}
    refused(*trained, state_of("cosmos", fewer), "the checkpoint is of another model: it lacks wide")
    more = {**SHAPES, "extra": (3, 3)}
    refused(*trained, state_of("cosmos", more), "the checkpoint is of another model: it also has extra")
    renamed = {("broad" if n == "wide" else n): s for n, s in SHAPES.items()}
    refused(*trained, state_of("cosmos", renamed), "it lacks wide; it also has broad")
    many = {f"layer{i}": (3, 3) for i in range(9)}
    refused(*trained, state_of("cosmos", many), "it also has layer0, layer1, layer2, layer3, layer4 ...")


def test_without_names_the_number_of_parameters_must_agree(trained: Trained) -> None:
    opt, params = trained
    saved = state_of("cosmos", {n: s for n, s in SHAPES.items() if n != "wide"})
    del saved["param_groups"][0]["param_names"]
    refused(opt, params, saved, "doesn't match the size of optimizer's group: group 0 has 5 parameters there and 6 here")
    whole = state_of("cosmos")
    del whole["param_groups"][0]["param_names"]
    halves = [dict(whole["param_groups"][0], params=ids) for ids in ([0, 1], [2, 3, 4, 5])]
    refused(opt, params, {**whole, "param_groups": halves}, "a different number of parameter groups: 2, and this optimizer has 1")


def test_another_pipeline_for_a_group_is_refused(trained: Trained) -> None:
    saved = state_of("cosmos")
    saved["param_groups"][0]["use"] = "other"
    refused(*trained, saved, "parameter group 0 has `use` 'other' in the checkpoint and None here; give it the same")


def test_state_for_no_parameter_is_refused(trained: Trained) -> None:
    saved = state_of("cosmos")
    saved["state"][17] = {"step": torch.tensor(1.0)}
    refused(*trained, saved, "the checkpoint has state for parameters in none of its groups: ['17']")


@every_preset
def test_every_slot_is_checked(preset: str) -> None:
    """For each slot of the preset: the slot missing, renamed, reshaped, cast, or not a tensor."""
    params = parameters()
    opt = optimizer(preset, params)
    train(opt, params, range(2))
    saved = opt.state_dict()
    names = saved["param_groups"][0]["param_names"]
    number = names.index("wide")
    assert len(saved["state"][number]) > 1

    def broken(changes: dict[str, Any], drop: str | None = None) -> Saved:
        state = {**saved["state"][number], **changes}
        if drop:
            del state[drop]
        return {**saved, "state": {**saved["state"], number: state}}

    refused(
        opt, params, broken({"spare": torch.ones(2)}), "the checkpoint does not fit this optimizer:\n'wide': slot 'spare' is unknown here"
    )
    for key, value in saved["state"][number].items():
        refused(opt, params, broken({}, drop=key), f"'wide': slot '{key}' is missing")
        if key in COUNTERS:
            refused(opt, params, broken({key: "two"}), f"'wide': slot '{key}' is str, not a number")
            refused(opt, params, broken({key: torch.ones(2)}), f"'wide': slot '{key}' is Tensor, not a number")
            continue
        wider = torch.zeros(*value.shape, 2, dtype=value.dtype)
        refused(opt, params, broken({key: wider}), f"'wide': slot '{key}' has shape {tuple(wider.shape)}, here {tuple(value.shape)}")
        refused(opt, params, broken({key: value.to(torch.float16)}), f"'wide': slot '{key}' has dtype torch.float16, here {value.dtype}")
        refused(opt, params, broken({key: value.tolist()}), f"'wide': slot '{key}' is ")
    empty = {**saved, "state": {i: {"step": s["step"]} for i, s in saved["state"].items()}}
    count = sum(len(s) - 1 for s in saved["state"].values())
    refused(opt, params, empty, *([f"... and {count - 5} more"] if count > 5 else ["is missing"]))


@every_preset
def test_weights_of_another_shape_or_precision_are_refused(preset: str) -> None:
    params = parameters({"tall": (7, 4)})
    opt = optimizer(preset, params)
    train(opt, params, range(2))
    refused(opt, params, state_of(preset, {"tall": (9, 5)}), "'tall': slot '", "has shape (")
    refused(opt, params, state_of(preset, {"tall": (7, 4)}, torch.float64), "'tall': slot '", "has dtype torch.float64, here torch.float32")
    kahan = state_of(preset, {"tall": (7, 4)}, torch.bfloat16, rounding="kahan")
    refused(opt, params, kahan, "'tall': slot 'compensation' is unknown here")


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_damaged_file_is_torchs_to_report(trained: Trained, damage: str) -> None:
    """torch raises on half a file before the optimizer sees it."""
    opt, params = trained
    before = snapshot(opt, params)
    file = to_disk(opt, params)
    file = file[: len(file) // 2] if damage == "truncated" else b"\0" * 512 + file[512:]
    with pytest.raises((RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError)):
        opt.load_state_dict(from_disk(file)["optimizer"])
    assert same(snapshot(opt, params), before)


# ---------------------------------------------------------------------------------------------------------------- state versions


def unversioned(saved: Saved) -> Saved:
    """A state dictionary of the time before versions."""
    return {**saved, "param_groups": [{k: v for k, v in g.items() if k != "state_version"} for g in saved["param_groups"]]}


def test_there_is_a_migration_from_every_older_version() -> None:
    assert sorted(checkpoint.MIGRATIONS) == list(range(checkpoint.STATE_VERSION))
    assert all(g["state_version"] == checkpoint.STATE_VERSION for g in state_of("cosmos")["param_groups"])


@every_preset
def test_state_without_a_version_goes_on_to_the_bit(preset: str) -> None:
    params = parameters(ALL)
    opt = optimizer(preset, params)
    train(opt, params, range(4))
    saved = unversioned(from_disk(to_disk(opt, params))["optimizer"])
    assert "state_version" not in saved["param_groups"][0]
    twins = copied(params)
    twin = optimizer(preset, twins)
    twin.load_state_dict(saved)
    assert "state_version" not in saved["param_groups"][0]  # the argument is unchanged
    train(opt, params, range(4, STEPS))
    train(twin, twins, range(4, STEPS))
    assert same(snapshot(twin, twins), snapshot(opt, params))
    assert twin.state_dict()["param_groups"][0]["state_version"] == checkpoint.STATE_VERSION


def renamed(old: str, new: str) -> Any:
    """A migration that gives a slot another name."""

    def migration(state_dict: Saved) -> Saved:
        state = {i: {(new if key == old else key): v for key, v in slots.items()} for i, slots in state_dict["state"].items()}
        return {**state_dict, "state": state}

    return migration


@pytest.mark.parametrize("version", [0, 1, 2])
def test_migrations_are_applied_one_after_the_other(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """State whose slot had another name in every version is migrated to the present name; the argument is unchanged."""
    params = parameters()
    opt = optimizer("adamw", params)
    train(opt, params, range(3))
    (slot,) = (key for key in opt.state[params["wide"]] if key.endswith("exp_avg"))
    current: Saved = copy.deepcopy(opt.state_dict())
    names = ["oldest", "older", "old", slot]
    monkeypatch.setattr(checkpoint, "STATE_VERSION", 3)
    migrations = {i: renamed(*pair) for i, pair in enumerate(itertools.pairwise(names))}
    monkeypatch.setattr(checkpoint, "MIGRATIONS", migrations)
    old = renamed(slot, names[version])(current)
    old["param_groups"] = [{**g, "state_version": version} for g in old["param_groups"]]
    kept = copy.deepcopy(old)
    twins = copied(params)
    twin = optimizer("adamw", twins)
    twin.load_state_dict(old)
    assert same(snapshot(twin, twins), snapshot(opt, params))
    assert twin.param_groups[0]["state_version"] == 3
    assert old["param_groups"] == kept["param_groups"]
    assert all(same(old["state"][i], kept["state"][i]) for i in kept["state"])


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (
            7,
            "the checkpoint's state has version 7 and this subspace_opt reads versions up to 2; install the subspace_opt that saved it, or",
        ),
        ("one", "the checkpoint's state_version is 'one', not a whole number of 0 or more"),
        (True, "the checkpoint's state_version is True, not a whole number of 0 or more"),
        (-1, "the checkpoint's state_version is -1, not a whole number of 0 or more"),
    ],
)
def test_a_version_that_is_not_known_is_refused(trained: Trained, version: Any, said: str) -> None:
    saved = state_of("cosmos")
    saved["param_groups"][0]["state_version"] = version
    refused(*trained, saved, said)


def test_groups_of_several_versions_are_refused(trained: Trained) -> None:
    saved = state_of("cosmos")
    saved["param_groups"].append({**saved["param_groups"][0], "params": [], "param_names": [], "state_version": 0})
    refused(*trained, saved, "the checkpoint's parameter groups have different state versions, [0, 2]")


def test_a_group_of_another_version_is_not_added(trained: Trained) -> None:
    opt, _ = trained
    group = {"params": [("spare", nn.Parameter(torch.ones(3)))], "state_version": 0}
    with pytest.raises(ValueError, match="this parameter group has state version 0, and the current version is 2; leave the key out"):
        opt.add_param_group(group)


# ------------------------------------------------------------------------------------------------------- torch's distributed checkpoint


class Model(nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, p in parameters({**ALL, "empty": (0, 4)}, dtype, seed).items():
            self.register_parameter(name, p)

    def forward(self) -> Tensor:
        return torch.stack([p.sum() for p in self.parameters()]).sum()


def model_and_optimizer(preset: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Model, SubspaceOptimizer]:
    model = Model(seed, dtype)
    return model, optimizer(preset, dict(model.named_parameters()), rounding="kahan")


@every_preset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("flatten", "full"), [(False, False), (True, False), (False, True)])
def test_a_distributed_checkpoint_goes_on_to_the_bit(preset: str, flatten: bool, full: bool, dtype: torch.dtype) -> None:
    """A file is read by qualified names into a fresh optimizer. torch fills that optimizer by a step with zero gradients and lr 0."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, full_state_dict=full)
    model, opt = model_and_optimizer(preset, dtype=dtype)
    train(opt, dict(model.named_parameters()), range(4))
    file = io.BytesIO()
    torch.save(get_optimizer_state_dict(model, opt, options=options), file)
    file.seek(0)
    again, fresh = model_and_optimizer(preset, seed=5, dtype=dtype)
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, fresh, torch.load(file, weights_only=True), options=options)
    params, others = dict(model.named_parameters()), dict(again.named_parameters())
    assert same(snapshot(fresh, others), snapshot(opt, params))
    train(opt, params, range(4, 8))
    train(fresh, others, range(4, 8))
    assert same(snapshot(fresh, others), snapshot(opt, params))


@every_preset
@pytest.mark.parametrize("flatten", [False, True])
def test_reading_the_state_of_a_fresh_optimizer_changes_nothing(preset: str, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, opt = model_and_optimizer(preset)
    twin, other = model_and_optimizer(preset)
    read = get_optimizer_state_dict(model, opt, options=options)
    assert read
    params, twins = dict(model.named_parameters()), dict(twin.named_parameters())
    assert same({n: p.detach() for n, p in params.items()}, {n: p.detach() for n, p in twins.items()})
    assert opt.param_groups[0]["lr"] == other.param_groups[0]["lr"] > 0
    train(opt, params, range(7))
    train(other, twins, range(7))
    assert same(snapshot(opt, params), snapshot(other, twins))


def test_a_checkpoint_from_before_a_field_was_added_to_specs_is_read() -> None:
    params = [nn.Parameter(torch.randn(6, 5))]
    optimizer = SubspaceOptimizer(params, "galore", overrides={"matrix.selector.rank": 2})
    params[0].grad = torch.randn(6, 5)
    optimizer.step()
    saved = optimizer.state_dict()
    spec = json.loads(saved["param_groups"][0]["spec"])
    for pipeline in spec["pipelines"].values():
        del pipeline["state_dtype"]
    saved["param_groups"][0]["spec"] = json.dumps(spec)
    optimizer.load_state_dict(saved)
    spec["pipelines"]["matrix"]["selector"]["rank"] = 3
    saved["param_groups"][0]["spec"] = json.dumps(spec)
    with pytest.raises(CheckpointError, match=r"selector\.rank is 3 there and 2 here"):
        optimizer.load_state_dict(saved)
