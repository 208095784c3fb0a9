"""Does a resumed run end in the same bits under any names and groups of its parameters?

Draws and refresh steps depend on a parameter's key, its name when the optimizer is built. A checkpoint contains the keys.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import LINEAR, copied, gradient
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from subspace_opt import CheckpointError, Entry, SubspaceOptimizer, load_spec, make_plan, snapshots
from subspace_opt.checkpoint import STATE_VERSION, keys_in

pytestmark = pytest.mark.filterwarnings("ignore:spec .* routes parameters by role")

SHAPES = {"tall": (12, 6), "mate": (12, 6), "wide": (6, 12), "bias": (5,)}
NAMES = list(SHAPES)
CUT, END = 5, 14

GOLORE = {f"matrix.selector.{field}": value for field, value in (("first.rank", 2), ("then.rank", 2), ("at", 2), ("every", 3))}
# Everything that depends on keys: spread refreshes, random bases, random coordinates, rounding, and a random first basis.
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "spread": (load_spec("galore", {"matrix.selector.rank": 2, "matrix.selector.every": 4}), {}),
    "golore": (load_spec("golore", GOLORE), {}),
    "random": (load_spec("apollo", {"matrix.selector.rank": 2, "matrix.selector.every": 3}), {}),
    "rounding": (load_spec("cosmos", {"matrix.selector.rank": 2}), {"rounding": "stochastic"}),
    "dion": (load_spec("dion", {"matrix.selector.rank": 2}), {}),
}
every_way = pytest.mark.parametrize("way", WAYS)


def some(way: str) -> dict[str, nn.Parameter]:
    dtype = torch.bfloat16 if way == "rounding" else torch.float32
    return {name: nn.Parameter(gradient(name, shape, -1, dtype)) for name, shape in SHAPES.items()}


def made(way: str, params: dict[str, nn.Parameter], groups: Iterable[list[str]], called: Callable[[str], str] | None) -> SubspaceOptimizer:
    """An optimizer with some groups of parameters. `called`: the name given for each parameter; None if no names are given."""
    spec, options = WAYS[way]
    given = [{"params": [params[n] if called is None else (called(n), params[n]) for n in names]} for names in groups]
    kinds = {} if called is None else {called(n): LINEAR for n in NAMES}
    return SubspaceOptimizer(given, spec, modules=kinds, roles={"*": "hidden"}, stacking="never", lr=0.05, **options)


def train(opt: SubspaceOptimizer, params: dict[str, nn.Parameter], start: int, stop: int) -> None:
    for step in range(start, stop):
        for name, p in params.items():
            p.grad = gradient(name, tuple(p.shape), step, p.dtype)
        opt.step()


def equal(a: dict[str, nn.Parameter], b: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(name: str) -> str:
    return name


def other(name: str) -> str:
    return f"model.{name}.weight"


ALL = [NAMES]
TWO = [NAMES[:2], NAMES[2:]]

# The groups and names of the saved run, and of the run that resumes.
RESUMED: dict[str, tuple[Any, Any, Any, Any]] = {
    "unnamed to named": (ALL, None, ALL, same),
    "unnamed in two groups to named": (TWO, None, TWO, other),
    "named to unnamed": (ALL, same, ALL, None),
    "named in two groups to unnamed": (TWO, other, TWO, None),
    "permuted groups": (TWO, same, [NAMES[:1:-1], ["mate", "tall"]], same),
    "regrouped": (ALL, same, TWO[::-1], same),
}


@every_way
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_run(way: str, case: str) -> None:
    groups, called, groups_then, called_then = RESUMED[case]
    params = some(way)
    opt = made(way, params, groups, called)
    train(opt, params, 0, CUT)
    saved, twins = through_a_file(opt.state_dict()), copied(params)
    twin = made(way, twins, groups_then, called_then)
    twin.load_state_dict(saved)
    train(opt, params, CUT, END)
    train(twin, twins, CUT, END)
    assert equal(params, twins)


@every_way
def test_names_matter_to_a_new_run(way: str) -> None:
    """If names did not matter, the test above could not fail."""
    ends = []
    for called in (None, other):
        params = some(way)
        train(made(way, params, ALL, called), params, 0, END)
        ends.append(params)
    assert not equal(*ends)


@every_way
def test_a_key_stays_through_two_renamings(way: str) -> None:
    """The parameters are unnamed, then named, then renamed and loaded by position. The second checkpoint contains the keys of the first."""
    params = some(way)
    opt = made(way, params, TWO, None)
    train(opt, params, 0, 3)
    twins = copied(params)
    named = made(way, twins, TWO, same)
    named.load_state_dict(through_a_file(opt.state_dict()))
    assert named.param_groups[1]["keys"] == {"wide": "group1.param0", "bias": "group1.param1"}
    train(named, twins, 3, 7)
    thirds = copied(twins)
    last = made(way, thirds, TWO, None)
    last.load_state_dict(through_a_file(named.state_dict()))
    assert [row.key for row in last.plan] == [row.key for row in named.plan] == [row.key for row in opt.plan]
    train(opt, params, 3, END)
    train(last, thirds, 7, END)
    assert equal(params, thirds)


def test_a_matrix_that_begins_later_draws_by_its_loaded_key() -> None:
    """A parameter without state in the checkpoint has a key too."""
    params = some("random")
    opt = made("random", params, ALL, None)
    early = {name: p for name, p in params.items() if name != "mate"}
    train(opt, early, 0, CUT)
    twins = copied(params)
    twin = made("random", twins, ALL, same)
    twin.load_state_dict(through_a_file(opt.state_dict()))
    for p in (params["mate"], twins["mate"]):
        p.grad = None
    train(opt, params, CUT, END)
    train(twin, twins, CUT, END)
    assert equal(params, twins)


def test_copies_keep_keys() -> None:
    params = some("random")
    opt = made("random", params, ALL, None)
    train(opt, params, 0, CUT)
    twins = copied(params)
    twin = made("random", twins, ALL, same)
    twin.load_state_dict(opt.state_dict())
    third, thirds = copy.deepcopy((twin, twins))
    train(opt, params, CUT, END)
    train(third, thirds, CUT, END)
    assert equal(params, thirds)


# ------------------------------------------------------------------------------------------------------------------- what is a key


def test_a_key_is_the_canonical_name_unless_it_is_given() -> None:
    rows = make_plan(
        load_spec("galore"), [Entry("a._orig_mod.b", (8, 8)), Entry("c", (8, 8), key="a.b2"), Entry("a.b2", (8, 8), key="c")]
    ).rows
    assert [row.key for row in rows] == ["a.b", "a.b2", "c"]
    assert rows[0].turn == make_plan(load_spec("galore"), [Entry("a.b", (8, 8))]).rows[0].turn
    assert rows[1].turn != rows[2].turn


def test_a_state_without_foreign_keys_carries_none() -> None:
    for called in (None, same):
        params = some("spread")
        opt = made("spread", params, TWO, called)
        train(opt, params, 0, 1)
        assert all("keys" not in group for group in opt.state_dict()["param_groups"])
        opt.load_state_dict(opt.state_dict())
        assert all("keys" not in group for group in opt.param_groups)


def test_keys_go_when_a_state_without_them_is_loaded() -> None:
    params = some("spread")
    unnamed, named = made("spread", params, ALL, None), made("spread", params, ALL, same)
    fresh = named.state_dict()
    named.load_state_dict(unnamed.state_dict())
    assert named.param_groups[0]["keys"]
    named.load_state_dict(fresh)
    assert "keys" not in named.param_groups[0]


def test_state_of_the_version_before_keys_goes_on_to_the_bit() -> None:
    params = some("random")
    opt = made("random", params, ALL, None)
    train(opt, params, 0, CUT)
    saved = through_a_file(opt.state_dict())
    saved["param_groups"] = [{**group, "state_version": 1} for group in saved["param_groups"]]
    twins = copied(params)
    twin = made("random", twins, ALL, same)
    twin.load_state_dict(saved)
    assert twin.param_groups[0]["state_version"] == STATE_VERSION == 2
    train(opt, params, CUT, END)
    train(twin, twins, CUT, END)
    assert equal(params, twins)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mate": "tall"}, "two parameters of the checkpoint have the key 'tall', so their random draws would be equal"),
        (["tall"], r"the checkpoint's `keys` must map names to keys, but the file is damaged and has \['tall'\]"),
        ({"mate": 3}, "the checkpoint's `keys` must map names to keys"),
        ({"mate": ""}, "the checkpoint's `keys` must map names to keys"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(keys: Any, said: str) -> None:
    params = some("spread")
    opt = made("spread", params, ALL, same)
    train(opt, params, 0, 1)
    saved = opt.state_dict()
    saved["param_groups"][0]["keys"] = keys
    before = [row.key for row in opt.plan]
    with pytest.raises(CheckpointError, match=said):
        opt.load_state_dict(saved)
    assert [row.key for row in opt.plan] == before


def test_a_new_parameter_may_not_take_a_key_that_is_in_use() -> None:
    params = some("spread")
    named = made("spread", params, ALL, same)
    named.load_state_dict(made("spread", params, ALL, None).state_dict())
    spare = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"two parameters have the key 'group0\.param1'"):
        named.add_param_group({"params": [("group0.param1", spare)]})
    named.add_param_group({"params": [("tall2", spare)]})
    assert [row.key for row in named.plan] == [*(f"group0.param{i}" for i in range(4)), "tall2"]


def test_names_that_differ_by_a_wrapper_alone_are_refused() -> None:
    spare = [(name, nn.Parameter(torch.ones(4, 4))) for name in ("a.weight", "a._orig_mod.weight")]
    with pytest.raises(ValueError, match=r"two parameters have the key 'a\.weight'"):
        SubspaceOptimizer(spare, "galore")


def test_a_compiled_model_draws_as_the_model() -> None:
    ends = []
    for called in (same, lambda name: f"_orig_mod.{name}"):
        params = some("random")
        train(made("random", params, ALL, called), params, 0, END)
        ends.append(params)
    assert equal(*ends)


# -------------------------------------------------------------------------------------------------- torch.distributed.checkpoint


def model_of(params: dict[str, nn.Parameter]) -> nn.Module:
    model = nn.Module()
    for name, p in params.items():
        model.register_parameter(name, p)
    return model


PASSED: dict[str, tuple[Any, Any, Any, Any]] = {
    "same": (TWO, same, TWO, same),
    "named, permuted": (TWO, same, [NAMES[:1:-1], ["mate", "tall"]], same),
    "other names, permuted groups": (TWO, other, TWO[::-1], other),
    "unnamed to named": (TWO, None, TWO, same),
    "named to unnamed": (TWO, same, TWO, None),
}
FLAT = ["same", "named, permuted", "other names, permuted groups"]  # torch reads only options that both optimizers have


@pytest.mark.parametrize(("case", "flatten"), [*((case, False) for case in PASSED), *((case, True) for case in FLAT)])
def test_a_distributed_checkpoint_keeps_keys(case: str, flatten: bool) -> None:
    groups, called, groups_then, called_then = PASSED[case]
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    params = some("random")
    opt = made("random", params, groups, called)
    train(opt, params, 0, CUT)
    saved = through_a_file(get_optimizer_state_dict(model_of(params), opt, options=options))
    twins = copied(params)
    twin = made("random", twins, groups_then, called_then)
    set_optimizer_state_dict(model_of(twins), twin, saved, options=options)
    train(opt, params, CUT, END)
    train(twin, twins, CUT, END)
    assert equal(params, twins)


def test_loaded_keys_pass_through_a_distributed_checkpoint() -> None:
    params = some("random")
    opt = made("random", params, TWO, None)
    train(opt, params, 0, 3)
    twins = copied(params)
    named = made("random", twins, TWO, same)
    named.load_state_dict(opt.state_dict())
    train(named, twins, 3, 6)
    saved = through_a_file(get_optimizer_state_dict(model_of(twins), named))
    thirds = copied(twins)
    last = made("random", thirds, TWO, same)
    set_optimizer_state_dict(model_of(thirds), last, saved)
    train(opt, params, 3, END)
    train(last, thirds, 6, END)
    assert equal(params, thirds)


def test_keys_of_groups_are_read_by_qualified_name() -> None:
    """torch.distributed.checkpoint returns parameters in the loader's order and names in the saver's order."""
    given: list[dict[str, Any]] = [
        {"params": ["b", "a"], "param_names": ["a", "b"], "keys": {"a": "x"}},
        {"params": ["c", "d"], "param_names": ["c.own", "d.own"]},
        {"params": ["e"]},
    ]
    assert keys_in(given) == [["b", "x"], ["c.own", "d.own"], ["group2.param0"]]


def test_state_and_weights_are_plain() -> None:
    """A state dictionary with keys contains no object of this package."""
    params = some("spread")
    named = made("spread", params, ALL, same)
    named.load_state_dict(made("spread", params, ALL, None).state_dict())
    saved = named.state_dict()
    assert through_a_file(saved)["param_groups"] == saved["param_groups"]

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return type(value) is dict and all(plain(v) for v in value.values())
        return isinstance(value, str | int | float | bool | list | Tensor | None)

    assert plain(saved)


# ------------------------------------------------------------------------------------------------------------------------ snapshots


@pytest.mark.parametrize("case", PASSED)
def test_a_snapshot_keeps_keys(case: str, tmp_path: Path) -> None:
    groups, called, groups_then, called_then = PASSED[case]
    params = some("random")
    opt = made("random", params, groups, called)
    train(opt, params, 0, CUT)
    snapshots.save(tmp_path, model_of(params), opt, step=CUT)
    twins = some("random")
    twin = made("random", twins, groups_then, called_then)
    snapshots.load(tmp_path, model_of(twins), twin)
    train(opt, params, CUT, END)
    train(twin, twins, CUT, END)
    assert equal(params, twins)


def test_loaded_keys_pass_through_a_snapshot(tmp_path: Path) -> None:
    params = some("random")
    opt = made("random", params, TWO, None)
    train(opt, params, 0, 3)
    twins = copied(params)
    named = made("random", twins, TWO, same)
    named.load_state_dict(opt.state_dict())
    train(named, twins, 3, 6)
    snapshots.save(tmp_path, model_of(twins), named, step=6)
    thirds = some("random")
    last = made("random", thirds, ALL, same)  # other groups are accepted although keys differ
    snapshots.load(tmp_path, model_of(thirds), last)
    train(opt, params, 3, END)
    train(last, thirds, 6, END)
    assert equal(params, thirds)
