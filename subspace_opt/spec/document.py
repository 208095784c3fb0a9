"""A spec file as plain data that remembers where each value stood.

A spec may come from a colleague, a hub or a pull request, so the file is untrusted: it is bounded before it is parsed,
and reading it yields dicts, lists, text, numbers, booleans and nulls, never an object that something constructed.
YAML and JSON both become one flat stream of events, and one builder turns the stream into data without recursion. So
depth, size and duplicate keys are checked once for both, and an early stop is a plain `raise`.

YAML is read as version 1.2, where `no` and `on` are text and `1e-3` is a number.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

__all__ = ["Document", "DocumentError", "parse_document", "read_document"]

MAX_BYTES = 256 * 1000
MAX_DEPTH = 40
MAX_NODES = 20_000
MAX_NUMBER = 100  # characters; Python itself needs quadratic time for the decimal digits of a huge integer

FORMATS: dict[str, Literal["yaml", "json"]] = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}

# The scalars of the YAML 1.2 core schema; whatever matches none of them is text.
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s"\[\]{}:,]+')
_JSON_LITERAL = {"true": True, "false": False, "null": None}


class DocumentError(ValueError):
    """The file cannot be read as a spec. The message is complete: where, what, why and what to do."""


@dataclass(frozen=True)
class Document:
    """Plain data, the name of the file it came from, and the position of every entry."""

    data: dict[str, Any]
    source: str
    positions: dict[tuple[str | int, ...], tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def locate(self, path: tuple[str | int, ...]) -> str:
        """`file:line:column` of the deepest entry on `path` that exists: of its key, or of the item of a list."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.positions:
                line, column = self.positions[path[:length]]
                return f"{self.source}:{line}:{column}"
        return self.source


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read a `.yaml`, `.yml` or `.json` file.

    Raises DocumentError if it is no regular file of at most 256 kB of UTF-8, or if `parse_document` refuses its text.
    """
    file = Path(path)
    source = str(file) if str(file).isprintable() else ascii(str(file))
    try:
        # Looked at before it is opened: opening a FIFO waits for a writer, and opening a device may do anything.
        if not stat.S_ISREG(file.stat().st_mode):
            what = "a directory" if file.is_dir() else "not a regular file"
            raise DocumentError(f"{source}: {what}; name a .yaml, .yml or .json file")
        if file.suffix.lower() not in FORMATS:
            what = f"the ending {_short(file.suffix)}" if file.suffix else "no ending"
            raise DocumentError(f"{source}: {what} tells neither YAML nor JSON; rename the file to .yaml, .yml or .json")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DocumentError(f"{source}: no such file{_near(file)}") from None
    except OSError as error:
        raise DocumentError(f"{source}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except DocumentError:
        raise
    except ValueError:  # a null character, half a surrogate pair
        raise DocumentError(f"{source}: not a path on this system; check its characters") from None
    _check_size(len(raw), source)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise DocumentError(f"{source}:{line}:{column}: the byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    return parse_document(text, source, FORMATS[file.suffix.lower()])


def parse_document(text: str, source: str = "<string>", format: Literal["yaml", "json"] = "yaml") -> Document:
    """Parse the text of a spec; `source` is what error messages call it.

    Raises DocumentError on a syntax error, on anything but one mapping of plain data, and on too much of it.
    """
    text = text.removeprefix("\ufeff")
    _check_size(len(text.encode(errors="surrogatepass")), source)
    events = _yaml_events(text, source) if format == "yaml" else _json_events(text, source)
    return _build(events, source)


class _Event(NamedTuple):
    kind: Literal["mapping", "list", "end", "value"]
    value: str | int | float | bool | None
    line: int
    column: int


@dataclass
class _Frame:
    """A container that is still open, where it stands, and the key that waits for its value."""

    container: dict[str, Any] | list[Any]
    path: tuple[str | int, ...]
    key: str | None = None

    @property
    def wants_key(self) -> bool:
        return isinstance(self.container, dict) and self.key is None

    def next_path(self) -> tuple[str | int, ...]:
        return (*self.path, len(self.container) if self.key is None else self.key)

    def add(self, node: object) -> None:
        if isinstance(self.container, list):
            self.container.append(node)
        elif self.key is not None:
            self.container[self.key] = node
            self.key = None


def _build(events: Iterable[_Event], source: str) -> Document:
    positions: dict[tuple[str | int, ...], tuple[int, int]] = {}
    root: Any = None
    frames: list[_Frame] = []
    for event in events:
        if event.kind == "end":
            frames.pop()
            continue
        if len(positions) > MAX_NODES:
            _refuse(source, event, f"more than {MAX_NODES:,} values; a spec has some dozens, so is this the right file?")
        if isinstance(event.value, str) and not _encodable(event.value):
            _refuse(source, event, "half of a surrogate pair is not a character; write the character itself")
        frame = frames[-1] if frames else None
        if frame and frame.wants_key:
            frame.key = _key(event, source)
            path = frame.next_path()
            if path in positions:
                first = positions[path][0]
                _refuse(source, event, f"the key {_short(frame.key)} stands here and on line {first}; keep one of the two")
            # An entry of a mapping stands where its key stands: that is where a reader looks for it.
            positions[path] = (event.line, event.column)
            continue

        path = frame.next_path() if frame else ()
        positions.setdefault(path, (event.line, event.column))
        node: Any = {} if event.kind == "mapping" else [] if event.kind == "list" else event.value
        if frame:
            frame.add(node)
        else:
            root = node
        if event.kind != "value":
            if len(frames) == MAX_DEPTH:
                _refuse(source, event, f"nested more than {MAX_DEPTH} levels deep; a spec needs a handful, so flatten it")
            frames.append(_Frame(node, path))

    if root is None:
        raise DocumentError(f"{source}: empty, where a mapping belongs; start with `version: 1` and `pipelines:`")
    if not isinstance(root, dict):
        line, column = positions[()]
        what = "a list" if isinstance(root, list) else f"the plain value {_show(root)}"
        raise DocumentError(f"{source}:{line}:{column}: {what} where a mapping belongs; start with `version: 1` and `pipelines:`")
    return Document(root, source, positions)


def _key(event: _Event, source: str) -> str:
    if event.kind != "value":
        _refuse(source, event, f"a {event.kind} where a key belongs; a key is text")
    if not isinstance(event.value, str):
        _refuse(source, event, f"the key {_show(event.value)} is not text; put it in quotes")
    return event.value


def _yaml_events(text: str, source: str) -> Iterator[_Event]:
    documents = 0
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            mark = event.start_mark
            here = _Event("value", None, mark.line + 1, mark.column + 1)
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    _refuse(source, here, "a second document; a spec is one, so put each in a file of its own")
                if event.version or event.tags:
                    _refuse(source, here, "a % directive before this line; a spec is YAML 1.2 as it is, so remove it")
            elif isinstance(event, NodeEvent):
                if isinstance(event, AliasEvent):
                    _refuse(source, here, f"the alias {_short('*' + event.anchor)}; write the value itself here")
                if event.anchor is not None:
                    anchor = _short("&" + event.anchor)
                    _refuse(source, here, f"the anchor {anchor}; remove it and write the value at each place of its use")
                if (tag := getattr(event, "tag", None)) is not None:
                    _refuse(source, here, f"the tag {_short(str(tag))}; a spec is plain data, never objects, so remove it")
                if isinstance(event, MappingStartEvent):
                    yield here._replace(kind="mapping")
                elif isinstance(event, SequenceStartEvent):
                    yield here._replace(kind="list")
                elif isinstance(event, ScalarEvent):
                    yield here._replace(value=_yaml_scalar(event, here, source))
            elif isinstance(event, MappingEndEvent | SequenceEndEvent):
                yield here._replace(kind="end")
    except ReaderError as error:
        before = text[: error.position]
        here = _Event("value", None, before.count("\n") + 1, error.position - before.rfind("\n"))
        _refuse(source, here, f"the character {_short(text[error.position])} is not allowed in YAML; remove it")
    except MarkedYAMLError as error:
        problem = error.problem or "a syntax error"
        mark = error.problem_mark or error.context_mark
        here = _Event("value", None, mark.line + 1, mark.column + 1)
        if "'\\t'" in problem:
            _refuse(source, here, "a tab, where YAML allows only spaces; replace it by spaces")
        context = f"{error.context}, " if error.context else ""
        _refuse(source, here, f"not YAML: {_cut(' '.join((context + problem).split()))}")


def _yaml_scalar(event: ScalarEvent, here: _Event, source: str) -> str | int | float | bool | None:
    text: str = event.value
    if event.style:  # quoted, or a block
        return text
    if text == "<<":
        _refuse(source, here, "a merge key (<<); write the merged entries themselves here")
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        _check_number(text, here, source)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if _FLOAT.fullmatch(text):
        _check_number(text, here, source)
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _json_events(text: str, source: str) -> Iterator[_Event]:
    """Python's own parser decides what is JSON; what it accepts, a regular expression may cut into tokens."""
    try:
        json.loads(text, parse_int=str)
    except json.JSONDecodeError as error:
        if not text.strip():
            return
        _refuse(source, _Event("value", None, error.lineno, error.colno), f"not JSON: {error.msg}")
    except RecursionError:
        yield from _json_tokens(text, source)  # meets the depth limit within the part that was found valid
        raise
    yield from _json_tokens(text, source)


def _json_tokens(text: str, source: str) -> Iterator[_Event]:
    line, line_start, scanned = 1, 0, 0
    for match in _JSON_TOKEN.finditer(text):
        token, start = match.group(), match.start()
        line += text.count("\n", scanned, start)
        line_start = max(line_start, text.rfind("\n", scanned, start) + 1)
        scanned = match.end()
        here = _Event("value", None, line, start - line_start + 1)
        if token == "{":
            yield here._replace(kind="mapping")
        elif token == "[":
            yield here._replace(kind="list")
        elif token in "}]":
            yield here._replace(kind="end")
        elif token in _JSON_LITERAL:
            yield here._replace(value=_JSON_LITERAL[token])
        elif token in ("NaN", "Infinity", "-Infinity"):
            _refuse(source, here, f"{token} is not JSON; write a finite number")
        elif token[0] == '"':
            yield here._replace(value=json.loads(token))
        else:
            _check_number(token, here, source)
            yield here._replace(value=json.loads(token))


def _check_size(size: int, source: str) -> None:
    if size > MAX_BYTES:
        raise DocumentError(f"{source}: larger than {MAX_BYTES // 1000} kB; a spec is a few kB, so is this the right file?")


def _check_number(text: str, here: _Event, source: str) -> None:
    if len(text) > MAX_NUMBER:
        _refuse(source, here, f"a number of {len(text):,} characters; write one of at most {MAX_NUMBER}")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _near(file: Path) -> str:
    """What to do about a file that is not there: a sibling of almost that name, or the missing folder."""
    try:
        with os.scandir(file.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, 10_000)]
    except OSError:
        return f"; there is no folder {_short(str(file.parent))} either"
    matches = difflib.get_close_matches(file.name, names, n=1)
    return f"; did you mean {_short(matches[0])}?" if matches else "; check the path"


def _show(value: object) -> str:
    """A scalar as the file spells it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else _short(value)


def _short(value: object) -> str:
    """The value in quotes for a message: on one line, printable, and never the whole of a long one."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _refuse(source: str, here: _Event, message: str) -> NoReturn:
    raise DocumentError(f"{source}:{here.line}:{here.column}: {message}") from None
