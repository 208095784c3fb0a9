"""Names, shapes and dtypes from safetensors files, without their weights.

A file begins with the length of its header, 8 bytes little-endian, and the header itself, JSON that maps each tensor's name to `dtype`,
`shape` and `data_offsets` (https://github.com/huggingface/safetensors#format). An index maps names to the files of a sharded checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

LONGEST = 100_000_000  # bytes of a header; the format allows no more
INDEX = ".safetensors.index.json"

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Values that an optimizer does not update: counters, masks and tables. A quantized weight is stored in one of these too.
OTHERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


class ModelError(ValueError):
    """The parameters of a model cannot be found. The message says what was given, and what is allowed."""


class Stored(NamedTuple):
    """A tensor in a file: its shape, and the word for its dtype."""

    shape: tuple[int, ...]
    dtype: str


def is_stored(path: Path) -> bool:
    """True if the path is a safetensors file, an index of some, or a folder with either and without a config."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.safetensors*"))
    return path.name.endswith((".safetensors", INDEX))


def read_stored(path: Path) -> dict[str, Stored]:
    """The tensors of a file, of an index's files, or of all files in a folder, by name.

    Raises:
        ModelError: A file is missing or is no safetensors file, or two files hold a tensor of one name.
    """
    found: dict[str, Stored] = {}
    for file in _files(path):
        for name, stored in _read_header(file).items():
            if name in found:
                raise ModelError(f"{file}: tensor '{name}' is in another file of {path} too; give the path of the file that you mean")
            found[name] = stored
    return found


def _files(path: Path) -> list[Path]:
    """The files that hold the tensors."""
    if path.is_dir():
        indices = sorted(path.glob(f"*{INDEX}"))
        if len(indices) > 1:
            listed = ", ".join(index.name for index in indices)
            raise ModelError(f"{path}: the folder has {len(indices)} indices, {listed}; give the path of one of them")
        return _files(indices[0]) if indices else sorted(path.glob("*.safetensors"))
    if not path.name.endswith(INDEX):
        return [path]
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({path.parent / str(name) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: it is no index of safetensors files, JSON with a `weight_map` from names to files: {error!r}") from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} of {len(files)} files are missing, the first is {missing[0]}; download them or give one file"
        )
    return files


def _read_header(file: Path) -> dict[str, Stored]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(LONGEST, file.stat().st_size - 8):
                raise ModelError(f"{file}: this is no safetensors file: its first 8 bytes give a header of {length:,} bytes")
            header = json.loads(opened.read(length))
        return dict(_tensors(header))
    except OSError as error:
        raise ModelError(f"{file}: it cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: the header of this safetensors file is damaged: {error!r}") from error


def _tensors(header: Mapping[str, Any]) -> Iterator[tuple[str, Stored]]:
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, Stored(tuple(int(size) for size in entry["shape"]), str(entry["dtype"]))
