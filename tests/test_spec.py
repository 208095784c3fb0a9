"""Specs are read, written, changed by dotted path, described by a schema, and saved in checkpoints."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from subspace_opt import Spec, SpecError, build, load_spec
from subspace_opt.registry import kinds
from subspace_opt.spec import STANDARD_OTHER, Route, json_schema, parse_spec
from subspace_opt.spec.presets import built_in

ROOT = Path(__file__).parents[1]
NAMES = list(built_in())
PROSE = {"about", "notes", "published"}  # fields that change no computation


def without_prose(spec: Spec) -> Spec:
    return spec.model_copy(update={name: Spec.model_fields[name].default for name in PROSE})


# --- read and written


@pytest.mark.parametrize("name", NAMES)
def test_preset_says_what_it_is(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    assert spec.source
    assert spec.version == 1


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_preset_survives_yaml(name: str, full: bool) -> None:
    spec = load_spec(name)
    assert parse_spec(spec.to_yaml(full=full)) == spec


def numbers(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """Dotted paths and values of all numbers and Booleans that a computation uses."""
    if isinstance(node, bool | int | float):
        return [(".".join(path), node)]
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in items for found in numbers(value, (*path, str(key)))]


@st.composite
def changed_presets(draw: st.DrawFn) -> Spec:
    """A preset with some numbers changed, and with text that is hard for YAML."""
    name = draw(st.sampled_from(NAMES))
    plain = load_spec(name).model_dump(mode="json")
    overrides: dict[str, Any] = {"name": draw(st.text(min_size=1)), "notes": draw(st.text())}
    leaves = numbers({key: plain[key] for key in ("defaults", "pipelines")})
    for path, value in draw(st.lists(st.sampled_from(leaves), max_size=6, unique=True)):
        if isinstance(value, bool):
            overrides[path] = not value
        elif isinstance(value, int):
            overrides[path] = draw(st.integers(1, 300))
        else:
            overrides[path] = draw(st.floats(1e-30, 0.999))
    try:
        return load_spec(load_spec(name), overrides)
    except SpecError as error:
        assume("dtype" in str(error) or "should be" in str(error))  # the field bounds the number
        assume(False)
        raise


@pytest.mark.slow
@example(load_spec("cosmos", {"name": "no", "notes": "\x85 next\u2028line\u2029 1e-3"}))
@given(changed_presets())
def test_any_spec_survives_yaml_json_and_mappings(spec: Spec) -> None:
    assert parse_spec(spec.to_yaml()) == spec
    assert parse_spec(spec.to_yaml(full=True)) == spec
    assert load_spec(spec.model_dump(mode="json")) == spec
    assert load_spec(json.loads(spec.model_dump_json())) == spec
    assert Spec.model_validate_json(spec.to_json()) == without_prose(spec)
    assert load_spec(spec) is spec


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    spec = load_spec("cosmos")
    for file, text in (("a.yaml", spec.to_yaml()), ("b.yml", spec.to_yaml(full=True)), ("c.json", spec.model_dump_json())):
        (tmp_path / file).write_text(text, encoding="utf-8")
        assert load_spec(tmp_path / file) == load_spec(str(tmp_path / file)) == spec


def test_a_file_may_be_named_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("pipelines: {matrix: {complement: muon}}")
    Path("cosmos").mkdir()
    assert load_spec("mine.yaml").pipelines["matrix"].complement
    assert load_spec("cosmos").name == "cosmos"  # a folder of that name does not hide the preset


def test_short_yaml_reads_like_the_papers() -> None:
    spec = load_spec(
        {
            "name": "hybrid",
            "pipelines": {
                "matrix": {
                    "orient": "short",
                    "momentum": {"kind": "ema", "beta": 0.95, "nesterov": True},
                    "selector": {"kind": "fft", "rank": 128, "every": 10},
                    "inside": [{"kind": "soap", "beta2": 0.95}],
                    "complement": "muon",
                    "finish": ["subset_norm", {"kind": "norm_growth", "gamma": 1.2}],
                }
            },
            "routes": [{"name": ["*head*"], "module": ["embedding"], "use": "matrix"}, {"use": "matrix"}],
        }
    )
    assert spec.to_yaml() == (
        "version: 1\n"
        "name: hybrid\n"
        "pipelines:\n"
        "  matrix:\n"
        "    orient: short\n"
        "    momentum: {kind: ema, nesterov: true}\n"
        "    selector: {kind: fft, every: 10}\n"
        "    inside: soap\n"
        "    complement: muon\n"
        "    finish:\n"
        "    - subset_norm\n"
        "    - {kind: norm_growth, gamma: 1.2}\n"
        "routes:\n"
        "- {use: matrix, name: ['*head*'], module: [embedding]}\n"
        "- {use: matrix}\n"
    )


# --- changed by dotted path

BASE: dict[str, Any] = {
    "pipelines": {
        "matrix": {
            "selector": "svd",
            "inside": ["ema", {"kind": "adam", "beta1": 0.8}],
            "complement": ["muon"],
            "finish": {"kind": "rms_normalize", "scale": 0.2},
        }
    }
}


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        pytest.param("matrix.selector.rank", 7, "matrix.selector.rank", id="option of a bare kind"),
        pytest.param("matrix.inside.0.beta", 0.5, "matrix.inside.0.beta", id="option of a bare kind in a list"),
        pytest.param("matrix.inside.1.beta1", 0.5, "matrix.inside.1.beta1", id="option in a list"),
        pytest.param("matrix.complement.steps", 3, "matrix.complement.0.steps", id="list of one, without its number"),
        pytest.param("matrix.complement.0.steps", 3, "matrix.complement.0.steps", id="list of one, with its number"),
        pytest.param("matrix.finish.scale", 0.3, "matrix.finish.0.scale", id="one rule"),
        pytest.param("matrix.finish.0.scale", 0.3, "matrix.finish.0.scale", id="one rule, with a number"),
        pytest.param("matrix.mix.complement", 0.3, "matrix.mix.complement", id="of what is not in the file"),
        pytest.param("matrix.orient", "left", "matrix.orient", id="plain value"),
        pytest.param("other.complement.beta2", 0.9, "other.complement.0.beta2", id="standard pipeline"),
        pytest.param("pipelines.matrix.selector.rank", 7, "matrix.selector.rank", id="from the top"),
    ],
)
def test_override(path: str, value: Any, place: str) -> None:
    found: Any = load_spec(BASE, {path: value}).pipelines
    for part in place.split("."):
        found = found[part] if isinstance(found, dict) else found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value


def test_override_changes_nothing_else() -> None:
    plain, changed = (load_spec(BASE, o).model_dump(mode="json") for o in ({}, {"matrix.selector.rank": 7}))
    assert changed["pipelines"]["matrix"]["selector"].pop("rank") == 7
    assert plain["pipelines"]["matrix"]["selector"].pop("rank") == 128
    assert changed == plain
    assert BASE["pipelines"]["matrix"]["selector"] == "svd"  # the argument is unchanged


def test_override_of_a_whole_part_and_of_a_field_of_the_spec() -> None:
    overrides = {"matrix.complement": "sign", "matrix.selector": {"kind": "fft", "rank": 3}, "defaults.lr": 0.5, "name": "mine"}
    spec = load_spec("cosmos", overrides)
    assert [rule.kind for rule in spec.pipelines["matrix"].complement] == ["sign"]
    assert spec.pipelines["matrix"].selector == kinds("selector")["fft"](rank=3)
    assert (spec.defaults.lr, spec.name) == (0.5, "mine")


def test_override_of_a_nested_selector_and_of_a_route() -> None:
    spec = load_spec("golore", {"matrix.selector.first.rank": 5, "matrix.selector.at": 9, "routes.0.min_dims": 3})
    selector: Any = spec.pipelines["matrix"].selector
    assert (selector.first.rank, selector.at, spec.routes[0].min_dims) == (5, 9, 3)


def test_overrides_hold_in_their_order() -> None:
    spec = load_spec("cosmos", {"matrix.complement": "muon", "matrix.complement.steps": 3})
    assert spec == load_spec("cosmos", {"matrix.complement": {"kind": "muon", "steps": 3}})


@pytest.mark.parametrize("name", NAMES)
def test_overriding_with_what_is_there_changes_nothing(name: str) -> None:
    spec = load_spec(name)
    assert load_spec(spec, dict(numbers(spec.model_dump(mode="json")["pipelines"]))) == spec


# --- routes


def test_routes_left_out_are_the_standard_ones() -> None:
    spec = load_spec({"pipelines": {"matrix": {"complement": "muon"}}})
    assert [str(route) for route in spec.routes] == [
        "role hidden|fused|conv",
        "everything else",
    ]
    assert [route.use for route in spec.routes] == ["matrix", "other"]
    assert spec.pipelines["other"] == load_spec({"pipelines": {"matrix": STANDARD_OTHER}}).pipelines["matrix"]


def test_standard_routes_leave_an_own_other_alone() -> None:
    spec = load_spec({"pipelines": {"matrix": {"complement": "muon"}, "other": {"complement": "sign"}}})
    assert [rule.kind for rule in spec.pipelines["other"].complement] == ["sign"]


def test_standard_routes_send_a_model_where_it_belongs() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 9))
    plan = build({"pipelines": {"matrix": {"complement": "muon"}}}, model).plan
    assert {row.entry.name: row.pipeline for row in plan} == {
        "0.weight": "other",
        "1.weight": "matrix",
        "1.bias": "other",
        "2.weight": "other",
        "2.bias": "other",
        "3.weight": "other",
        "3.bias": "other",
    }


@pytest.mark.parametrize(
    ("route", "accepted"),
    [
        ({}, {"embed.weight", "h.0.q.weight", "norm.weight", "lm_head.weight"}),
        ({"name": "*.weight", "min_dims": 2}, {"embed.weight", "h.0.q.weight", "lm_head.weight"}),
        ({"name": ["embed*", "norm*"]}, {"embed.weight", "norm.weight"}),
        ({"module": "linear"}, {"h.0.q.weight", "lm_head.weight"}),
        ({"module": ["embedding", "head"]}, {"embed.weight", "lm_head.weight"}),
        ({"max_dims": 1}, {"norm.weight"}),
        ({"min_side": 8, "max_side": 64}, {"h.0.q.weight"}),
    ],
)
def test_route_accepts_what_meets_all_its_conditions(route: dict[str, Any], accepted: set[str]) -> None:
    parameters = {
        "embed.weight": ((100, 16), {"embedding"}),
        "h.0.q.weight": ((64, 16), {"linear"}),
        "norm.weight": ((16,), {"norm"}),
        "lm_head.weight": ((100, 16), {"linear", "head"}),
    }
    own = Route(use="x", **route)
    found = {
        name
        for name, (shape, modules) in parameters.items()
        if own.accepts(name, len(shape), (min(*shape, 1) if len(shape) < 2 else min(shape), max(shape)), frozenset(modules))
    }
    assert found == accepted


# --- the schema


@pytest.mark.slow
def test_committed_schema_is_in_step() -> None:
    """A new process makes the schema: there no test has registered a kind, and no plugin is installed."""
    code = (
        "import json, subspace_opt.registry as r; r.plugin_entry_points = list\n"
        "from subspace_opt.spec import json_schema; print(json.dumps(json_schema()))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    committed = (ROOT / "subspace_opt" / "spec.schema.json").read_text(encoding="utf-8")
    assert json.loads(committed) == json.loads(made), "subspace-opt schema > subspace_opt/spec.schema.json"
    assert committed == json.dumps(json.loads(made), indent=2, ensure_ascii=False) + "\n"


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
SILENT = {"$schema", "$defs", "title", "description", "default", "examples"}  # keywords without a constraint
NUMBER = (int, float)
BOUNDS: dict[str, tuple[Any, Callable[[Any, Any], bool]]] = {  # the type that a keyword applies to, and its constraint
    "minimum": (NUMBER, lambda x, bound: x >= bound),
    "maximum": (NUMBER, lambda x, bound: x <= bound),
    "exclusiveMinimum": (NUMBER, lambda x, bound: x > bound),
    "exclusiveMaximum": (NUMBER, lambda x, bound: x < bound),
    "minLength": (str, lambda x, bound: len(x) >= bound),
    "minItems": (list, lambda x, bound: len(x) >= bound),
    "maxItems": (list, lambda x, bound: len(x) <= bound),
    "minProperties": (dict, lambda x, bound: len(x) >= bound),
}


def fits(value: Any, schema: Any, top: dict[str, Any]) -> bool:
    """True if plain data fits a schema. It knows the keywords of this package's schema; any other keyword raises."""
    if isinstance(schema, bool):
        return schema
    for keyword, demand in schema.items():
        match keyword:
            case "$ref":
                good = fits(value, top["$defs"][demand.removeprefix("#/$defs/")], top)
            case "anyOf":
                good = any(fits(value, branch, top) for branch in demand)
            case "type":
                good = isinstance(value, TYPES[demand]) and (demand == "boolean" or not isinstance(value, bool))
            case "enum":
                good = value in demand
            case "const":
                good = value == demand
            case "properties":
                good = not isinstance(value, dict) or all(fits(value[k], s, top) for k, s in demand.items() if k in value)
            case "additionalProperties":
                rest = set(value) - set(schema.get("properties", ())) if isinstance(value, dict) else ()
                good = all(fits(value[key], demand, top) for key in rest)
            case "required":
                good = not isinstance(value, dict) or set(demand) <= set(value)
            case "prefixItems":
                good = not isinstance(value, list) or all(fits(v, s, top) for v, s in zip(value, demand, strict=False))
            case "items":
                after = len(schema.get("prefixItems", ()))
                good = not isinstance(value, list) or all(fits(v, demand, top) for v in value[after:])
            case _ if keyword in BOUNDS:
                subject, holds = BOUNDS[keyword]
                good = not isinstance(value, subject) or holds(value, demand)
            case _:
                assert keyword in SILENT, f"the schema uses {keyword}, which this test does not know"
                good = True
        if not good:
            return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_schema_fits_every_preset(name: str) -> None:
    schema, spec = json_schema(), load_spec(name)
    assert fits(built_in()[name].read().data, schema, schema)
    assert fits(spec.model_dump(mode="json"), schema, schema)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"pipelines": {}},
        {"pipelines": {"matrix": {"complement": "muonn"}}},
        {"pipelines": {"matrix": {"complement": {"kind": "muonn"}}}},
        {"pipelines": {"matrix": {"complement": {"kind": "muon", "stps": 3}}}},
        {"pipelines": {"matrix": {"complement": {"steps": 3}}}},
        {"pipelines": {"matrix": {"complement": "svd"}}},
        {"pipelines": {"matrix": {"selector": {"kind": "svd", "rank": 0}, "inside": "adam"}}},
        {"pipelines": {"matrix": {"complement": {"kind": "adam", "beta1": 1}}}},
        {"pipelines": {"matrix": {"complement": "muon", "orient": "up"}}},
        {"pipelines": {"matrix": {"complement": "muon"}}, "routes": [{"min_dims": 2}]},
        {"pipelines": {"matrix": {"complement": "muon"}}, "routes": [{"use": "matrix", "module": "embed"}]},
        {"pipelines": {"matrix": {"complement": "muon"}}, "version": 2},
        {"pipelines": {"matrix": {"complement": "muon"}}, "defaults": {"lr": "fast"}},
    ],
)
def test_schema_refuses_what_the_spec_refuses(wrong: dict[str, Any]) -> None:
    schema = json_schema()
    assert not fits(wrong, schema, schema)
    with pytest.raises(SpecError):
        load_spec(wrong)


def test_every_option_is_documented() -> None:
    """The description of a field is its only documentation, in the schema and in an editor."""
    models: list[type[BaseModel]] = [Spec, Route, *kinds("rule").values(), *kinds("selector").values()]
    built_in = [model for model in models if model.__module__.startswith("subspace_opt.")]
    silent = [
        f"{model.__name__}.{name}"
        for model in built_in
        for name, field in model.model_fields.items()
        if name != "kind" and not field.description
    ]
    assert silent == []


# --- in a checkpoint


def test_spec_travels_in_the_state_dict() -> None:
    model = torch.nn.Linear(4, 3)
    spec = load_spec("cosmos", {"matrix.selector.rank": 2})
    saved = build(spec, model).state_dict()["param_groups"][0]["spec"]
    assert isinstance(saved, str)  # plain text: a checkpoint that is loaded with weights_only has no objects
    read = Spec.model_validate_json(saved)
    assert read == without_prose(spec)
    build(read, model).load_state_dict(build(spec, model).state_dict())  # the same optimizer


def test_mappings_and_sequences_of_other_libraries_are_specs() -> None:
    """Configuration tools have classes of their own, which are neither dicts nor lists."""
    routes = collections.UserList([collections.UserDict(use="matrix")])
    given = collections.UserDict(
        name="mine", pipelines={"matrix": collections.UserDict(complement=collections.UserList(["adam"]))}, routes=routes
    )
    plain = {"name": "mine", "pipelines": {"matrix": {"complement": ["adam"]}}, "routes": [{"use": "matrix"}]}
    assert load_spec(given) == load_spec(plain)
    assert load_spec(plain, {"matrix.complement": collections.UserList(["adam"])}) == load_spec(plain)
