"""The presets: YAML files in this folder, and in installed packages with an entry point of group `subspace_opt.presets`.

An entry point names a package that holds YAML files; every file is a preset by its name. Packages are looked at when a name is asked for
that is not built in, or when all are listed, and never before. One that cannot be imported is left out with a warning.
"""

from __future__ import annotations

import importlib.resources
import os
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.resources.abc import Traversable
from pathlib import Path

from ..document import Document, read_document

GROUP = "subspace_opt.presets"
BUILT_IN = Path(__file__).parent


class PresetError(ValueError):
    """A name that two packages give to a preset of theirs."""


@dataclass(frozen=True)
class Preset:
    """One preset: its name, the package it comes with (empty for this one), its file."""

    name: str
    package: str
    file: Traversable

    def read(self) -> Document:
        """The file as a document."""
        with importlib.resources.as_file(self.file) as path:
            return read_document(path)


_failures: dict[str, str] = {}
_looked_at: dict[str, tuple[Preset, ...]] = {}  # by entry point


def built_in() -> dict[str, Preset]:
    """The presets of this package, by name."""
    return {preset.name: preset for preset in _presets_in(BUILT_IN, "")}


def installed() -> dict[str, list[Preset]]:
    """The presets of other packages; several under one name are a clash. What is built in wins over all."""
    found: dict[str, list[Preset]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        for preset in _of_package(point):
            found.setdefault(preset.name, []).append(preset)
    return {name: presets for name, presets in sorted(found.items()) if name not in built_in()}


def names(*, installed_too: bool = True) -> list[str]:
    """The names of all presets, in order."""
    return sorted({*built_in(), *(installed() if installed_too else ())})


def find(name: str) -> Preset | None:
    """The preset of a name, if there is one.

    Raises:
        PresetError: two packages have one of that name; both are named.
    """
    own = built_in().get(name)
    if own is not None or os.sep in name or name.endswith((".yaml", ".yml", ".json")):
        return own
    found = installed().get(name, [])
    if len(found) > 1:
        owners = " and ".join(f"{preset.package} ({preset.file})" for preset in found)
        raise PresetError(f"two owners for the preset '{name}': {owners}; uninstall one of them, or give the path of a file")
    return found[0] if found else None


def failures() -> dict[str, str]:
    """Packages that could not be looked at, by entry point, with the reason."""
    return dict(_failures)


def _of_package(point: EntryPoint) -> tuple[Preset, ...]:
    """The presets of one entry point; none, and a warning the first time, if there is something wrong with it."""
    key = f"{point.name} = {point.value}"
    if key not in _looked_at:
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.name
        _looked_at[key] = ()
        try:
            _looked_at[key] = tuple(_presets_in(importlib.resources.files(point.module), package))
            if not _looked_at[key]:
                raise PresetError(f"there is no .yaml file in '{point.value}'")
        except Exception as error:  # a package is foreign code: whatever it raises must not take the library with it
            _failures[point.name] = f"{type(error).__name__}: {error}"[:500]
            _warn(f"preset package '{point.name}' (from {package}) failed and is left out: {_failures[point.name]}")
        for preset in _looked_at[key]:
            if preset.name in built_in():
                _warn(f"the preset '{preset.name}' of {package} ({preset.file}) is hidden by the built-in one; rename it")
    return _looked_at[key]


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _presets_in(folder: Traversable, package: str) -> list[Preset]:
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return [Preset(file.name.removesuffix(".yaml"), package, file) for file in files]
