"""Find a rule, selector or weight rule by name, and build it with options that fit small matrices."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from ..algebra import Rule, Selector, WeightRule
from ..registry import FAMILIES, Component, RegistryError, find, kind_of, kinds, load_plugin, suggest

# Defaults for components that have these options, because most matrices here have four to seven rows and columns.
SMALL: Mapping[str, Any] = {"rank": 2, "every": 3}


Testable = Rule | Selector | WeightRule


class UnknownComponentError(ValueError):
    """The component cannot be found or built. The message says how to name it."""


@dataclass(frozen=True)
class Subject:
    """A component, and its name in messages."""

    label: str
    component: Testable

    @property
    def kind(self) -> str:
        return kind_of(type(self.component))


def subjects(asked: str | type[Component] | Testable) -> list[Subject]:
    """The components that `asked` names. It is a class, an instance, or the text of `--component`.

    The text is a kind, `module:Class` or `file.py:Class`. `module` or `file.py` alone names every component that it defines, `all` every
    installed kind, and a kind of several families names all of them. Options follow as JSON: `switch={"at": 3}`.

    Raises:
        UnknownComponentError: no component has that name, or it cannot be built with these options.
    """
    if isinstance(asked, Testable):
        return [Subject(kind_of(type(asked)), asked)]
    if isinstance(asked, type):
        return [Subject(kind_of(asked), made(asked, {}))]
    name, options = _parsed(asked)
    found = _classes(name)
    return [Subject(asked if len(found) == 1 else f"{cls.family} {kind_of(cls)}", made(cls, options)) for cls in found]


def _parsed(asked: str) -> tuple[str, dict[str, Any]]:
    name, equals, text = asked.partition("=")
    if not equals:
        return name, {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnknownComponentError(f"--component '{asked}': the options are not JSON: {error}") from None
    if not isinstance(options, dict):
        raise UnknownComponentError(f"--component '{asked}': the options are not a mapping, such as {{\"rank\": 4}}")
    return name, options


def _classes(name: str) -> list[type[Component]]:
    if name == "all":
        return [cls for family in FAMILIES for cls in dict.fromkeys(kinds(family).values())]
    module, colon, attribute = name.rpartition(":")
    if colon and module:
        found = getattr(_module(module), attribute, None)
        if not (isinstance(found, type) and issubclass(found, Component)) or found.is_family:
            raise UnknownComponentError(f"'{attribute}' of '{module}' is not a component; the module has {_named(_module(module))}")
        return [found]
    if name.endswith(".py"):
        return _defined(_module(name))
    found_kinds = [cls for family in FAMILIES if (cls := find(family, name)) is not None]
    if found_kinds:
        return found_kinds
    if "." in name or importlib.util.find_spec(name) is not None:
        return _defined(_module(name))
    known = {kind for family in FAMILIES for kind in kinds(family)}
    raise UnknownComponentError(f"no component or module '{name}'; {suggest(name, known)}")


def _module(name: str) -> ModuleType:
    """Import a module by its name or its file; the working directory is searched too."""
    if name.endswith(".py"):
        try:
            load_plugin(name)
        except RegistryError as error:
            raise UnknownComponentError(str(error)) from None
        file = str(Path(name).resolve())
        return next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == file)
    with _working_directory():
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise UnknownComponentError(f"module '{name}' cannot be imported: {error}") from None


@contextmanager
def _working_directory() -> Iterator[None]:
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


def _defined(module: ModuleType) -> list[type[Component]]:
    """The components that a module defines itself."""
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Component) and not inspect.isabstract(value)
        if value.__module__ == module.__name__ and not value.is_family
    ]
    if not found:
        raise UnknownComponentError(f"'{module.__name__}' defines no component; it imports {_named(module)}")
    return found


def _named(module: ModuleType) -> str:
    named = [n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Component) and not v.is_family]
    return ", ".join(named) or "none"


# ---------------------------------------------------------------------------------------------------------------- building


def made(cls: type[Component], options: Mapping[str, Any]) -> Testable:
    """Build a component with these options. Missing ones come from the `examples` of its fields, and from `SMALL` if valid.

    Raises:
        UnknownComponentError: an option is invalid, or a field without a default has no example.
    """
    given = dict(options)
    try:
        cls.model_validate(given)
    except ValidationError:
        given = {**_examples(cls), **given}
    try:
        cls.model_validate(given)
    except ValidationError as error:
        raise UnknownComponentError(_cannot_be_made(cls, error)) from None
    for name, value in SMALL.items():
        if name in cls.model_fields and name not in given and _valid(cls, {**given, name: value}):
            given[name] = value
    component = cls.model_validate(given)
    assert isinstance(component, Testable)
    return component


def _examples(cls: type[Component]) -> dict[str, Any]:
    return {name: field.examples[0] for name, field in cls.model_fields.items() if field.examples}


def _valid(cls: type[Component], options: Mapping[str, Any]) -> bool:
    try:
        cls.model_validate(options)
    except ValidationError:
        return False
    return True


def _cannot_be_made(cls: type[Component], error: ValidationError) -> str:
    what = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'as a whole'}: {e['msg']}" for e in error.errors(include_url=False))
    return (
        f"{cls.family} '{kind_of(cls)}' cannot be built: {what}. Give options in JSON, --component '{kind_of(cls)}={{...}}', or give the "
        "field an example, Field(description=..., examples=[...])"
    )
