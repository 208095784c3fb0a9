"""Bad input gives one clear error with the place, the fault and the known names; nothing is executed, written or lost."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspace_opt import (
    CheckpointError,
    NonFiniteGradient,
    RegistryError,
    SpecError,
    SubspaceOptimizer,
    build,
    load_plugin,
    load_spec,
    registry,
)
from subspace_opt.cli import main
from subspace_opt.spec.presets import built_in

ROOT = Path(__file__).parents[1]
RANK = "should be a number of columns, 1 or more, or a part of the short side between 0 and 1, not "


def matrix(body: str) -> str:
    """A spec file with one pipeline. The pipeline's first line is line 4 of the file and begins in column 5."""
    return "version: 1\npipelines:\n  matrix:\n" + indent(dedent(body), "    ")


def refused(source: Any, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(source, overrides)
    return str(caught.value)


# --- spec files: (text, message); `FILE` is the path of the file

UNKNOWN_KEYS = {
    "top": (matrix("complement: muon") + "\nnotess: x", "FILE:5:1: notess: unknown key 'notess'; did you mean 'notes'?"),
    "misspelt and so missing": (
        "version: 1\npipeline: {matrix: {complement: muon}}",
        "FILE:2:1: pipeline: unknown key 'pipeline'; did you mean 'pipelines'?",
    ),
    "routes, without which the pipelines have other names": (
        "pipelines: {hidden: {complement: muon}}\nruotes: [{use: hidden}]",
        "FILE:2:1: ruotes: unknown key 'ruotes'; did you mean 'routes'?",
    ),
    "defaults": (
        matrix("complement: muon") + "\ndefaults: {momentum: 1}",
        "FILE:5:12: defaults.momentum: unknown key 'momentum'; known: lr, weight_decay",
    ),
    "pipeline": (
        matrix("complment: muon"),
        "FILE:4:5: pipelines.matrix.complment: unknown key 'complment'; did you mean 'complement'?",
    ),
    "selector": (
        matrix("selector: {kind: svd, rnk: 3}\ninside: adam"),
        "FILE:4:27: pipelines.matrix.selector.rnk: unknown key 'rnk'; did you mean 'rank'?",
    ),
    "selector in a selector": (
        matrix("selector: {kind: switch, at: 3, first: {kind: svd, rnk: 3}, then: random}\ninside: adam"),
        "FILE:4:56: pipelines.matrix.selector.first.rnk: unknown key 'rnk'; did you mean 'rank'?",
    ),
    "rule": (
        matrix("selector: svd\ninside: {kind: adam, bta1: 0.9}"),
        "FILE:5:26: pipelines.matrix.inside.bta1: unknown key 'bta1'; did you mean 'beta1'?",
    ),
    "rule of a list": (
        matrix("selector: svd\ninside:\n  - ema\n  - {kind: adam, bta1: 0.9}"),
        "FILE:7:22: pipelines.matrix.inside.1.bta1: unknown key 'bta1'; did you mean 'beta1'?",
    ),
    "mix": (
        matrix("selector: svd\ninside: adam\nmix: {outside: 1.0}"),
        "FILE:6:11: pipelines.matrix.mix.outside: unknown key 'outside'; did you mean 'inside'?",
    ),
    "route": (
        matrix("complement: muon") + "\nroutes:\n  - {use: matrix, nme: x}",
        "FILE:6:19: routes.0.nme: unknown key 'nme'; did you mean 'name'?",
    ),
}

WRONG_TYPES = {
    "text for a number": (matrix("complement: {kind: adam, beta1: '0.9'}"), "beta1: should be a number, not '0.9'"),
    "number for text": (matrix("complement: muon") + "\nname: 3", "FILE:5:1: name: should be text, not 3"),
    "number for a truth": (matrix("complement: {kind: adam, debias: 1}"), "debias: should be true or false, not 1"),
    "fraction for a count": (
        matrix("selector: {kind: svd, every: 2.5}\ninside: adam"),
        "FILE:4:27: pipelines.matrix.selector.every: should be a whole number, not 2.5",
    ),
    "one value for a list": (matrix("complement: muon") + "\nsource: a paper", "source: should be a list, not 'a paper'"),
    "list for a mapping": ("version: 1\npipelines:\n  - matrix", "FILE:2:1: pipelines: should be a mapping, not ['matrix']"),
    "list for a pipeline": ("pipelines:\n  matrix: [muon]", "FILE:2:3: pipelines.matrix: should be a mapping, not ['muon']"),
    "mapping for a list": (
        matrix("complement: muon") + "\nroutes: {use: matrix}",
        "FILE:5:1: routes: should be a list, not {'use': 'matrix'}",
    ),
    "nothing for a mapping": ("version: 1\npipelines:", "FILE:2:1: pipelines: should be a mapping, not null"),
    "nothing at all": ("version: 1", "FILE:1:1: pipelines: required, but missing"),
    "number for a rule": (
        matrix("complement: 3"),
        "FILE:4:5: pipelines.matrix.complement: a rule must be a kind's name or a mapping with a `kind`, not 3",
    ),
    "word of no choice": (
        matrix("orient: shrt\ncomplement: muon"),
        "FILE:4:5: pipelines.matrix.orient: should be 'right', 'left', 'short' or 'long', not 'shrt'",
    ),
    "of no branch of a union": (
        matrix("complement: {kind: muon, coefficients: jordan}"),
        "FILE:4:30: pipelines.matrix.complement.coefficients: "
        "should be 'keller', 'quintic', 'cubic', 'classical', 'cans', 'aol', 'dion' or 'deepseek', or a list, not 'jordan'",
    ),
    "version": ("version: 2\npipelines: {matrix: {complement: muon}}", "FILE:1:1: version: should be 1, not 2"),
}

OUT_OF_RANGE = {
    "rank 0": (matrix("selector: {kind: svd, rank: 0}\ninside: adam"), f"FILE:4:27: pipelines.matrix.selector.rank: {RANK}0"),
    "rank -3": (matrix("selector: {kind: svd, rank: -3}\ninside: adam"), f"{RANK}-3"),
    "rank 3.5": (matrix("selector: {kind: svd, rank: 3.5}\ninside: adam"), f"{RANK}3.5"),
    "rank NaN": (matrix("selector: {kind: svd, rank: .nan}\ninside: adam"), f"{RANK}nan"),
    "rank true": (matrix("selector: {kind: svd, rank: true}\ninside: adam"), f"{RANK}true"),
    "beta 1": (
        matrix("complement: {kind: adam, beta1: 1}"),
        "FILE:4:30: pipelines.matrix.complement.beta1: should be less than 1, not 1",
    ),
    "beta -0.1": (
        matrix("complement: {kind: adam, beta2: -0.1}"),
        "pipelines.matrix.complement.beta2: should be greater than or equal to 0, not -0.1",
    ),
    "beta NaN": (matrix("complement: {kind: adam, beta2: .nan}"), "beta2: should be a finite number, not nan"),
    "every 0": (matrix("selector: {kind: svd, every: 0}\ninside: adam"), "every: should be greater than 0, not 0"),
    "lr NaN": (
        matrix("complement: muon") + "\ndefaults: {lr: .nan}",
        "FILE:5:12: defaults.lr: should be a finite number, not nan",
    ),
    "lr -1": (
        matrix("complement: muon") + "\ndefaults: {lr: -1}",
        "FILE:5:12: defaults.lr: should be greater than or equal to 0, not -1",
    ),
    "lr 1e400": (matrix("complement: muon") + "\ndefaults: {lr: 1e400}", "defaults.lr: should be a finite number, not inf"),
}

UNKNOWN_KINDS = {
    "rule": (
        matrix("complement: muonn"),
        "FILE:4:5: pipelines.matrix.complement: unknown rule kind 'muonn'; did you mean 'muon'?",
    ),
    "selector": (
        matrix("selector: {kind: egien}\ninside: adam"),
        "FILE:4:5: pipelines.matrix.selector: unknown selector kind 'egien'; did you mean 'eigen'?",
    ),
    "of the other family": (
        matrix("complement: svd"),
        "FILE:4:5: pipelines.matrix.complement: unknown rule kind 'svd'; that is a selector; known: adam, ",
    ),
    "of nothing": (matrix("complement: xyzzy"), "unknown rule kind 'xyzzy'; known: adam, "),
    "left out": (
        matrix("selector: {rank: 3}\ninside: adam"),
        "FILE:4:5: pipelines.matrix.selector: a selector needs a `kind`; known: blocks, ",
    ),
    "number": (matrix("complement: {kind: 3}"), "pipelines.matrix.complement: unknown rule kind '3'; known: "),
}

MAKES_NO_SENSE = {
    "merged dimensions of another view": (
        matrix("complement: muon") + "\nroutes:\n  - {use: matrix, merge: 8}",
        "FILE:6:5: routes.0: `merge` joins the dimensions of `view: modes`; use that view, or leave `merge` out",
    ),
    "merged dimensions and heads": (
        matrix("complement: muon") + "\nroutes:\n  - {use: matrix, view: modes, merge: 8, heads: 2}",
        "FILE:6:5: routes.0: `merge` may join the rows that `split` or `heads` would cut; leave one of them out",
    ),
    "coefficients without their bound": (
        matrix("complement: {kind: muon, coefficients: aol, steps: 4}"),
        "coefficients 'aol' turn some directions around unless rows are scaled for them; use `bound: aol`",
    ),
    "bound of an exact method": (
        matrix("complement: {kind: muon, method: svd, bound: schatten4}"),
        "method svd is exact and needs no `bound`; leave it out, or use method newton_schulz",
    ),
    "margin of another bound": (
        matrix("complement: {kind: muon, coefficients: dion, margin: 1.02, bound: spectral}"),
        "`margin` multiplies the Frobenius norm, and another bound replaces that; leave out `margin` or `bound`",
    ),
    "power iterations of another bound": (
        matrix("complement: {kind: muon, power_iterations: 9}"),
        "`power_iterations` belong to `bound: spectral`; leave them out, or use that bound",
    ),
    "fast transform of a random matrix": (
        matrix("selector: {kind: fft, dictionary: random, transform: fft}\ninside: adam"),
        "a random dictionary has no fast transform; use `transform: table`",
    ),
    "weights that are all 1": (
        matrix("selector: {kind: fft, weighted: true}\ninside: adam"),
        "`weighted` has no effect with `ranking: l2`, because all atoms have l2 norm 1; use `ranking: l1`",
    ),
    "dampening with a look ahead": (
        matrix("complement: {kind: heavy_ball, dampening: 0.1, nesterov: true}"),
        "`dampening` goes with neither `nesterov` nor `debias`; leave it out, or use kind 'ema' with these options",
    ),
    "sides of a factor that is not there": (
        matrix("complement: [muon, {kind: scale, sides: weight}]"),
        "`sides: weight` has no effect without a shape factor; give `by`, or leave `sides` out",
    ),
    "amsgrad of a rule whose moments follow by a formula": (
        matrix("selector: power_iteration\ninside: {kind: ldadam, amsgrad: true}"),
        "`amsgrad` has no formula for a moving subspace: leave it out, or use kind 'adam' with `on_refresh: project`",
    ),
    "selector without a rule": (
        matrix("selector: svd"),
        "FILE:3:3: pipelines.matrix: selector 'svd' opens a subspace, and `inside` names no rule for it",
    ),
    "rule without a selector": (
        matrix("inside: adam"),
        "FILE:3:3: pipelines.matrix: `inside` needs a `selector` that opens a subspace; for a rule on the whole signal use `complement`",
    ),
    "no update": (
        matrix("orient: short"),
        "FILE:3:3: pipelines.matrix: neither `inside` nor `complement` makes an update; give one of them a rule and a weight",
    ),
    "route to nowhere": (
        matrix("complement: muon") + "\nroutes:\n  - {min_dims: 2, use: matrx}",
        "FILE:6:19: routes.0.use: no pipeline is named 'matrx'; did you mean 'matrix'?",
    ),
    "pipeline that no route takes": (
        matrix("complement: muon") + "\n  rest: {complement: adam}\nroutes: [{use: matrix}]",
        "FILE:5:3: pipelines.rest: no route uses this pipeline; add a route with `use: NAME`, or remove the pipeline",
    ),
    "no routes for other names": (
        "pipelines: {hidden: {complement: muon}}",
        "FILE:1:1: pipelines: a spec without `routes` needs a pipeline named `matrix` and may have `other`; rename it or add `routes`",
    ),
    "two cuts": (
        matrix("complement: muon") + "\nroutes:\n  - {use: matrix, heads: 3, split: {q: 3}}",
        "FILE:6:5: routes.0: `split` and `heads` both cut the rows; give one of them",
    ),
}

NO_SPEC_FILE = {
    "duplicate key": (
        matrix("complement: muon\ncomplement: sign"),
        "FILE:5:5: the key 'complement' is given twice, first on line 4; keep one of the two",
    ),
    "empty": ("", "FILE: the file is empty, but a spec is a mapping; start with `version: 1` and `pipelines:`"),
    "list": ("- a\n- b", "FILE:1:1: found a list, but a spec is a mapping; start with `version: 1` and `pipelines:`"),
    "python object": (
        matrix("complement: !!python/object/apply:os.mkdir [pwned]"),
        "FILE:4:17: the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir' is not allowed: "
        "a spec holds plain data, never objects; remove the tag",
    ),
    "alias bomb": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]",
        "FILE:1:4: the anchor '&a' is not allowed; remove it and repeat the value wherever it is used",
    ),
    "1 MB of nesting": (
        "[" * 1_000_000,
        "FILE: larger than 256 kB; a spec has a few kB, so check that this is the right file",
    ),
    "nesting that fits": (
        matrix("complement: " + "{a: " * 20_000),
        "FILE:4:165: nested more than 40 levels deep; a spec needs about six levels, so flatten it",
    ),
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(*case, id=f"{group}: {name}")
        for group, cases in (
            ("unknown key", UNKNOWN_KEYS),
            ("wrong type", WRONG_TYPES),
            ("out of range", OUT_OF_RANGE),
            ("unknown kind", UNKNOWN_KINDS),
            ("no sense", MAKES_NO_SENSE),
            ("no spec", NO_SPEC_FILE),
        )
        for name, case in cases.items()
    ],
)
def test_file(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message names the place, and the folder is unchanged."""
    file = tmp_path / "s.yaml"
    file.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = refused(file)
    wanted = message.replace("FILE", str(file))
    assert found.startswith(wanted) if "FILE" in message else wanted in found
    assert "\n" not in found
    assert os.listdir(tmp_path) == ["s.yaml"]


def test_json_is_located_too(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text('{"pipelines":\n {"matrix": {"selector": {"kind": "svd", "rank": 0}, "inside": "adam"}}}')
    assert refused(file) == f"{file}:2:42: pipelines.matrix.selector.rank: {RANK}0"


def test_every_error_is_told_and_a_flood_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("\n".join([matrix("complement: muon"), *(f"key{i}: 1" for i in range(13))]))
    lines = refused(file).splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(f"{file}:5:1: key0: unknown key 'key0'; known: about, defaults, ")
    assert lines[-1] == "... and 3 more"


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "cosmos.yaml").write_text("version: 1")
    near = tmp_path / "cosmo.yaml"
    assert refused(near) == f"{near}: no such file; did you mean 'cosmos.yaml'?"
    lost = tmp_path / "no" / "s.yaml"
    assert refused(lost) == f"{lost}: no such file, and no folder '{lost.parent}'; check the path"
    assert refused(tmp_path) == f"{tmp_path}: a directory; give a .yaml, .yml or .json file"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cosmso", "no preset 'cosmso'; did you mean 'cosmos'? (for a file, give its path with the ending: ./cosmso.yaml)"),
        ("zzz", "no preset 'zzz'; known: adafactor, "),
        (3, "a spec must be a preset's name, a path, a mapping or a Spec, not int"),
        (None, "a spec must be a preset's name, a path, a mapping or a Spec, not NoneType"),
        ({}, "the given mapping: pipelines: required, but missing"),
        (
            {"pipelines": {"matrix": {"complement": "muonn"}}},
            "the given mapping: pipelines.matrix.complement: unknown rule kind 'muonn'; did you mean 'muon'?",
        ),
    ],
)
def test_no_file(source: Any, message: str) -> None:
    assert refused(source).startswith(message)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("matrix.selector.rank", 0, f"override 'matrix.selector.rank': pipelines.matrix.selector.rank: {RANK}0"),
        (
            "matrix.selector.rnk",
            3,
            "override 'matrix.selector.rnk': pipelines.matrix.selector.rnk: unknown key 'rnk'; did you mean 'rank'?",
        ),
        (
            "matrx.selector.rank",
            3,
            "override 'matrx.selector.rank': 'matrx' is neither a pipeline nor a field of a spec; did you mean 'matrix'?",
        ),
        (
            "matrix.selector.rank.x",
            3,
            "override 'matrix.selector.rank.x': pipelines.matrix.selector.rank is 64, a value without fields; shorten the path",
        ),
        (
            "matrix.inside.kind.x",
            3,
            "override 'matrix.inside.kind.x': pipelines.matrix.inside.kind is 'soap', a value without fields; shorten the path",
        ),
        ("routes.9.use", "x", "override 'routes.9.use': routes is a list of 2; give an index below 2, or replace the whole list"),
        ("routes.0.use", "x", "override 'routes.0.use': routes.0.use: no pipeline is named 'x'; known: matrix, other"),
        ("matrix..rank", 3, "override 'matrix..rank': give a dotted path, such as 'matrix.selector.rank'"),
        ("", 3, "override '': give a dotted path, such as 'matrix.selector.rank'"),
        (3, 3, "override 3: give a dotted path, such as 'matrix.selector.rank'"),
        ("defaults.lr", math.nan, "override 'defaults.lr': defaults.lr: should be a finite number, not nan"),
    ],
)
def test_override(path: Any, value: Any, message: str) -> None:
    assert refused("cosmos", {path: value}) == message


# --- hypothesis: any value at any place


def places(node: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[int | str, ...]]:
    """Every path into plain data, the top included."""
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def at(node: Any, path: tuple[int | str, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


DOCUMENTS = {name: preset.read().data for name, preset in built_in().items()}
PLACES = [(name, path) for name, data in DOCUMENTS.items() for path in places(data)]
MAPPINGS = [(n, p) for n, p in PLACES if isinstance(at(DOCUMENTS[n], p), dict) and p != ("pipelines",)]  # mappings that accept any key


@given(place=st.sampled_from(MAPPINGS), value=st.sampled_from([None, 1, "muon", [], {"kind": "adam"}]))
def test_unknown_key_at_any_depth(place: tuple[str, tuple[int | str, ...]], value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    name, path = place
    data = copy.deepcopy(DOCUMENTS[name])
    at(data, path)["zzz"] = value
    file = tmp_path_factory.getbasetemp() / f"{os.getpid()}.json"
    file.write_text(json.dumps(data, indent=1))
    line = next(i for i, words in enumerate(file.read_text().splitlines(), 1) if '"zzz"' in words)
    dotted = ".".join(map(str, (*path, "zzz")))
    assert re.match(rf"{re.escape(str(file))}:{line}:\d+: {re.escape(dotted)}: unknown key 'zzz'; known: [a-z]", refused(file))


@given(place=st.sampled_from([(n, p) for n, p in PLACES if p and isinstance(p[-1], str) and len(p[-1]) > 3 and p[:-1] != ("pipelines",)]))
def test_misspelt_key_at_any_depth(place: tuple[str, tuple[int | str, ...]]) -> None:
    name, path = place
    key = str(path[-1])
    data = copy.deepcopy(DOCUMENTS[name])
    at(data, path[:-1])[key + "q"] = at(data, path[:-1]).pop(key)
    if key == "kind":
        assert "needs a `kind`; known: " in refused(data)
    else:
        assert f"unknown key '{key}q'; did you mean '{key}'?" in refused(data)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["adam", "svd", "muon", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "rank", "use", "x"]), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(place=st.sampled_from(PLACES), value=PLAIN)
def test_any_value_anywhere_is_a_spec_or_a_spec_error(place: tuple[str, tuple[int | str, ...]], value: Any) -> None:
    name, path = place
    data = copy.deepcopy(DOCUMENTS[name])
    if path:
        at(data, path[:-1])[path[-1]] = value
    else:
        data = value
    with suppress(SpecError):
        load_spec(data if not isinstance(data, str) else {"name": data})


@given(text=st.text(st.sampled_from("abmx:- {}[]'\"\n&*!|>#0.,"), max_size=60))
def test_any_text_is_a_spec_or_a_spec_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / f"{os.getpid()}.yaml"
    file.write_text(text)
    assert refused(file).startswith(str(file))  # none of these letters spells `pipelines`


# --- the command


def command(*arguments: str) -> tuple[int, str, str]:
    """Run the command in a new process; return status, stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "from subspace_opt.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def left(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return (caught.value.code, *capsys.readouterr())


@pytest.mark.parametrize("name", ["show", "validate", "explain", "plan", "train"])
def test_command_leaves_with_2_and_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(matrix("selector: {kind: svd, rnk: 3}\ninside: adam"))
    wrong = f"{file}:4:27: pipelines.matrix.selector.rnk: unknown key 'rnk'; did you mean 'rank'?"
    assert left(capsys, name, str(file)) == (2, "", f"Error: {wrong}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "cosmso"), "no preset 'cosmso'; did you mean 'cosmos'? (for a file, give its path with the ending: ./cosmso.yaml)"),
        (
            ("show", "cosmos", "--set", "matrix.selector.rank"),
            "--set 'matrix.selector.rank': give PATH=VALUE, such as matrix.selector.rank=128",
        ),
        (
            ("show", "cosmos", "--set", "matrix.selector={kind: svd"),
            "--set 'matrix.selector={kind: svd': the value cannot be read: not YAML: while parsing a flow mapping, "
            "expected ',' or '}', but got '<stream end>'",
        ),
        (
            ("show", "cosmos", "--set", "name=a\nnotes: b"),
            "--set 'name=a\nnotes: b': the value must be one line of YAML, such as 128 or {kind: svd, rank: 8}",
        ),
        (("list", "--plugin", "no.py"), "plugin file 'no.py' does not exist or is not a regular file; give the path of a .py file"),
        (
            ("plan", "cosmos", "--model", "61m"),
            "model: '61m' is neither a known size nor a path. Did you mean '60m'? Known sizes: tiny, mini, small, 60m, 130m, 350m, "
            "1b, 7b, 70b; or give a folder or a JSON file with a Hugging Face config",
        ),
        (("train", "cosmos", "--lr", "-1"), "--lr: should be greater than 0, not -1.0"),
        (("train", "cosmos", "--lr", "nan"), "--lr: should be a finite number, not nan"),
        (("train", "cosmos", "--steps", "0"), "--steps: should be greater than 0, not 0"),
        (("train", "cosmos", "--device", "tpu"), "--device: should be 'auto', 'cpu', 'cuda' or 'mps', not 'tpu'"),
    ],
)
def test_command_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert left(capsys, *arguments) == (2, "", f"Error: {message}\n")


def test_usage_errors_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("shwo",), "No such command 'shwo'"),
        (("show",), "Missing argument 'SPEC'"),
        (("plan", "cosmos", "--modle", "7b"), "--modle"),
        (("plan", "cosmos", "--dtype", "int8"), "'--dtype'"),
    ):
        status, out, error = left(capsys, *arguments)
        assert (status, out) == (2, "")
        assert words in error
        assert "Traceback" not in error


def test_validate_names_every_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a.yaml", "version: 1"), ("b.yaml", matrix("complement: muon")), ("c.yaml", "")):
        (tmp_path / name).write_text(text)
    status, out, error = left(capsys, "validate", *(str(tmp_path / name) for name in ("a.yaml", "b.yaml", "c.yaml")))
    assert status == 2
    assert out == f"{tmp_path}/b.yaml: ok, unnamed: pipelines other, matrix; 2 routes\n"
    assert [line.split(": ")[1] for line in error.splitlines()] == [f"{tmp_path}/a.yaml:1:1", f"{tmp_path}/c.yaml"]


# --- plugins

KIND = '''
from typing import Literal
from subspace_opt import Rule, register

@register
class {name}(Rule):
    """`2 X`."""
    kind: Literal["{kind}"] = "{kind}"
    def apply(self, x, grad, state, step):
        return 2 * x, {{}}
'''


@pytest.fixture
def own_registry() -> Iterator[None]:
    """Remove after each test the kinds that it registered."""
    before = {family: dict(table) for family, table in registry._kinds.items()}
    loaded = set(registry._loaded)
    yield
    registry._kinds.clear()
    registry._kinds.update(before)
    registry._loaded.clear()
    registry._loaded.update(loaded)


@pytest.mark.usefixtures("own_registry")
def test_two_plugins_of_one_kind_are_both_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text(KIND.format(name="First", kind="twice"))
    second.write_text(KIND.format(name="Second", kind="twice") + KIND.format(name="Third", kind="thrice"))
    load_plugin(first)
    with pytest.raises(RegistryError) as caught:
        load_plugin(second)
    assert re.fullmatch(
        rf"plugin file '{re.escape(str(second))}' failed to import: RegistryError: two classes for the rule kind 'twice': "
        rf"\S+\.First \({re.escape(str(first))}\) and \S+\.Second \({re.escape(str(second))}\); rename one of them",
        str(caught.value),
    )
    assert load_spec({"pipelines": {"matrix": {"complement": "twice"}}})  # the first is in force
    assert "unknown rule kind 'thrice'" in refused({"pipelines": {"matrix": {"complement": "thrice"}}})


@pytest.mark.usefixtures("own_registry")
def test_a_built_in_kind_cannot_be_taken(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(KIND.format(name="Mine", kind="adam"))
    with pytest.raises(RegistryError, match=r"two classes for the rule kind 'adam': subspace_opt\.rules\.adaptive\.Adam "):
        load_plugin(file)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("breakage", ["1 / 0", "import no_such_module", "import sys; sys.exit(3)", "def f(:"])
def test_plugin_file_that_breaks(breakage: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(KIND.format(name="Half", kind="half") + breakage)
    with pytest.raises(RegistryError) as caught:
        load_plugin(file)
    assert str(caught.value).startswith(f"plugin file '{file}' failed to import: ")
    assert "unknown rule kind 'half'" in refused({"pipelines": {"matrix": {"complement": "half"}}})
    assert load_spec("cosmos").name == "cosmos"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "class A(Rule):\n    def apply(self, x, grad, state, step): ...",
            "has no name; add a field such as `kind: Literal['my_kind'] = 'my_kind'`",
        ),
        ("class A:\n    pass", "cannot be registered: it is no component of a family; derive it from Rule, Selector or WeightRule"),
    ],
)
@pytest.mark.usefixtures("own_registry")
def test_class_that_is_no_kind(body: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"from subspace_opt import Rule, register\n@register\n{body}\n")
    with pytest.raises(RegistryError) as caught:
        load_plugin(file)
    assert message in str(caught.value)


def install(site: Path, name: str, source: str, group: str = "subspace_opt.plugins", module: str = "") -> None:
    """Write a distribution as pip installs it: a module, and metadata with its entry point."""
    site.mkdir(exist_ok=True)
    (site / f"{name}.py").write_text(source)
    info = site / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module or name}\n")


def with_site(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_installed_plugins_good_broken_and_doubled(tmp_path: Path) -> None:
    """One of three plugins is good, one raises, and one has the good one's kind. The good one works, and warnings name the others."""
    site = tmp_path / "site"
    install(site, "good_plugin", KIND.format(name="Good", kind="twice"))
    install(site, "raising_plugin", "raise OSError('no licence')")
    install(site, "taking_plugin", KIND.format(name="Taking", kind="twice"))
    code = """
        import sys, warnings, json
        from subspace_opt import SpecError, load_spec
        load_spec("cosmos")
        assert not {"good_plugin", "raising_plugin", "taking_plugin"} & set(sys.modules), "imported before it was asked for"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_spec({"pipelines": {"matrix": {"complement": "twice"}}})
        try:
            load_spec({"pipelines": {"matrix": {"complement": "thrice"}}})
        except SpecError as error:
            print(json.dumps([[str(w.message) for w in caught], str(error)]))
    """
    done = with_site(site, dedent(code))
    assert done.returncode == 0, done.stderr
    warned, error = json.loads(done.stdout)
    raising = "OSError: no licence"
    taking = (
        f"RegistryError: two classes for the rule kind 'twice': good_plugin.Good ({site / 'good_plugin.py'}) "
        f"and taking_plugin.Taking ({site / 'taking_plugin.py'}); rename one of them"
    )
    assert warned == [
        f"plugin '{name}' (from {name} 1.2) failed to import and is left out: {why}"
        for name, why in (("raising_plugin", raising), ("taking_plugin", taking))
    ]
    assert error == (
        "the given mapping: pipelines.matrix.complement: unknown rule kind 'thrice'; did you mean 'twice'?"
        f"; plugin 'raising_plugin' failed to import: {raising}; plugin 'taking_plugin' failed to import: {taking}"
    )


@pytest.mark.slow
def test_command_lists_a_broken_plugin_and_works(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "good_plugin", KIND.format(name="Good", kind="twice"))
    install(site, "raising_plugin", "raise OSError('no licence')")
    code = "from subspace_opt.cli import main; main(['list', '--json'])"
    done = with_site(site, code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "Warning: plugin 'raising_plugin' (from raising_plugin 1.2) failed to import and is left out: OSError: no licence\n"
    )
    listed = json.loads(done.stdout)
    assert [p for p in listed["plugins"] if p["name"].endswith("_plugin")] == [
        {"name": "good_plugin", "package": "good_plugin 1.2", "gives": ["twice"], "error": None},
        {"name": "raising_plugin", "package": "raising_plugin 1.2", "gives": [], "error": "OSError: no licence"},
    ]
    assert {"names": ["twice"], "doc": "`2 X`.", "plugin": "good_plugin"} in listed["rules"]


@pytest.mark.slow
def test_command_lists_broken_presets_of_packages(tmp_path: Path) -> None:
    """A package has an invalid preset, and another package is missing. The list names both and shows everything else."""
    site = tmp_path / "site"
    for name, module in (("good_recipes", "good_recipes"), ("lost_recipes", "nowhere")):
        install(site, name, "", group="subspace_opt.presets", module=module)
    package = site / "good_recipes"
    package.mkdir()
    (site / "good_recipes.py").unlink()
    (package / "__init__.py").touch()
    (package / "house.yaml").write_text(load_spec("muon").to_yaml())
    (package / "wrong.yaml").write_text("pipelines: {matrix: {complement: muonn}}")
    done = with_site(site, "from subspace_opt.cli import main; main(['list', '--json'])")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    found = {preset["name"]: preset for preset in listed["presets"]}
    assert (found["house"]["package"], found["house"]["error"]) == ("good_recipes 1.2", None)
    assert found["wrong"]["error"].endswith("wrong.yaml:1:22: pipelines.matrix.complement: unknown rule kind 'muonn'; did you mean 'muon'?")
    assert found["cosmos"]["package"] == ""
    rows = {plugin["name"]: plugin for plugin in listed["plugins"]}
    assert rows["good_recipes"]["gives"] == ["house", "wrong"]
    assert rows["lost_recipes"]["error"] == "ModuleNotFoundError: No module named 'nowhere'"


# --- the optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": math.nan}, "Invalid learning rate: nan; it must be a finite number, 0 or more"),
        ({"lr": -1e-3}, "Invalid learning rate: -0.001; it must be a finite number, 0 or more"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1; it must be a finite number, 0 or more"),
        ({"nonfinite": "skp"}, "nonfinite is 'skp'; did you mean 'skip'?"),
        ({"overrides": {"matrix.selector.rank": 0}}, f"override 'matrix.selector.rank': pipelines.matrix.selector.rank: {RANK}0"),
    ],
)
def test_build(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build("cosmos", torch.nn.Linear(4, 4), **options)


def trained(spec: str = "cosmos", **options: Any) -> tuple[torch.nn.Module, SubspaceOptimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    optimizer = build(spec, model, **options)
    for _ in range(2):
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def spoilt_slot(saved: dict[str, Any], slot: str, value: Any) -> None:
    saved["state"][0][slot] = value


CORRUPTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no state": (lambda saved: saved.pop("state"), "this is not an optimizer's state dictionary: it needs `state` and `param_groups`"),
    "slot gone": (
        lambda saved: saved["state"][0].pop("selector.basis"),
        "the checkpoint does not fit this optimizer:\n'0.weight': slot 'selector.basis' is missing",
    ),
    "slot cut short": (
        lambda saved: spoilt_slot(saved, "selector.basis", torch.zeros(6, 4)),
        "the checkpoint does not fit this optimizer:\n'0.weight': slot 'selector.basis' has shape (6, 4), here (6, 5)",
    ),
    "slot of another dtype": (
        lambda saved: spoilt_slot(saved, "selector.basis", torch.zeros(6, 5, dtype=torch.bfloat16)),
        "the checkpoint does not fit this optimizer:\n'0.weight': slot 'selector.basis' has dtype torch.bfloat16, here torch.float32",
    ),
    "text for a tensor": (
        lambda saved: spoilt_slot(saved, "selector.basis", "x"),
        "the checkpoint does not fit this optimizer:\n'0.weight': slot 'selector.basis' is str, not a tensor",
    ),
    "unknown slot": (
        lambda saved: spoilt_slot(saved, "exp_avg_qs", torch.zeros(2)),
        "the checkpoint does not fit this optimizer:\n'0.weight': slot 'exp_avg_qs' is unknown here",
    ),
    "spec gone": (
        lambda saved: saved["param_groups"][0].pop("spec"),
        "another optimizer saved this checkpoint: its parameter groups have no `spec`",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupt_checkpoint_changes_nothing(spoil: Callable[[dict[str, Any]], Any], message: str) -> None:
    _, optimizer = trained()
    before, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    with pytest.raises(CheckpointError) as caught:
        optimizer.load_state_dict(saved)
    assert str(caught.value) == message
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, slots in before["state"].items():
        for slot, value in slots.items():
            assert torch.equal(after["state"][key][slot], value)


def test_checkpoint_of_another_spec() -> None:
    saved = trained("muon")[1].state_dict()
    with pytest.raises(CheckpointError) as caught:
        trained("cosmos")[1].load_state_dict(saved)
    assert str(caught.value) == (
        "the checkpoint has spec 'muon' and this optimizer has 'cosmos': pipelines.matrix.complement.0.norm is 'none' there and 'rms' here"
        "; build the optimizer from the checkpoint's spec"
    )
    saved = trained(overrides={"matrix.selector.rank": 3})[1].state_dict()
    with pytest.raises(CheckpointError, match=re.escape("pipelines.matrix.selector.rank is 3 there and 64 here")):
        trained("cosmos")[1].load_state_dict(saved)


def test_gradient_that_is_no_number_changes_nothing() -> None:
    model, optimizer = trained()
    weights = [p.detach().clone() for p in model.parameters()]
    for p, value in zip(model.parameters(), (math.nan, math.inf, -math.inf, math.nan), strict=True):
        assert p.grad is not None
        p.grad[(0,) * p.dim()] = value
    with pytest.raises(NonFiniteGradient) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "the gradient of 0.weight, 0.bias, 1.weight, 1.bias holds NaN or infinity; nothing was changed. Look for its cause, lower lr, "
        "clip, or build with nonfinite='skip' to leave such parameters alone for the step"
    )
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


# --- files of a run, through the command


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, ...]:
    """Finish a run of two updates; return its arguments for `train`."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 40)
    arguments = ("train", "cosmos", "--data", str(text), "--steps", "2", "--length", "16", "--out", str(tmp_path / "run"))
    assert left(capsys, *arguments)[0] == 0
    return arguments


@pytest.mark.slow
def test_checkpoint_cut_short(run: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    status, out, error = left(capsys, *run, "--resume")
    assert (status, out) == (2, "")
    assert error == (
        f"Error: {last} is truncated or damaged and cannot be loaded. Move it away and start the run again: there is no other "
        "checkpoint in this folder\n"
    )
    assert last.stat().st_size == 1000


def test_checkpoint_of_another_run(run: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = tmp_path / "run" / "last.pt"
    before = last.read_bytes()
    status, _, error = left(capsys, run[0], "muon", *run[2:], "--resume")
    assert status == 2
    assert error == (
        f"Error: {last} belongs to another run (spec: 'cosmos' there, 'muon' here). Give the same values to resume it, or "
        "another `out` for a new run\n"
    )
    status, _, error = left(capsys, *run)
    assert status == 2
    assert error == (f"Error: out: {last} belongs to an earlier run. Resume that run, or choose another folder for a new one\n")
    assert last.read_bytes() == before


@pytest.mark.slow
def test_command_in_its_own_process_has_no_traceback() -> None:
    status, out, error = command("show", "cosmos", "--set", "matrix.selector.rank=0")
    assert (status, out) == (2, "")
    assert error == f"Error: override 'matrix.selector.rank': pipelines.matrix.selector.rank: {RANK}0\n"
