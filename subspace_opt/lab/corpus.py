"""Text to bytes: a corpus that every machine with Python already has, and batches that need no iterator state.

A token is a byte, so there is no tokenizer to download and `bits per byte` can be compared between any two runs on the
same text. A batch is a pure function of (seed, step): a run resumes by asking for the next step, and two optimizers see
the same windows in the same order because they ask the same question.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import LabError

VOCAB_SIZE = 256
VALIDATION_SHARE = 0.05
MAX_BYTES = 64 * 2**20
END_OF_FILE = b"\0"  # cannot occur inside a file: one that holds a NUL counts as binary and is left out

# Distributions differ in whether they ship the tests, so leaving them out makes the default text alike everywhere.
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class _File(NamedTuple):
    name: str  # relative to the folder that was asked for: the split must not depend on where that folder lies
    path: Path
    size: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """Two byte strings, one to train on and one to validate on, cut from text files.

    Whole files go to one side or the other, chosen by a hash of the file's relative path, so that the same files give
    the same split on every machine. With too few files for that, the last part of every file is the validation text.
    """

    train: Tensor  # uint8
    validation: Tensor  # uint8
    source: str
    files: int
    skipped: tuple[str, ...]  # "name: why"
    fingerprint: str  # of the bytes themselves: a checkpoint is refused on another text

    @classmethod
    def load(cls, paths: Sequence[str | Path] = (), *, max_bytes: int = MAX_BYTES) -> Corpus:
        """Read files and folders, or without any the Python standard library's own source.

        Raises LabError for a path that is not there, a folder without text, or text too short to split.
        """
        source = ", ".join(map(str, paths)) or "the Python standard library"
        found = _within(list(_find(paths) if paths else _standard_library()), max_bytes)
        texts: list[tuple[str, bytes]] = []
        skipped: list[str] = []
        for file in found:
            text = _read(file, max_bytes)
            if isinstance(text, str):
                skipped.append(f"{file.name}: {text}")
            elif text:
                texts.append((file.name, text))
        if not texts:
            why = f"; left out: {', '.join(skipped[:3])}" if skipped else ""
            raise LabError(f"data: no text in {source}{why}. Name a text file, or a folder that holds UTF-8 text files")
        train, validation = _split(texts)
        digest = blake2b(train + END_OF_FILE + validation, digest_size=16).hexdigest()
        return cls(_tensor(train), _tensor(validation), source, len(texts), tuple(skipped), digest)

    def batch(self, step: int, batch_size: int, length: int, seed: int) -> Tensor:
        """The windows of one step: `length` predictions need `length + 1` bytes.

        Raises LabError where the training text is shorter than one window.
        """
        starts = self._last_start(self.train, length, "training") + 1
        generator = torch.Generator().manual_seed(_number(f"{seed}/{step}") >> 1)  # private: never the global one
        return _windows(self.train, torch.randint(starts, (batch_size,), generator=generator), length)

    def validation_windows(self, count: int, length: int) -> Tensor:
        """The same `count` windows every time, spread evenly over the validation text (fewer where it is short).

        Raises LabError where the validation text is shorter than one window.
        """
        last = self._last_start(self.validation, length, "validation")
        count = min(count, last // (length + 1) + 1)
        return _windows(self.validation, torch.linspace(0, last, count, dtype=torch.float64).long(), length)

    def describe(self) -> str:
        """One line for a person: how much text, from where, what was left out."""
        left_out = f", {len(self.skipped)} left out ({self.skipped[0]})" if self.skipped else ""
        sizes = f"{self.train.numel() / 1e6:.1f} MB to train, {self.validation.numel() / 1e6:.2f} MB to validate"
        return f"{self.source}: {self.files} files, {sizes}{left_out}"

    def _last_start(self, text: Tensor, length: int, side: str) -> int:
        last = text.numel() - (length + 1)
        if last < 0:
            raise LabError(
                f"data: the {side} text of {self.source} has {text.numel()} bytes, but length {length} needs at least "
                f"{length + 1}. Give more text ({round((length + 1) / VALIDATION_SHARE)} bytes in all are enough), or "
                f"a smaller length"
            )
        return last


def _find(paths: Sequence[str | Path]) -> Iterator[_File]:
    for path in map(Path, paths):
        if path.is_file():
            yield _File(path.name, path, path.stat().st_size)
        elif path.is_dir():
            yield from _walk(path, suffix="", leave_out=set())
        else:
            raise LabError(f"data: {str(path)!r} is neither a file nor a folder (looked in {Path.cwd()})")


def _standard_library() -> Iterator[_File]:
    folder = Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise LabError(f"data: this Python keeps no source of its own in {folder}. Name text files or a folder")
    return _walk(folder, suffix=".py", leave_out=_NOT_THE_LIBRARY)


def _walk(folder: Path, suffix: str, leave_out: set[str]) -> Iterator[_File]:
    for here, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in leave_out and f != "__pycache__" and not f.startswith(".")]
        for name in names:
            path = Path(here, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                yield _File(path.relative_to(folder).as_posix(), path, path.stat().st_size)


def _within(files: list[_File], max_bytes: int) -> list[_File]:
    """As many files as fit, chosen by hash so that a cap keeps a fair sample and not the start of the alphabet."""
    chosen: list[_File] = []
    room = max_bytes
    for file in sorted(files, key=lambda f: (_number(f"cap/{f.name}"), str(f.path))):
        if file.size <= room or not chosen:  # one file that is larger than everything is read up to the cap
            chosen.append(file)
            room -= min(file.size, room)
    return sorted(chosen, key=lambda f: (f.name, str(f.path)))


def _read(file: _File, max_bytes: int) -> bytes | str:
    """The text with line ends as in the file, or why it is not text."""
    try:
        with file.path.open("rb") as stream:
            text = stream.read(max_bytes)
    except OSError as error:
        return error.strerror or "cannot be read"
    if END_OF_FILE in text:
        return "binary"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if len(text) - error.start > 3:  # otherwise only the cap's cut through the last character
            return "not UTF-8"
    return text


def _split(texts: list[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """Files in the order of their hashes are held out until there is enough; few or unequal files are cut instead."""
    wanted = VALIDATION_SHARE * sum(len(text) for _, text in texts)
    held_out, size = set(), 0
    for name, text in sorted(texts, key=lambda named: (_number(f"split/{named[0]}"), named[1])):
        if size < wanted:
            held_out.add((name, text))
            size += len(text)
    if len(held_out) < len(texts) and size <= 5 * wanted:
        return _join(t for n, t in texts if (n, t) not in held_out), _join(t for n, t in texts if (n, t) in held_out)
    cuts = [len(text) - round(len(text) * VALIDATION_SHARE) for _, text in texts]
    head = _join(text[:cut] for (_, text), cut in zip(texts, cuts, strict=True))
    return head, _join(text[cut:] for (_, text), cut in zip(texts, cuts, strict=True))


def _join(texts: Iterator[bytes]) -> bytes:
    return b"".join(text + END_OF_FILE for text in texts)


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length + 1)].long()  # (B, length+1)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _number(word: str) -> int:
    """64 bits that depend on the word alone: Python's own hash() differs from process to process."""
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")
