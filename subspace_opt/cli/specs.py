"""The commands `list`, `show`, `validate` and `schema`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from ..registry import FAMILIES, Component, failures, kinds, plugin_entry_points
from ..spec import Spec, SpecError, json_schema, load_spec, presets
from .options import AsJson, Overrides, Plugins, SpecName, parse_overrides, print_json
from .tables import console, show_catalogue


def list_kinds(plugin: Plugins = [], as_json: AsJson = False) -> None:  # noqa: B006
    """List presets, selectors, rules, weight rules and plugins."""
    catalogue = _catalogue(plugin)
    if as_json:
        print_json(catalogue)
    else:
        show_catalogue(catalogue, console())


def show(
    spec: SpecName,
    full: Annotated[bool, typer.Option("--full", help="Include fields with their default value.")] = False,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Print a spec as YAML.

    Fields with their default value are left out; --full and --json include them.
    """
    loaded = load_spec(spec, parse_overrides(set_))
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        typer.echo(loaded.to_yaml(full=full), nl=False)


def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, or names of presets.")],
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Check specs and report errors in them.

    Exits with status 2 if any spec has an error.
    """
    found = [_check(file, parse_overrides(set_)) for file in files]
    if as_json:
        print_json(found)
    for result in found if not as_json else []:
        if result["valid"]:
            typer.echo(f"{result['file']}: ok, {result['summary']}")
        else:
            print(f"Error: {result['error']}", file=sys.stderr)
    if not all(result["valid"] for result in found):
        raise typer.Exit(2)


def schema(plugin: Plugins = []) -> None:  # noqa: B006
    """Print the JSON schema of a spec file, for editors.

    The schema has every installed kind.
    """
    print_json(json_schema())


def _check(file: str, changed: dict[str, Any]) -> dict[str, Any]:
    try:
        spec = load_spec(file, changed)
    except SpecError as error:
        return {"file": file, "valid": False, "error": str(error)}
    return {"file": file, "valid": True, "summary": _summary(spec)}


def _summary(spec: Spec) -> str:
    routes = f"{len(spec.routes)} route{'s' if len(spec.routes) != 1 else ''}"
    return f"{spec.name}: pipelines {', '.join(spec.pipelines)}; {routes}"


def _catalogue(files: Sequence[Path]) -> dict[str, Any]:
    known = {family: kinds(family) for family in FAMILIES}
    plugins = list(_plugins(files, {kind: cls for family in known.values() for kind, cls in family.items()}))
    origin = {kind: plugin["name"] for plugin in plugins for kind in plugin["gives"]}
    return {
        "presets": list(_presets()),
        "selectors": _described(known["selector"], origin),
        "rules": _described(known["rule"], origin),
        "weight_rules": _described(known["weight_rule"], origin),
        "plugins": plugins,
    }


def _plugins(files: Sequence[Path], known: dict[str, type[Component]]) -> Iterator[dict[str, Any]]:
    """Installed plugins, including those that failed, and the files given on the command line."""
    for point in plugin_entry_points():
        own = [kind for kind, cls in known.items() if _within(cls.__module__, point.module)]
        yield _plugin(point.name, _package(point), own, failures().get(point.name))
    for point in entry_points(group=presets.GROUP):
        own = [name for name, owners in presets.installed().items() if _package(point) in {o.package for o in owners}]
        yield _plugin(point.name, _package(point), own, presets.failures().get(point.name))
    for file in files:
        own = [kind for kind, cls in known.items() if inspect.getfile(cls) == str(file.resolve())]
        yield _plugin(file.name, str(file), own, None)


def _plugin(name: str, package: str, gives: list[str], error: str | None) -> dict[str, Any]:
    return {"name": name, "package": package, "gives": gives, "error": error}


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.name


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _presets() -> Iterator[dict[str, Any]]:
    found = {name: [preset] for name, preset in presets.built_in().items()} | presets.installed()
    for name, owners in sorted(found.items()):
        entry = {"name": name, "package": " and ".join(owner.package for owner in owners)}
        try:
            spec = load_spec(name)
        except SpecError as error:  # only presets of packages can fail: the built-in ones are tested
            yield {**entry, "source": [], "about": "", "defaults": None, "error": str(error)}
        else:
            fields = {"source": spec.source, "about": spec.about, "defaults": spec.defaults.model_dump()}
            yield {**entry, **fields, "error": None}


def _described(family: dict[str, type[Component]], origin: dict[str, str]) -> list[dict[str, Any]]:
    names: dict[type[Component], list[str]] = {}
    for kind, cls in family.items():
        names.setdefault(cls, []).append(kind)
    return [{"names": own, "doc": _mathematics(cls), "plugin": origin.get(own[0])} for cls, own in names.items()]


def _mathematics(cls: type) -> str:
    """The first paragraph of a kind's docstring, on one line."""
    paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(":")
