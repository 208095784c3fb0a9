"""The presets: YAML files in this folder, and in installed packages with an entry point of group `subspace_opt.presets`.

In: the name of a preset. Out: its file, or a `PresetError`.
An entry point names a package that holds YAML files. Each file is a preset, named like the file. Packages are searched only for a name that
is not built in, and when all presets are listed. A package that cannot be imported is left out with a warning.
"""

from __future__ import annotations

import functools
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
    """Two packages have a preset of the same name, or a package has no presets."""


@dataclass(frozen=True)
class Preset:
    """One preset: its name, its package (empty for this one), its file."""

    name: str
    package: str
    file: Traversable

    def read(self) -> Document:
        """Read the file as a document."""
        if not self.package:
            return _read_built_in(self.name)
        with importlib.resources.as_file(self.file) as path:
            return read_document(path)


_failures: dict[str, str] = {}
_searched: dict[str, tuple[Preset, ...]] = {}  # by entry point


@functools.cache
def _read_built_in(name: str) -> Document:
    """A built-in preset, parsed once. Readers copy its data before they change it."""
    return read_document(BUILT_IN / f"{name}.yaml")


def built_in() -> dict[str, Preset]:
    """The presets of this package, by name."""
    return {preset.name: preset for preset in _presets_in(BUILT_IN, "")}


def installed() -> dict[str, list[Preset]]:
    """The presets of other packages by name; a name with several presets is a conflict. Names of built-in presets are left out."""
    found: dict[str, list[Preset]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        for preset in _of_package(point):
            found.setdefault(preset.name, []).append(preset)
    return {name: presets for name, presets in sorted(found.items()) if name not in built_in()}


def names(*, installed_too: bool = True) -> list[str]:
    """The names of all presets, sorted."""
    return sorted({*built_in(), *(installed() if installed_too else ())})


def find(name: str) -> Preset | None:
    """The preset of that name, or None.

    Raises:
        PresetError: two packages have a preset of that name; the message names both.
    """
    own = built_in().get(name)
    if own is not None or os.sep in name or name.endswith((".yaml", ".yml", ".json")):
        return own
    found = installed().get(name, [])
    if len(found) > 1:
        owners = " and ".join(f"{preset.package} ({preset.file})" for preset in found)
        raise PresetError(f"two packages have a preset '{name}': {owners}; uninstall one of them, or give the path of the file")
    return found[0] if found else None


def failures() -> dict[str, str]:
    """Preset packages that failed, by entry point, with the reason."""
    return dict(_failures)


def _of_package(point: EntryPoint) -> tuple[Preset, ...]:
    """The presets of one entry point. If the package fails: no presets, and a warning the first time."""
    key = f"{point.name} = {point.value}"
    if key not in _searched:
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.name
        _searched[key] = ()
        try:
            _searched[key] = tuple(_presets_in(importlib.resources.files(point.module), package))
            if not _searched[key]:
                raise PresetError(f"'{point.value}' has no .yaml file; add one, or remove the entry point")
        except Exception as error:  # foreign code may raise anything; the library must keep working without it
            _failures[point.name] = f"{type(error).__name__}: {error}"[:500]
            _warn(f"preset package '{point.name}' (from {package}) failed and is left out: {_failures[point.name]}")
        for preset in _searched[key]:
            if preset.name in built_in():
                _warn(
                    f"the preset '{preset.name}' of {package} ({preset.file}) is hidden by the built-in one of that name; rename the file"
                )
    return _searched[key]


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _presets_in(folder: Traversable, package: str) -> list[Preset]:
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return [Preset(file.name.removesuffix(".yaml"), package, file) for file in files]
