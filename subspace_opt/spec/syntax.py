"""The syntax of a spec file: text becomes one flat stream of events.

YAML and JSON give the same events, so the limits on depth, size and duplicate keys are checked once, by the reader of the stream. YAML is
read as version 1.2, where `no` and `on` are text and `1e-3` is a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, NoReturn

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
)
from ruamel.yaml.reader import ReaderError

__all__ = ["DocumentError", "Event", "json_events", "refuse", "shorten", "yaml_events"]

MAX_NUMBER = 100  # characters: Python needs quadratic time to convert the decimal digits of a huge integer

# The scalars of the YAML 1.2 core schema. A scalar that matches none of them is text.
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s"\[\]{}:,]+')
_JSON_LITERAL = {"true": True, "false": False, "null": None}


class DocumentError(ValueError):
    """The file cannot be read as a spec. The message says where, what was found, what is allowed and what to do."""


class Event(NamedTuple):
    """The start of a mapping or list, the end of one, or a value; with its line and column, both counted from 1."""

    kind: Literal["mapping", "list", "end", "value"]
    value: str | int | float | bool | None
    line: int
    column: int


def yaml_events(text: str, source: str) -> Iterator[Event]:
    """The events of a YAML text.

    Raises:
        DocumentError: a syntax error, an anchor, alias, tag, merge key or directive, or a second document.
    """
    documents = 0
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            mark = event.start_mark
            here = Event("value", None, mark.line + 1, mark.column + 1)
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    refuse(source, here, "a second YAML document starts here; put each spec into a file of its own")
                if event.version or event.tags:
                    refuse(source, here, "a % directive before this line is not allowed: a spec is read as YAML 1.2; remove the directive")
            elif isinstance(event, NodeEvent):
                yield _node(event, here, source)
            elif isinstance(event, MappingEndEvent | SequenceEndEvent):
                yield here._replace(kind="end")
    except ReaderError as error:
        before = text[: error.position]
        here = Event("value", None, before.count("\n") + 1, error.position - before.rfind("\n"))
        refuse(source, here, f"the character {shorten(text[error.position])} is not allowed in YAML; remove it")
    except MarkedYAMLError as error:
        problem = error.problem or "a syntax error"
        mark = error.problem_mark or error.context_mark
        here = Event("value", None, mark.line + 1, mark.column + 1)
        if "'\\t'" in problem:
            refuse(source, here, "a tab is not allowed here; replace it with spaces")
        context = f"{error.context}, " if error.context else ""
        refuse(source, here, f"not YAML: {_cut(' '.join((context + problem).split()))}")


def _node(event: NodeEvent, here: Event, source: str) -> Event:
    """The event of a mapping, list or scalar; anchors, aliases and tags are refused."""
    if isinstance(event, AliasEvent):
        refuse(source, here, f"the alias {shorten('*' + event.anchor)} is not allowed; write the value itself here")
    if event.anchor is not None:
        refuse(source, here, f"the anchor {shorten('&' + event.anchor)} is not allowed; remove it and repeat the value wherever it is used")
    if (tag := getattr(event, "tag", None)) is not None:
        refuse(source, here, f"the tag {shorten(str(tag))} is not allowed: a spec holds plain data, never objects; remove the tag")
    if isinstance(event, ScalarEvent):
        return here._replace(value=_yaml_scalar(event, here, source))
    return here._replace(kind="mapping" if isinstance(event, MappingStartEvent) else "list")


def _yaml_scalar(event: ScalarEvent, here: Event, source: str) -> str | int | float | bool | None:
    text: str = event.value
    if event.style:  # quoted, or a block
        return text
    if text == "<<":
        refuse(source, here, "the merge key `<<` is not allowed; write the merged entries themselves here")
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


def json_events(text: str, source: str) -> Iterator[Event]:
    """The events of a JSON text. Python's own parser validates the text, so that a simple regular expression may cut it into tokens.

    Raises:
        DocumentError: a syntax error, `NaN` or an infinity.
    """
    try:
        json.loads(text, parse_int=str)
    except json.JSONDecodeError as error:
        if not text.strip():
            return
        refuse(source, Event("value", None, error.lineno, error.colno), f"not JSON: {error.msg}")
    except RecursionError:
        yield from _json_tokens(text, source)  # the reader reaches its depth limit within the part that is valid
        raise
    yield from _json_tokens(text, source)


def _json_tokens(text: str, source: str) -> Iterator[Event]:
    line, line_start, scanned = 1, 0, 0
    for match in _JSON_TOKEN.finditer(text):
        token, start = match.group(), match.start()
        line += text.count("\n", scanned, start)
        line_start = max(line_start, text.rfind("\n", scanned, start) + 1)
        scanned = match.end()
        here = Event("value", None, line, start - line_start + 1)
        if token == "{":
            yield here._replace(kind="mapping")
        elif token == "[":
            yield here._replace(kind="list")
        elif token in "}]":
            yield here._replace(kind="end")
        elif token in _JSON_LITERAL:
            yield here._replace(value=_JSON_LITERAL[token])
        elif token in ("NaN", "Infinity", "-Infinity"):
            refuse(source, here, f"{token} is not JSON; write a finite number")
        elif token[0] == '"':
            yield here._replace(value=json.loads(token))
        else:
            _check_number(token, here, source)
            yield here._replace(value=json.loads(token))


def _check_number(text: str, here: Event, source: str) -> None:
    if len(text) > MAX_NUMBER:
        refuse(source, here, f"a number of {len(text):,} characters; write one of at most {MAX_NUMBER}")


def refuse(source: str, here: Event, message: str) -> NoReturn:
    """Raise a DocumentError that starts with `file:line:column`."""
    raise DocumentError(f"{source}:{here.line}:{here.column}: {message}") from None


def shorten(value: object) -> str:
    """The value in quotes for a message: one printable line, cut to 120 characters."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
