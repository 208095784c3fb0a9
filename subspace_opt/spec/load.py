"""Load a spec from a preset's name, a file, a mapping or another spec, with overrides by dotted path."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from ..algebra.storage import StateDtype
from ..registry import suggest
from . import presets
from .document import Document, DocumentError, parse_document, read_document
from .messages import describe
from .model import ROLES, Spec, SpecError
from .overrides import apply_override, has_path, to_mutable


def preset_names(*, installed: bool = True) -> list[str]:
    """The names of the presets of this package and, if `installed`, of the installed preset packages."""
    return presets.names(installed_too=installed)


def load_spec(source: Spec | Mapping[str, Any] | str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Spec:
    """Load a spec from a preset's name, the path of a YAML or JSON file, a mapping, or a `Spec`.

    `overrides` maps dotted paths, such as `matrix.selector.rank`, to values.

    Raises:
        SpecError: the message starts with file:line:column if there is a file, and gives the field's path and the values allowed there.
    """
    if isinstance(source, Spec) and not overrides:
        return source
    document = _document(source)
    data = copy.deepcopy(document.data)
    overridden = {apply_override(data, path, to_mutable(value)): path for path, value in (overrides or {}).items()}

    def locate(path: tuple[int | str, ...]) -> str:
        for place, override in overridden.items():
            # The override's own value, and the mappings that were created on its path.
            if path[: len(place)] == place or (place[: len(path)] == path and not has_path(document.data, path)):
                return f"override '{override}'"
        return document.locate(path)

    return _validated(data, locate)


def parse_spec(text: str, source: str = "<string>") -> Spec:
    """Load a spec from YAML text. Error messages name the text by `source`."""
    try:
        document = parse_document(text, source)
    except DocumentError as error:
        raise SpecError(str(error)) from None
    return _validated(document.data, document.locate)


def _validated(data: Any, locate: Callable[[tuple[int | str, ...]], str]) -> Spec:
    try:
        return Spec.model_validate(data)
    except ValidationError as error:
        raise SpecError(describe(error, data, locate, Spec)) from None


def _document(source: Spec | Mapping[str, Any] | str | os.PathLike[str]) -> Document:
    if isinstance(source, Spec):
        return Document(source.model_dump(mode="json"), f"spec '{source.name}'")
    if isinstance(source, Mapping):
        return Document(to_mutable(source), "the given mapping")
    if not isinstance(source, str | os.PathLike):
        raise SpecError(f"a spec must be a preset's name, a path, a mapping or a Spec, not {type(source).__name__}")
    text = os.fspath(source)
    try:
        preset = presets.find(text) if isinstance(source, str) else None
        if preset is not None:
            return preset.read()
        word = isinstance(source, str) and os.sep not in text and not text.endswith((".yaml", ".yml", ".json"))
        if word and not os.path.lexists(text):
            short = text[:80]
            broken = "".join(f"; preset package '{name}' failed: {why}" for name, why in presets.failures().items())
            raise SpecError(
                f"no preset '{short}'; {suggest(text, preset_names())} (for a file, give its path with the ending: ./{short}.yaml){broken}"
            )
        return read_document(source)
    except (DocumentError, presets.PresetError) as error:
        raise SpecError(str(error)) from None


def with_roles(spec: Spec, roles: Mapping[str, str]) -> Spec:
    """The spec with these roles before its own.

    Raises:
        SpecError: a value that is no role.
    """
    for glob, role in roles.items():
        if role not in ROLES:
            raise SpecError(f"roles: '{role}', given to '{glob}', is not a role; {suggest(str(role), ROLES)}")
    own = {glob: role for glob, role in spec.roles.items() if glob not in roles}
    return _validated({**spec.model_dump(mode="json"), "roles": {**roles, **own}}, lambda path: "roles")


def with_state_dtype(spec: Spec, chosen: StateDtype | Mapping[str, StateDtype]) -> Spec:
    """The spec with `state_dtype` set in every pipeline.

    A mapping names slots, and each pipeline takes the slots that its rules have. A single word applies to every slot that has the size of
    the matrix or of its coordinates: the moments and the error feedback.

    Raises:
        SpecError: an unknown state dtype, or a slot that no pipeline has.
    """
    words = get_args(StateDtype)
    for word in chosen.values() if isinstance(chosen, Mapping) else (chosen,):
        if word not in words:
            raise SpecError(f"state_dtype: '{word}' is not a state dtype; {suggest(str(word), words)}")
    known = {name for pipeline in spec.pipelines.values() for name in pipeline.storable}
    for name in chosen if isinstance(chosen, Mapping) else ():
        if name not in known:
            raise SpecError(f"state_dtype: no pipeline of '{spec.name}' has a slot '{name}' with a choice of dtype; {suggest(name, known)}")
    data = spec.model_dump(mode="json")
    for name, pipeline in spec.pipelines.items():
        if isinstance(chosen, Mapping):
            own = {slot: word for slot, word in chosen.items() if slot in pipeline.storable}
        else:
            own = {slot: chosen for slot, large in pipeline.storable.items() if large}
        data["pipelines"][name]["state_dtype"] = {**pipeline.state_dtype, **own}
    return _validated(data, lambda path: "state_dtype")
