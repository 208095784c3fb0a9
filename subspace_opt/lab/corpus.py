"""Text as bytes: a corpus that every machine with Python has, and batches without iterator state.

A token is a byte. So no tokenizer has to be downloaded, and `bits per byte` can be compared between any two runs on the same text. A batch
is a pure function of (seed, step): a resumed run computes the batch of its next step, and two optimizers see the same windows in the same
order.
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
END_OF_FILE = b"\0"  # does not occur inside a file: a file with a NUL byte counts as binary and is left out

# Some distributions ship the tests of the standard library and others do not. Without them the default text is the same everywhere.
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class _File(NamedTuple):
    name: str  # relative to the given folder, so that the split does not depend on the place of that folder
    path: Path
    size: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """A training text and a validation text, made of text files.

    A hash of the file's relative path decides to which text a file belongs, so the same files give the same split on every machine. If
    there are too few files, the end of every file is validation text.
    """

    train: Tensor  # uint8
    validation: Tensor  # uint8
    source: str
    files: int
    skipped: tuple[str, ...]  # "name: reason"
    fingerprint: str  # a hash of both texts; a checkpoint is refused on another text

    @classmethod
    def load(cls, paths: Sequence[str | Path] = (), *, max_bytes: int = MAX_BYTES) -> Corpus:
        """Read files and folders; without any, read the source of the Python standard library.

        Raises:
            LabError: a path does not exist, or there is no text in it.
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
            raise LabError(f"data: no text in {source}{why}. Give a text file, or a folder with UTF-8 text files")
        train, validation = _split(texts)
        digest = blake2b(train + END_OF_FILE + validation, digest_size=16).hexdigest()
        return cls(_tensor(train), _tensor(validation), source, len(texts), tuple(skipped), digest)

    def batch(self, step: int, batch_size: int, length: int, seed: int) -> Tensor:
        """The windows of one step, `(batch_size, length + 1)`: `length` predictions need `length + 1` bytes.

        Raises:
            LabError: the training text is shorter than one window.
        """
        starts = self._last_start(self.train, length, "training") + 1
        generator = torch.Generator().manual_seed(_number(f"{seed}/{step}") >> 1)  # not the global generator, which belongs to the caller
        return _windows(self.train, torch.randint(starts, (batch_size,), generator=generator), length)

    def validation_windows(self, count: int, length: int) -> Tensor:
        """The same `count` windows at every call, `(count, length + 1)`, spread evenly over the validation text; fewer if it is short.

        Raises:
            LabError: the validation text is shorter than one window.
        """
        last = self._last_start(self.validation, length, "validation")
        count = min(count, last // (length + 1) + 1)
        return _windows(self.validation, torch.linspace(0, last, count, dtype=torch.float64).long(), length)

    def describe(self) -> str:
        """One line with the source of the text, its size, and the files that were left out."""
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
        raise LabError(f"data: this Python has no source of the standard library in {folder}. Give text files or a folder")
    return _walk(folder, suffix=".py", leave_out=_NOT_THE_LIBRARY)


def _walk(folder: Path, suffix: str, leave_out: set[str]) -> Iterator[_File]:
    for here, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in leave_out and f != "__pycache__" and not f.startswith(".")]
        for name in names:
            path = Path(here, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                yield _File(path.relative_to(folder).as_posix(), path, path.stat().st_size)


def _within(files: list[_File], max_bytes: int) -> list[_File]:
    """As many files as fit into `max_bytes`. They are chosen by hash, so that the sample does not favour the start of the alphabet."""
    chosen: list[_File] = []
    room = max_bytes
    for file in sorted(files, key=lambda f: (_number(f"cap/{f.name}"), str(f.path))):
        if file.size <= room or not chosen:  # if the first file alone is too large, it is read up to the limit
            chosen.append(file)
            room -= min(file.size, room)
    return sorted(chosen, key=lambda f: (f.name, str(f.path)))


def _read(file: _File, max_bytes: int) -> bytes | str:
    """The first `max_bytes` of a file with its own line ends, or the reason why it is not text."""
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
        if len(text) - error.start > 3:  # fewer bytes are a last character that the limit has cut
            return "not UTF-8"
    return text


def _split(texts: list[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """The training and the validation text.

    Files are held out in the order of their hashes until the validation text is long enough. If that takes all files, or far too much text,
    the end of every file is held out instead.
    """
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
    """A 64-bit hash of a word, the same in every process; Python's own hash() differs between processes."""
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")
