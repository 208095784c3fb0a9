"""Components and their names: `register` fills one table of kinds; validation reads it.

A `Component` is a frozen pydantic model. Its fields are the hyper-parameters, its methods the algorithm. A *family* is an abstract
component (`Rule`, `Selector`, `WeightRule`); a *kind* is a concrete one, named by its `kind` field. A field annotated with a family accepts
a mapping with a `kind`, the name of a kind, or an instance. The look-up happens when a value is validated, so a plugin may be registered
late.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

FAMILIES = ("rule", "selector", "weight_rule")
PLUGIN_GROUP = "subspace_opt.plugins"
# A plugin is foreign code: its import may raise anything, even `SystemExit`. The library must keep working without it.
FOREIGN = (Exception, SystemExit)


class Model(BaseModel):
    """A frozen model. An unknown key or a value of the wrong type is an error, at any depth."""

    # Validators are built when a model is first used, because a run uses only a few of the kinds.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class RegistryError(ValueError):
    """A kind or a plugin cannot be registered or loaded."""


class Component(Model):
    """A named part of a spec, with hyper-parameters as fields and the algorithm as methods."""

    family: ClassVar[str] = ""
    is_family: ClassVar[bool] = False  # True for the abstract class of a family, False for a kind

    def __init_subclass__(cls, family: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_family = bool(family)
        if family:
            cls.family = family

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls.is_family:
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            lambda value: _resolve(cls, value),
            serialization=core_schema.plain_serializer_function_ser_schema(_dump),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        # `spec.json_schema` replaces this mark by a reference to the union of all registered kinds.
        return {"x-family": cls.family} if cls.is_family else handler(schema)


C = TypeVar("C", bound=type[Component])

_kinds: dict[str, dict[str, type[Component]]] = {}
_failures: dict[str, str] = {}
_loaded: set[str] = set()


def _dump(component: Component) -> dict[str, Any]:
    return component.model_dump()


def kind_of(cls: type[Component]) -> str:
    """The name of a kind: the default of its `kind` field."""
    field = cls.model_fields.get("kind")
    if field is None or not isinstance(field.default, str):
        raise RegistryError(f"{owner(cls)} has no name; add a field such as `kind: Literal['my_kind'] = 'my_kind'`")
    return field.default


def names_of(cls: type[Component]) -> tuple[str, ...]:
    """All names of a kind: the values of its `kind` Literal, the default first."""
    main = kind_of(cls)
    values: tuple[str, ...] = getattr(cls.model_fields["kind"].annotation, "__args__", (main,))
    return (main, *(v for v in values if v != main))


def owner(cls: type) -> str:
    """The origin of a class, for messages: `module.Class (file)`."""
    try:
        place = inspect.getfile(cls)
    except (TypeError, OSError):
        place = "interactive session"
    return f"{cls.__module__}.{cls.__qualname__} ({place})"


def refuse_former(cls: type, replaced: Mapping[str, str], what: str, remedy: str) -> None:
    """Refuse a class that defines an attribute of an earlier version.

    Args:
        replaced: By name of the attribute, the word that fills `{}` in `remedy`.

    Raises:
        TypeError: it defines one.
    """
    former = sorted(replaced.keys() & vars(cls).keys())
    if former:
        raise TypeError(f"{cls.__qualname__}: `{former[0]}` is no longer {what}; {remedy.format(replaced[former[0]])}")


def register(cls: C) -> C:
    """Class decorator: register a kind under the values of its `kind` field.

    Raises:
        RegistryError: the class has no family or no `kind`, or another class is registered under its name; the message names both.
    """
    if not (isinstance(cls, type) and issubclass(cls, Component)) or cls.is_family or not cls.family:
        raise RegistryError(f"{cls!r} cannot be registered: it is no component of a family; derive it from Rule, Selector or WeightRule")
    table = _kinds.setdefault(cls.family, {})
    for name in names_of(cls):
        other = table.get(name)
        if other is not None and other is not cls:
            raise RegistryError(f"two classes for the {cls.family} kind '{name}': {owner(other)} and {owner(cls)}; rename one of them")
    for name in names_of(cls):
        table[name] = cls
    return cls


def unregister(cls: type[Component]) -> None:
    """Remove a kind, for interactive work and tests."""
    table = _kinds.get(cls.family, {})
    for name in [n for n, c in table.items() if c is cls]:
        del table[name]


def kinds(family: str) -> dict[str, type[Component]]:
    """All registered kinds of a family by name, including those of installed plugins."""
    load_entry_points()
    return dict(sorted(_kinds.get(family, {}).items()))


def failures() -> dict[str, str]:
    """Plugins that failed to import, by name, with the reason."""
    return dict(_failures)


def find(family: str, kind: str) -> type[Component] | None:
    """The class of a kind, or None. Installed plugins are imported only if no registered kind has that name."""
    if kind not in _kinds.get(family, {}):
        load_entry_points()
    return _kinds.get(family, {}).get(kind)


def near(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most similar to `word`, or None."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of known words if none is similar."""
    known = sorted(known)
    meant = near(word, known)
    return f"did you mean '{meant}'?" if meant else f"known: {', '.join(known) or 'none'}"


def _resolve(family: type[Component], value: Any) -> Component:
    if isinstance(value, family):
        return value
    named = family.family.replace("_", " ")
    if value is None:
        value = {"kind": "none"}
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        raise PydanticCustomError("component", "a {family} must be a kind's name or a mapping with a `kind`", {"family": named})
    kind = value.get("kind")
    if kind is None:
        raise PydanticCustomError(
            "missing_kind",
            "a {family} needs a `kind`; known: {known}",
            {"family": named, "known": ", ".join(kinds(family.family))},
        )
    cls = find(family.family, kind) if isinstance(kind, str) else None
    if cls is None:
        raise PydanticCustomError(
            "unknown_kind",
            "unknown {family} kind '{kind}'; {hint}{broken}",
            {"family": named, "kind": str(kind)[:80], "hint": _hint(family, str(kind)), "broken": _broken()},
        )
    return cls.model_validate(dict(value))


def _hint(family: type[Component], kind: str) -> str:
    known = kinds(family.family)
    other = next((name for name, table in _kinds.items() if name != family.family and kind in table), None)
    return f"that is a {other}; known: {', '.join(known)}" if other else suggest(kind, known)


def _broken() -> str:
    """The plugins that failed to import: the unknown kind may be in one of them."""
    return "".join(f"; plugin '{name}' failed to import: {why}" for name, why in _failures.items())


# ---------------------------------------------------------------------------------------------------------------- plugins


def plugin_entry_points() -> list[EntryPoint]:
    """The entry points of the installed plugins. Nothing is imported."""
    return sorted(entry_points(group=PLUGIN_GROUP), key=lambda e: e.name)


def load_entry_points() -> None:
    """Import every installed plugin once. A plugin that fails is listed in `failures`, and the others still work."""
    for point in plugin_entry_points():
        key = f"{point.name} = {point.value}"
        if key in _loaded:
            continue
        _loaded.add(key)
        before = {family: dict(table) for family, table in _kinds.items()}
        try:
            point.load()
        except FOREIGN as error:
            _kinds.clear()
            _kinds.update(before)
            where = f" (from {point.dist.name} {point.dist.version})" if point.dist else ""
            _failures[point.name] = f"{type(error).__name__}: {error}"[:500]
            warnings.warn(
                f"plugin '{point.name}'{where} failed to import and is left out: {_failures[point.name]}",
                RuntimeWarning,
                stacklevel=2,
            )


def load_plugin(path: str | Path) -> None:
    """Run a plugin file, which registers its classes with `@register` (`--plugin path.py`).

    Raises:
        RegistryError: the file does not exist, raises on import, or registers the name of another kind.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise RegistryError(f"plugin file '{path}' does not exist or is not a regular file; give the path of a .py file")
    if str(file) in _loaded:
        return
    # The module's name depends on the full path, because files of the same name in two folders are two plugins.
    module_name = f"subspace_opt_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise RegistryError(f"plugin file '{path}' is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # pydantic finds the annotations of a class through its module
    before = {family: dict(table) for family, table in _kinds.items()}
    try:
        spec.loader.exec_module(module)
    except FOREIGN as error:
        del sys.modules[module_name]
        _kinds.clear()
        _kinds.update(before)
        raise RegistryError(f"plugin file '{path}' failed to import: {type(error).__name__}: {error}") from error
    _loaded.add(str(file))
