"""Reading a spec file: the data, their lines and columns, and the message of each error."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from subspace_opt.spec.document import MAX_BYTES, Document, DocumentError, parse_document, read_document


def refusal(text: str, format: str = "yaml") -> str:
    with pytest.raises(DocumentError) as caught:
        parse_document(text, "s.yaml" if format == "yaml" else "s.json", format)
    return str(caught.value)


# --- data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("-.5", -0.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("3", 3),
        ("-3", -3),
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("arXiv:2502.17410", "arXiv:2502.17410"),
        ("'1e-3'", "1e-3"),
        ('"a\\nb"', "a\nb"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        ("'<<'", "<<"),
        ("[]", []),
        ("{}", {}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_document(f"x: {text}").data["x"]
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number_in_yaml() -> None:
    assert math.isnan(parse_document("x: .nan").data["x"])


def test_json_and_yaml_read_the_same() -> None:
    data = {"a": [1, 2.5, True, None, "é", "\U0001f600", "a/b\t"], "b": {"c": {}}}
    text = json.dumps(data, ensure_ascii=False)
    assert parse_document(text, format="json").data == data
    assert parse_document(text, format="yaml").data == data


def test_file_of_each_ending(tmp_path: Path) -> None:
    for name in ("a.yaml", "a.yml", "a.YAML"):
        (tmp_path / name).write_text("\ufeffversion: 1\r\nname: é\r\n", encoding="utf-8")
        assert read_document(tmp_path / name).data == {"version": 1, "name": "é"}
    (tmp_path / "a.json").write_text('\ufeff{"version": 1}', encoding="utf-8")
    assert read_document(str(tmp_path / "a.json")).data == {"version": 1}


# --- lines and columns

YAML_TEXT = """\
# a comment
version: 1
pipelines:
  matrix:
    selector: {kind: svd, rank: 8}
    inside:
      - kind: ema
        beta: 0.9
      - adam
"""
JSON_TEXT = """\
{
  "version": 1, "name": "{[\\"x\\": ",
  "pipelines": {"matrix": {"inside": [
\t{"kind": "ema"}, "adam"]}}
}
"""


@pytest.mark.parametrize(
    ("path", "position"),
    [
        ((), "2:1"),
        (("version",), "2:1"),
        (("pipelines", "matrix"), "4:3"),
        (("pipelines", "matrix", "selector", "rank"), "5:27"),
        (("pipelines", "matrix", "inside", 0), "7:9"),
        (("pipelines", "matrix", "inside", 0, "beta"), "8:9"),
        (("pipelines", "matrix", "inside", 1), "9:9"),
        (("pipelines", "matrix", "inside", 2), "6:5"),
        (("pipelines", "matrix", "selector", "every", "x"), "5:5"),
        (("nothing", "here"), "2:1"),
    ],
)
def test_locate_in_yaml(path: tuple[str | int, ...], position: str) -> None:
    assert parse_document(YAML_TEXT, "s.yaml").locate(path) == f"s.yaml:{position}"


@pytest.mark.parametrize(
    ("path", "position"),
    [
        ((), "1:1"),
        (("version",), "2:3"),
        (("name",), "2:17"),
        (("pipelines", "matrix", "inside"), "3:28"),
        (("pipelines", "matrix", "inside", 0, "kind"), "4:3"),
        (("pipelines", "matrix", "inside", 1), "4:19"),
    ],
)
def test_locate_in_json(path: tuple[str | int, ...], position: str) -> None:
    assert parse_document(JSON_TEXT, "s.json", "json").locate(path) == f"s.json:{position}"


def test_locate_without_positions_names_the_source() -> None:
    assert Document({"a": 1}, "<mapping>").locate(("a",)) == "<mapping>"


# --- error messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "s.yaml: the file is empty, but a spec is a mapping; start with `version: 1` and `pipelines:`"),
        ("# nothing\n---\n", "s.yaml: the file is empty, but a spec is a mapping; start with `version: 1` and `pipelines:`"),
        (
            "\n- 1\n",
            "s.yaml:2:1: found a list, but a spec is a mapping; start with `version: 1` and `pipelines:`",
        ),
        (
            "cosmos",
            "s.yaml:1:1: found the value 'cosmos', but a spec is a mapping; start with `version: 1` and `pipelines:`",
        ),
        ("lr: 1\nwd: 0\nlr: 2\n", "s.yaml:3:1: the key 'lr' is given twice, first on line 1; keep one of the two"),
        ("a: {b: 1,\n 'b': 2}\n", "s.yaml:2:2: the key 'b' is given twice, first on line 1; keep one of the two"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "s.yaml:1:4: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed: "
            "a spec holds plain data, never objects; remove the tag",
        ),
        (
            "a: !!int 3",
            "s.yaml:1:4: the tag 'tag:yaml.org,2002:int' is not allowed: a spec holds plain data, never objects; remove the tag",
        ),
        ("a: !x {}", "s.yaml:1:4: the tag '!x' is not allowed: a spec holds plain data, never objects; remove the tag"),
        (
            "a: &x {b: 1}\nc: *x",
            "s.yaml:1:4: the anchor '&x' is not allowed; remove it and repeat the value wherever it is used",
        ),
        ("a: *x", "s.yaml:1:4: the alias '*x' is not allowed; write the value itself here"),
        ("a:\n  <<: {b: 1}", "s.yaml:2:3: the merge key `<<` is not allowed; write the merged entries themselves here"),
        ("a: 1\n---\nb: 2", "s.yaml:2:1: a second YAML document starts here; put each spec into a file of its own"),
        (
            "%YAML 1.1\n---\na: no",
            "s.yaml:2:1: a % directive before this line is not allowed: a spec is read as YAML 1.2; remove the directive",
        ),
        ("1: a", "s.yaml:1:1: the key 1 is not text; put it in quotes"),
        ("True: a", "s.yaml:1:1: the key true is not text; put it in quotes"),
        ("? \n: a", "s.yaml:1:2: the key null is not text; put it in quotes"),
        ("[a]: 1", "s.yaml:1:1: found a list as a key; a key must be text"),
        ("{a: 1}: 1", "s.yaml:1:1: found a mapping as a key; a key must be text"),
        ("a:\n\tb: 1", "s.yaml:2:1: a tab is not allowed here; replace it with spaces"),
        ("a: b: c", "s.yaml:1:5: not YAML: mapping values are not allowed here"),
        (
            "a: [1,\n",
            "s.yaml:2:1: not YAML: while parsing a flow node, expected the node content, but found '<stream end>'",
        ),
        ("a: 'x", "s.yaml:1:6: not YAML: while scanning a quoted scalar, found unexpected end of stream"),
        ("a: 1\nb: \x01", "s.yaml:2:4: the character '\\x01' is not allowed in YAML; remove it"),
        ('a: "\\ud800"', "s.yaml:1:4: half of a surrogate pair is not a character; write the character itself"),
        ("a: " + "1" * 5000, "s.yaml:1:4: a number of 5,000 characters; write one of at most 100"),
        (
            "k" * 500 + ": 1\n" + "k" * 500 + ": 1\n",
            f"s.yaml:2:1: the key '{'k' * 116}... is given twice, first on line 1; keep one of the two",
        ),
    ],
)
def test_refused_yaml(text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "s.json: the file is empty, but a spec is a mapping; start with `version: 1` and `pipelines:`"),
        ("null", "s.json: the file is empty, but a spec is a mapping; start with `version: 1` and `pipelines:`"),
        ("[{}]", "s.json:1:1: found a list, but a spec is a mapping; start with `version: 1` and `pipelines:`"),
        (
            "false",
            "s.json:1:1: found the value false, but a spec is a mapping; start with `version: 1` and `pipelines:`",
        ),
        ('{"a": 1,\n "\\u0061": 2}', "s.json:2:2: the key 'a' is given twice, first on line 1; keep one of the two"),
        ('{"a" 1}', "s.json:1:6: not JSON: Expecting ':' delimiter"),
        ("{'a': 1}", "s.json:1:2: not JSON: Expecting property name enclosed in double quotes"),
        ('{"a": 1}\n{}', "s.json:2:1: not JSON: Extra data"),
        ('{"a": "\t"}', "s.json:1:8: not JSON: Invalid control character at"),
        ('{"a": NaN}', "s.json:1:7: NaN is not JSON; write a finite number"),
        ('{"a": [1,\n-Infinity]}', "s.json:2:1: -Infinity is not JSON; write a finite number"),
        (
            '{"a": "\\ud800"}',
            "s.json:1:7: half of a surrogate pair is not a character; write the character itself",
        ),
        ('{"a": ' + "1" * 5000 + "}", "s.json:1:7: a number of 5,000 characters; write one of at most 100"),
    ],
)
def test_refused_json(text: str, message: str) -> None:
    assert refusal(text, "json") == message


DEEP = "nested more than 40 levels deep; a spec needs about six levels, so flatten it"
MANY = "more than 20,000 values; a spec has a few dozen, so check that this is the right file"


@pytest.mark.parametrize(
    ("text", "format", "message"),
    [
        ("a: " + "[" * 200_000, "yaml", f"s.yaml:1:43: {DEEP}"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "yaml", f"s.yaml:1:43: {DEEP}"),
        ("{a: " * 60_000, "yaml", f"s.yaml:1:161: {DEEP}"),
        ("- " * 120_000, "yaml", f"s.yaml:1:81: {DEEP}"),
        ("? " * 120_000, "yaml", "s.yaml:1:3: found a mapping as a key; a key must be text"),
        ("a: [" + "1," * 120_000 + "]", "yaml", f"s.yaml:1:40003: {MANY}"),
        ("---\n" * 60_000, "yaml", "s.yaml:2:1: a second YAML document starts here; put each spec into a file of its own"),
        (
            "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
            "yaml",
            "s.yaml:1:5: the anchor '&a0' is not allowed; remove it and repeat the value wherever it is used",
        ),
        ('{"a": ' + "[" * 200_000, "json", f"s.json:1:46: {DEEP}"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "json", f"s.json:1:46: {DEEP}"),
        ('{"a": [' + "1," * 100_000 + "1]}", "json", f"s.json:1:40006: {MANY}"),
        ('{"a": "' + '\\"' * 120_000, "json", "s.json:1:7: not JSON: Unterminated string starting at"),
        (
            "[" * 1_000_000,
            "yaml",
            "s.yaml: larger than 256 kB; a spec has a few kB, so check that this is the right file",
        ),
        (
            "[" * 1_000_000,
            "json",
            "s.json: larger than 256 kB; a spec has a few kB, so check that this is the right file",
        ),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_a_hostile_text_is_refused_quickly(text: str, format: str, message: str) -> None:
    start = time.process_time()
    assert refusal(text, format) == message
    assert time.process_time() - start < 4  # CPU seconds; the slowest text takes about one on an idle machine


def test_depth_of_exactly_the_limit_is_read() -> None:
    document = parse_document("a: " + "[" * 39 + "]" * 39)
    assert len(document.positions) == 2 + 38


def test_refused_files(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(DocumentError) as caught:
            read_document(path)
        return str(caught.value)

    (tmp_path / "cosmos.yaml").write_text("version: 1")
    missing = tmp_path / "cosmo.yaml"
    assert message(missing) == f"{missing}: no such file; did you mean 'cosmos.yaml'?"
    assert message(tmp_path / "zzz") == f"{tmp_path / 'zzz'}: no such file; check the path"
    lost = tmp_path / "no" / "cosmos.yaml"
    assert message(lost) == f"{lost}: no such file, and no folder {str(lost.parent)!r}; check the path"
    assert message(tmp_path) == f"{tmp_path}: a directory; give a .yaml, .yml or .json file"

    other, bare = tmp_path / "s.toml", tmp_path / "s"
    for path, what in ((other, "the ending '.toml' is neither YAML nor JSON"), (bare, "the file name has no ending")):
        path.write_text("")
        remedy = "rename the file to .yaml, .yml or .json"
        assert message(path) == f"{path}: {what}; {remedy}"

    big = tmp_path / "big.yaml"
    big.write_bytes(b"a" * (MAX_BYTES + 1))
    assert message(big) == f"{big}: larger than 256 kB; a spec has a few kB, so check that this is the right file"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("version: 1\nname: é\n".encode("latin-1"))
    assert message(latin) == f"{latin}:2:7: the byte 0xe9 is not UTF-8; save the file as UTF-8"
    wide = tmp_path / "wide.yaml"
    wide.write_bytes("version: 1".encode("utf-16"))
    assert message(wide) == f"{wide}:1:1: the byte 0xff is not UTF-8; save the file as UTF-8"
    assert message(Path("a\0b.yaml")) == "'a\\x00b.yaml': not a path on this system; check its characters"


def test_a_fifo_and_a_device_are_refused_without_opening_them(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(DocumentError, match=r": not a regular file; give a \.yaml, \.yml or \.json file$"):
            read_document(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("version: 1")
    secret.chmod(0)
    with pytest.raises(DocumentError, match=r"cannot be read .Permission denied.; check the path and its permissions"):
        read_document(secret)


def test_nothing_is_executed(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    refusal(f"a: !!python/object/apply:os.system ['touch {witness}']")
    refusal(f"!!python/object/apply:os.system ['touch {witness}']")
    assert not witness.exists()


# --- any text

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(TEXT, VALUES, max_size=5)


def same(a: object, b: object) -> bool:
    return repr(a) == repr(b)  # distinguishes 1, 1.0 and True, which are equal by ==


@given(MAPPINGS)
def test_yaml_round_trip(data: dict[str, object]) -> None:
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False  # ruamel does not read back what it writes for the key `??` in braces
    yaml.dump(data, stream)
    assert same(sort(parse_document(stream.getvalue()).data), sort(data))


@given(MAPPINGS, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_json_round_trip(data: dict[str, object], indent: int | str | None, escaped: bool) -> None:
    data = finite(data)
    text = json.dumps(data, indent=indent, ensure_ascii=escaped)
    document = parse_document(text, format="json")
    assert same(document.data, data)
    lines = text.split("\n")
    for path, (line, column) in document.positions.items():
        if path and isinstance(path[-1], str):
            assert lines[line - 1][column - 1 :].startswith(json.dumps(path[-1], ensure_ascii=escaped))


@given(st.text(st.sampled_from("ab1 -?:,[]{}#&*!|>'\"%@`\n\t<.~\\"), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for format in ("yaml", "json"):
        message, positions = "", {}
        try:
            positions = parse_document(text, "s", format).positions
        except DocumentError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 300
        assert all(line >= 1 and column >= 1 for line, column in positions.values())


def sort(value: object) -> object:
    """Sort keys, because the safe dumper sorts them."""
    if isinstance(value, dict):
        return {key: sort(value[key]) for key in sorted(value)}
    return [sort(item) for item in value] if isinstance(value, list) else value


def finite(value: object) -> object:
    """True if no number is infinite: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return 0.0 if value in (math.inf, -math.inf) else value
