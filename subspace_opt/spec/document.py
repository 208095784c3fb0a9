"""A spec file as plain data that remembers the position of each value.

A spec may come from a colleague, a hub or a pull request, so the file is untrusted. Its size is checked before it is parsed. Reading it
yields dicts, lists, text, numbers, booleans and nulls, and never constructs any other object. `syntax` turns YAML and JSON into one flat
stream of events; the builder here turns the stream into data without recursion, and stops at the first event that breaks a limit.
"""

from __future__ import annotations

import difflib
import itertools
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .syntax import DocumentError, Event, json_events, refuse, shorten, yaml_events

__all__ = ["Document", "DocumentError", "parse_document", "read_document"]

MAX_BYTES = 256 * 1000
MAX_DEPTH = 40
MAX_NODES = 20_000

FORMATS: dict[str, Literal["yaml", "json"]] = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}


@dataclass(frozen=True)
class Document:
    """Plain data, the name of its file, and the position of every entry as (line, column)."""

    data: dict[str, Any]
    source: str
    positions: dict[tuple[str | int, ...], tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def locate(self, path: tuple[str | int, ...]) -> str:
        """`file:line:column` of the deepest existing entry on `path`: the position of its key, or of the item of a list."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.positions:
                line, column = self.positions[path[:length]]
                return f"{self.source}:{line}:{column}"
        return self.source


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read a `.yaml`, `.yml` or `.json` file.

    Raises:
        DocumentError: the path is not a regular file of at most 256 kB of UTF-8, or `parse_document` refuses its text.
    """
    file = Path(path)
    source = str(file) if str(file).isprintable() else ascii(str(file))
    try:
        # Checked before opening: opening a FIFO waits for a writer, and opening a device may have any effect.
        if not stat.S_ISREG(file.stat().st_mode):
            what = "a directory" if file.is_dir() else "not a regular file"
            raise DocumentError(f"{source}: {what}; give a .yaml, .yml or .json file")
        if file.suffix.lower() not in FORMATS:
            what = f"the ending {shorten(file.suffix)} is neither YAML nor JSON" if file.suffix else "the file name has no ending"
            raise DocumentError(f"{source}: {what}; rename the file to .yaml, .yml or .json")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DocumentError(f"{source}: no such file{_near(file)}") from None
    except OSError as error:
        raise DocumentError(f"{source}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except DocumentError:
        raise
    except ValueError:  # a null character, or half of a surrogate pair
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
    """Parse the text of a spec. Error messages name it by `source`.

    Raises:
        DocumentError: a syntax error, data that is not one mapping of plain values, or data that exceeds a limit.
    """
    text = text.removeprefix("\ufeff")
    _check_size(len(text.encode(errors="surrogatepass")), source)
    events = yaml_events(text, source) if format == "yaml" else json_events(text, source)
    return _build(events, source)


@dataclass
class _Container:
    """A mapping or list that is still open, its path, and the key whose value comes next."""

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


class _Builder:
    """Builds plain data from events."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.root: Any = None
        self.positions: dict[tuple[str | int, ...], tuple[int, int]] = {}
        self._open: list[_Container] = []

    def take(self, event: Event) -> None:
        """Add one event to the data."""
        if event.kind == "end":
            self._open.pop()
            return
        if len(self.positions) > MAX_NODES:
            refuse(self.source, event, f"more than {MAX_NODES:,} values; a spec has a few dozen, so check that this is the right file")
        if isinstance(event.value, str) and not _encodable(event.value):
            refuse(self.source, event, "half of a surrogate pair is not a character; write the character itself")
        parent = self._open[-1] if self._open else None
        if parent and parent.wants_key:
            self._take_key(event, parent)
        else:
            self._take_node(event, parent)

    def _take_key(self, event: Event, parent: _Container) -> None:
        parent.key = _key(event, self.source)
        path = parent.next_path()
        if path in self.positions:
            first = self.positions[path][0]
            refuse(self.source, event, f"the key {shorten(parent.key)} is given twice, first on line {first}; keep one of the two")
        # The position of an entry is that of its key, because a reader looks for the key.
        self.positions[path] = (event.line, event.column)

    def _take_node(self, event: Event, parent: _Container | None) -> None:
        path = parent.next_path() if parent else ()
        self.positions.setdefault(path, (event.line, event.column))
        node: Any = {} if event.kind == "mapping" else [] if event.kind == "list" else event.value
        if parent:
            parent.add(node)
        else:
            self.root = node
        if event.kind != "value":
            if len(self._open) == MAX_DEPTH:
                refuse(self.source, event, f"nested more than {MAX_DEPTH} levels deep; a spec needs about six levels, so flatten it")
            self._open.append(_Container(node, path))

    def document(self) -> Document:
        """The finished document, whose root must be a mapping."""
        remedy = "start with `version: 1` and `pipelines:`"
        if self.root is None:
            raise DocumentError(f"{self.source}: the file is empty, but a spec is a mapping; {remedy}")
        if not isinstance(self.root, dict):
            line, column = self.positions[()]
            what = "a list" if isinstance(self.root, list) else f"the value {_show(self.root)}"
            raise DocumentError(f"{self.source}:{line}:{column}: found {what}, but a spec is a mapping; {remedy}")
        return Document(self.root, self.source, self.positions)


def _build(events: Iterable[Event], source: str) -> Document:
    builder = _Builder(source)
    for event in events:
        builder.take(event)
    return builder.document()


def _key(event: Event, source: str) -> str:
    if event.kind != "value":
        refuse(source, event, f"found a {event.kind} as a key; a key must be text")
    if not isinstance(event.value, str):
        refuse(source, event, f"the key {_show(event.value)} is not text; put it in quotes")
    return event.value


def _check_size(size: int, source: str) -> None:
    if size > MAX_BYTES:
        raise DocumentError(f"{source}: larger than {MAX_BYTES // 1000} kB; a spec has a few kB, so check that this is the right file")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _near(file: Path) -> str:
    """The end of the message for a missing file: a file with a similar name, or the folder that is missing."""
    try:
        with os.scandir(file.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, 10_000)]
    except OSError:
        return f", and no folder {shorten(str(file.parent))}; check the path"
    matches = difflib.get_close_matches(file.name, names, n=1)
    return f"; did you mean {shorten(matches[0])}?" if matches else "; check the path"


def _show(value: object) -> str:
    """A scalar in the spelling of the file."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else shorten(value)
