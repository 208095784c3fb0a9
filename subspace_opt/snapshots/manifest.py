"""Folders of snapshots: list them, publish a new one, verify the files of one. Handles files only, no tensors and no ranks.

A snapshot is written under a hidden name, its manifest last. When all of it is on the disk, one rename gives it the name `step-00000100`.
A folder with such a name was therefore complete once, and its manifest shows whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import MOST, CheckpointError
from ..checkpoint.files import flush_names

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_LEFT_OVER = re.compile(r"\.step-\d{8,}\.[0-9a-f]+\.(?:partial|removed)")


class SnapshotError(CheckpointError):
    """A snapshot is damaged, belongs to something else, or cannot be written; model and optimizer are unchanged."""


@dataclass(frozen=True)
class Manifest:
    """The files of a snapshot with size and SHA-256, and the versions that wrote it."""

    step: int
    world_size: int
    files: dict[str, tuple[int, str]]
    torch: str
    subspace_opt: str
    format: int = FORMAT


# ------------------------------------------------------------------------------------------------------------------------ names


def path_of(folder: Path, step: int) -> Path:
    """The path of the snapshot of `step`."""
    return folder / f"step-{step:08d}"


def named(folder: Path) -> list[int]:
    """The steps of all folders with the name of a snapshot, ascending."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def complete(folder: Path) -> list[int]:
    """The steps of all snapshots with a manifest, ascending."""
    return [step for step in named(folder) if (path_of(folder, step) / MANIFEST).is_file()]


def _hidden(folder: Path, step: int, what: str) -> Path:
    return folder / f".{path_of(folder, step).name}.{secrets.token_hex(4)}.{what}"


# ---------------------------------------------------------------------------------------------------------------------- writing


def begin(folder: Path, step: int) -> Path:
    """Remove hidden folders that killed runs have left, and return a new empty one for the snapshot of `step`.

    Raises:
        SnapshotError: the folder has a snapshot of this step or a later one, which `load` would take for the newest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)
    taken = named(folder)
    if taken and taken[-1] >= step:
        raise SnapshotError(
            f"{folder} has {path_of(folder, taken[-1]).name} already, so a snapshot of step {step} would not be its newest. Save into "
            f"another folder, or, if the run was taken back to an earlier step, remove the later ones first: "
            f"snapshots.discard({str(folder)!r}, after={step - 1})"
        )
    partial = _hidden(folder, step, "partial")
    partial.mkdir()
    return partial


def sizes_in(folder: Path) -> dict[str, int]:
    """The size of every file, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def assign_files(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The files of each of `count` ranks: largest first, each to the rank with the fewest bytes. The same on every rank."""
    out: list[list[str]] = [[] for _ in range(count)]
    load = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = load.index(min(load))
        out[least].append(name)
        load[least] += sizes[name] + 1
    return out


def digests(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """The size and SHA-256 of each file."""
    return {name: _digest(folder / name) for name in names}


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), found


def write(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def publish(partial: Path, manifest: Manifest, keep: int) -> Path:
    """Write the manifest, give the snapshot its name, and remove the oldest complete snapshots beyond `keep`."""
    folder = partial.parent
    path = path_of(folder, manifest.step)
    write(partial / MANIFEST, _to_bytes(manifest))
    flush_names(partial)
    os.rename(partial, path)
    flush_names(folder)
    for step in complete(folder)[:-keep]:
        remove(folder, step)
    return path


def remove(folder: Path, step: int) -> None:
    """Remove a snapshot. It is renamed first, so that a half-removed folder never has the name of a snapshot."""
    away = _hidden(folder, step, "removed")
    os.rename(path_of(folder, step), away)
    shutil.rmtree(away)


# ---------------------------------------------------------------------------------------------------------------------- reading


def choose(folder: Path, step: int | None) -> tuple[Path, Manifest]:
    """The path and manifest of the snapshot of `step`, or of the newest.

    Raises:
        SnapshotError: there is no such snapshot, or its manifest is missing or damaged.
    """
    steps = named(folder)
    if step is None and not steps:
        here = " It is a checkpoint of torch.distributed.checkpoint, or a single snapshot: pass the folder that contains the snapshots."
        own = any((folder / name).is_file() for name in (".metadata", MANIFEST))
        raise SnapshotError(f"{folder} has no complete snapshot.{here if own else ''}")
    if step is not None and step not in steps:
        have = f"it has {', '.join(map(str, complete(folder)))}" if complete(folder) else "it has no complete snapshot"
        raise SnapshotError(f"{folder} has no snapshot of step {step}; {have}")
    path = path_of(folder, steps[-1] if step is None else step)
    return path, _read(path)


def _read(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        foreign = "; it is a checkpoint that torch.distributed.checkpoint wrote by itself" if (path / ".metadata").is_file() else ""
        raise SnapshotError(f"{path} has no {MANIFEST}: it was lost, or another program wrote the folder{foreign}. {remedy(path)}")
    try:
        document = json.loads(file.read_bytes())
        content = document["content"]
        whole = document["sha256"] == hashlib.sha256(_canonical(content)).hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{file} is truncated or damaged. {remedy(path)}") from error
    if not whole:
        raise SnapshotError(f"{file} is damaged: its content does not match its checksum. {remedy(path)}")
    if content["format"] != FORMAT:
        raise SnapshotError(
            f"{file} has format {content['format']} and this subspace_opt reads format {FORMAT}; load it with subspace_opt "
            f"{content['subspace_opt']}, which wrote it"
        )
    own = path_of(path.parent, content["step"])
    if own != path:
        raise SnapshotError(f"{path} is the snapshot of step {content['step']} under another name; rename it to {own.name}")
    return Manifest(**{**content, "files": {name: (size, digest) for name, (size, digest) in content["files"].items()}})


def _to_bytes(manifest: Manifest) -> bytes:
    content = json.loads(json.dumps(asdict(manifest)))
    document = {"sha256": hashlib.sha256(_canonical(content)).hexdigest(), "content": content}
    return json.dumps(document, indent=1).encode()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def find_faults(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """A sentence for each of these files that is missing or differs from the manifest."""
    return [text for name in names if (text := _fault(path / name, *manifest.files[name]))]


def _fault(file: Path, size: int, digest: str) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    found = file.stat().st_size
    if found != size:
        return f"{file.name} has {found} bytes where {size} were written: it is {'truncated' if found < size else 'too long'}"
    return None if _digest(file)[1] == digest else f"{file.name} is damaged: its SHA-256 does not match the manifest"


def unknown_files(path: Path, manifest: Manifest) -> list[str]:
    """A sentence for each file in the folder that the manifest does not list."""
    found = sorted(entry.name for entry in path.iterdir())
    return [
        f"{name} does not belong to this snapshot: move it out of the folder" for name in found if name not in {*manifest.files, MANIFEST}
    ]


def raise_problems(path: Path, problems: list[str]) -> None:
    """Raise a SnapshotError with the first problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - MOST} more" if len(problems) > MOST else ""
        raise SnapshotError(f"{path} cannot be loaded: {'; '.join(problems[:MOST])}{more}. {remedy(path)}")


def remedy(path: Path) -> str:
    """A sentence that says how to continue without a damaged snapshot: with the one before it, if there is one."""
    folder, match = path.parent, _NAME.fullmatch(path.name)
    before = [step for step in complete(folder) if match and step < int(match[1])]
    if not before:
        return "There is no earlier complete snapshot: restore the file from a copy, or start again"
    return (
        f"Load the snapshot before it, snapshots.load({str(folder)!r}, model, optimizer, step={before[-1]}), and to save again after that, "
        f"snapshots.discard({str(folder)!r}, after={before[-1]})"
    )
