"""The spec: named pipelines, routes that send parameters to them, defaults; read from YAML, JSON or a mapping, and written back."""

from __future__ import annotations

import copy
import fnmatch
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from . import presets, rules, selectors
from .document import Document, DocumentError, parse_document, read_document
from .lowbit import StateDtype
from .messages import describe
from .modules import ModuleKind
from .registry import Component, Model, find, kinds, suggest
from .split import Pipeline

__all__ = ["Defaults", "Route", "Spec", "SpecError", "json_schema", "load_spec", "rules", "selectors"]

PRESETS = Path(__file__).parent / "presets"


class SpecError(ValueError):
    """A spec that cannot be used. The message names the place, what was found there and what to do."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Defaults(Model):
    """What `build` takes when it is given nothing."""

    lr: float = Field(1e-3, ge=0.0, description="Learning rate.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay, multiplied by the learning rate.")


class Route(Model):
    """Which parameters go to which pipeline, and how they are seen; all conditions given must hold."""

    use: str = Field(description="Name of the pipeline.")
    name: Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = Field(
        (), description="Globs, one of which fits the name."
    )
    module: Annotated[tuple[ModuleKind, ...], BeforeValidator(_listed, json_schema_input_type=ModuleKind | list[ModuleKind])] = Field(
        (), description="Kinds of module, one of which the parameter belongs to (known when a model is given)."
    )
    min_dims: NonNegativeInt | None = Field(None, description="Fewest dimensions.")
    max_dims: NonNegativeInt | None = Field(None, description="Most dimensions.")
    min_side: PositiveInt | None = Field(None, description="Shortest side of its matrices at least.")
    max_side: PositiveInt | None = Field(None, description="Longest side of its matrices at most.")
    view: Literal["auto", "flatten", "stack", "modes"] = Field(
        "auto",
        description="Three dimensions and more: (O, rest), a stack of matrices, or (O, rest) whose joined dimensions each get a basis "
        "(selector `kron_eigen`); auto flattens convolutions.",
    )
    split: dict[str, PositiveInt] | None = Field(None, description="Cut the rows of a fused weight into named blocks.")
    heads: PositiveInt | None = Field(None, description="Cut the rows into this many equal blocks.")
    transposed: bool | None = Field(None, description="Stored as (in, out); omitted, as the module tells.")

    @model_validator(mode="after")
    def _one_cut(self) -> Route:
        if self.split is not None and self.heads is not None:
            raise ValueError("`split` and `heads` both cut the rows; give one of them")
        return self

    def accepts(self, name: str, dims: int, sides: tuple[int, int], modules: frozenset[str]) -> bool:
        """Whether a parameter takes this route. `sides`: shorter and longer side of its matrices."""
        return (
            (not self.name or any(fnmatch.fnmatchcase(name, glob) for glob in self.name))
            and (not self.module or bool(modules.intersection(self.module)))
            and (self.min_dims is None or dims >= self.min_dims)
            and (self.max_dims is None or dims <= self.max_dims)
            and (self.min_side is None or sides[0] >= self.min_side)
            and (self.max_side is None or sides[1] <= self.max_side)
        )

    def __str__(self) -> str:
        given = self.model_dump(exclude={"use"}, exclude_defaults=True)
        said = [f"{key} {'|'.join(v) if isinstance(v, tuple) else v}" for key, v in given.items()]
        return ", ".join(said) or "everything else"


# What is meant when a spec has a pipeline `matrix` and no routes; `other` is then AdamW unless the spec has its own.
STANDARD_ROUTES = (
    {"module": "embedding", "use": "other"},
    {"module": "head", "use": "other"},
    {"name": "*head*", "use": "other"},
    {"min_dims": 2, "use": "matrix"},
    {"use": "other"},
)
STANDARD_OTHER = {"complement": {"kind": "adam", "beta1": 0.9, "beta2": 0.95}}


class Spec(Model):
    """A whole optimizer."""

    version: Literal[1] = Field(1, description="Version of the format.")
    name: str = Field("unnamed", min_length=1, description="What to call it.")
    source: tuple[str, ...] = Field((), strict=False, description="Paper and reference code, with the commit.")
    about: str = Field("", description="What it does, in a few lines.")
    notes: str = Field("", description="Where it differs from its sources, or they from each other.")
    published: tuple[str, ...] = Field((), strict=False, description="Settings that its authors published, by scale.")
    defaults: Defaults = Field(default=Defaults(), description="Learning rate and weight decay if none are given.")
    pipelines: dict[str, Pipeline] = Field(min_length=1, description="Named pipelines.")
    routes: tuple[Route, ...] = Field(
        (), strict=False, description="In order; the first that accepts a parameter sends it to its pipeline."
    )

    @model_validator(mode="before")
    @classmethod
    def _standard(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("routes") or not isinstance(data.get("pipelines"), Mapping):
            return data
        pipelines = data["pipelines"]
        if "matrix" not in pipelines and not set(data) <= set(cls.model_fields):
            return data  # an unknown key, which may be `routes` misspelt, is what is wrong then
        if "matrix" not in pipelines:
            raise _misrouted(("pipelines",), "without `routes` the pipelines must be named `matrix` and, if wanted, `other`; add `routes`")
        return {**data, "pipelines": {"other": STANDARD_OTHER, **pipelines}, "routes": list(STANDARD_ROUTES)}

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Spec:
        for i, route in enumerate(self.routes):
            if route.use not in self.pipelines:
                raise _misrouted(("routes", i, "use"), f"no pipeline '{route.use}'; {suggest(route.use, self.pipelines)}")
        unused = set(self.pipelines) - {route.use for route in self.routes}
        if unused:
            raise _misrouted(("pipelines", min(unused)), "no route uses this pipeline; add a route or remove it")
        return self

    def to_json(self) -> str:
        """What the spec computes, without its prose, as one line of JSON: the form in which it travels in a checkpoint."""
        plain = self.model_dump(mode="json", exclude={"about", "notes", "published"})
        # Not sort_keys: the order of pipelines says nothing, that of the blocks in a `split` says where each lies.
        plain["pipelines"] = dict(sorted(plain["pipelines"].items()))
        return json.dumps(plain, separators=(",", ":"))

    def to_yaml(self, *, full: bool = False) -> str:
        """YAML that reads back as an equal spec; what has its default value is left out unless `full`."""
        plain = {"version": self.version, **_fields(self, full)}
        plain["pipelines"] = {
            name: {place: _on_a_line(part) for place, part in pipeline.items()} for name, pipeline in plain["pipelines"].items()
        }
        out = io.StringIO()
        yaml = YAML()
        yaml.width = 120
        yaml.dump({key: value if key == "pipelines" else _on_a_line(value) for key, value in plain.items()}, out)
        return out.getvalue()


def _misrouted(place: tuple[int | str, ...], message: str) -> PydanticCustomError:
    """An error of the whole spec that is nevertheless seen at one place."""
    return PydanticCustomError("route", "{message}", {"message": message, "place": place})


def _fields(model: Model, full: bool) -> dict[str, Any]:
    """A model's fields as plain data, its `kind` first; those that have their default value only if `full`."""
    plain: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        default = field.get_default(call_default_factory=True, validated_data={})
        # Where nothing is the default, nothing says it best.
        if name == "kind" or field.is_required() or value != default or (full and value not in (None, ())):
            plain[name] = _plain(value, full)
    if plain.get("selector") == "none":
        del plain["selector"]
    return {"kind": plain.pop("kind"), **plain} if "kind" in plain else plain


def _plain(value: Any, full: bool) -> Any:
    if isinstance(value, Model):
        plain = _fields(value, full)
        return plain["kind"] if list(plain) == ["kind"] else plain
    if isinstance(value, Mapping):
        return {_plain(k, full): _plain(v, full) for k, v in value.items()}
    if isinstance(value, str) and any(sign in value for sign in "\x85\u2028\u2029"):
        return DoubleQuotedScalarString(value)  # else it would be written as the line break that YAML takes it for
    if isinstance(value, tuple):
        items = [_plain(v, full) for v in value]
        return items[0] if len(items) == 1 and isinstance(value[0], Component) else items
    return value


def _on_a_line(value: Any) -> Any:
    """A mapping or a list as YAML writes it on one line, if it fits one; a list of mappings with a line for each."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [_on_a_line(item) for item in value]
    if not isinstance(value, dict | list) or len(str(value)) > 100:
        return value
    node = CommentedMap(value) if isinstance(value, dict) else CommentedSeq(value)
    node.fa.set_flow_style()
    return node


# ----------------------------------------------------------------------------------------------------------------- reading


def preset_names(*, installed: bool = True) -> list[str]:
    """The presets that come with this package, and those of `installed` ones."""
    return presets.names(installed_too=installed)


def load_spec(source: Spec | Mapping[str, Any] | str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Spec:
    """A spec from a preset's name, a path to YAML or JSON, a mapping, or a `Spec`; `overrides` by dotted path.

    Raises:
        SpecError: with file:line:column where there is a file, the field's path, and what is known or meant.
    """
    if isinstance(source, Spec) and not overrides:
        return source
    document = _document(source)
    data = copy.deepcopy(document.data)
    overridden = {_override(data, path, value): path for path, value in (overrides or {}).items()}

    def locate(path: tuple[int | str, ...]) -> str:
        for place, override in overridden.items():
            # What an override put there, and what had to be made on the way.
            if path[: len(place)] == place or (place[: len(path)] == path and not _has(document.data, path)):
                return f"override '{override}'"
        return document.locate(path)

    return _validated(data, locate)


def parse_spec(text: str, source: str = "<string>") -> Spec:
    """A spec from YAML text."""
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
        return Document(_mutable(source), "the given mapping")
    if not isinstance(source, str | os.PathLike):
        raise SpecError(f"a spec is a preset's name, a path, a mapping or a Spec, not {type(source).__name__}")
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
                f"no preset '{short}'; {suggest(text, preset_names())} (a file is given with its ending: ./{short}.yaml){broken}"
            )
        return read_document(source)
    except (DocumentError, presets.PresetError) as error:
        raise SpecError(str(error)) from None


def _mutable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _mutable(v) for key, v in value.items()}
    return [_mutable(v) for v in value] if isinstance(value, list | tuple) else value


def _override(data: dict[str, Any], path: str, value: Any) -> tuple[int | str, ...]:
    """Set one value by dotted path and return its place; the first part is a field of the spec or the name of a pipeline."""
    if not isinstance(path, str) or not all(path.split(".")):
        raise SpecError(f"override {path!r}: give a dotted path, such as 'matrix.selector.rank'")
    parts = path.split(".")
    if parts[0] not in Spec.model_fields:
        _name_pipeline(data, parts[0], path)
        parts = ["pipelines", *parts]
    node: Any = data
    place: list[int | str] = []
    for i, part in enumerate(parts):
        last, where = i == len(parts) - 1, ".".join(parts[:i])
        if isinstance(node, dict) and "kind" in node and part == "0" and not last:
            continue  # one rule may stand for a list of one
        if isinstance(node, list) and len(node) == 1 and not part.isdigit():
            place.append(0)  # and a list of one for its rule
            node = _opened(node, 0, path, where)
        if isinstance(node, list) and (not part.isdigit() or int(part) >= len(node)):
            raise SpecError(f"override '{path}': {where} is a list of {len(node)}; give a number below that, or the whole list")
        key = int(part) if isinstance(node, list) else part
        place.append(key)
        if last:
            node[key] = value
        else:
            node = _opened(node, key, path, f"{where}.{part}" if where else part)
    return tuple(place)


def _name_pipeline(data: dict[str, Any], name: str, path: str) -> None:
    """Check the name of a pipeline; the standard one is written out, so that it can be changed."""
    pipelines = data.setdefault("pipelines", {})
    if not isinstance(pipelines, dict):
        return
    known = [*pipelines] if data.get("routes") else [*pipelines, "other"]
    if name not in known:
        raise SpecError(
            f"override '{path}': '{name}' is neither a pipeline nor a field of a spec; {suggest(name, [*known, *Spec.model_fields])}"
        )
    pipelines.setdefault(name, copy.deepcopy(STANDARD_OTHER))


def _opened(node: Any, key: int | str, path: str, where: str) -> Any:
    """The mapping or list at `key`, made of nothing or of a bare kind if need be."""
    value = node.get(key) if isinstance(node, dict) else node[key]
    if value is None:
        value = {}
    elif isinstance(value, str) and key != "kind" and (find("rule", value) or find("selector", value)):
        value = {"kind": value}
    if not isinstance(value, dict | list):
        raise SpecError(f"override '{path}': {where} is {value!r}, which has no parts")
    node[key] = value
    return value


def _has(data: Any, path: tuple[int | str, ...]) -> bool:
    for part in path:
        if not isinstance(data, dict | list):
            return False
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def with_state_dtype(spec: Spec, chosen: StateDtype | Mapping[str, StateDtype]) -> Spec:
    """The spec with `state_dtype` set in all pipelines.

    A mapping says it by slot, each pipeline taking the slots that its rules have. A word stands for every slot as large as its matrix, or
    as the coordinates of it: the moments, and the error that is fed back.

    Raises:
        SpecError: a word that is no state dtype, a slot that no pipeline has.
    """
    words = get_args(StateDtype)
    for word in chosen.values() if isinstance(chosen, Mapping) else (chosen,):
        if word not in words:
            raise SpecError(f"state_dtype: '{word}' is none; {suggest(str(word), words)}")
    known = {name for pipeline in spec.pipelines.values() for name in pipeline.storable}
    for name in chosen if isinstance(chosen, Mapping) else ():
        if name not in known:
            raise SpecError(
                f"state_dtype: no rule of '{spec.name}' has a slot '{name}' that could be stored otherwise; {suggest(name, known)}"
            )
    data = spec.model_dump(mode="json")
    for name, pipeline in spec.pipelines.items():
        if isinstance(chosen, Mapping):
            own = {slot: word for slot, word in chosen.items() if slot in pipeline.storable}
        else:
            own = {slot: chosen for slot, large in pipeline.storable.items() if large}
        data["pipelines"][name]["state_dtype"] = {**pipeline.state_dtype, **own}
    return _validated(data, lambda path: "state_dtype")


# ------------------------------------------------------------------------------------------------------------------- schema


def json_schema() -> dict[str, Any]:
    """The JSON schema of a spec file, with every kind that is installed."""
    schema = Spec.model_json_schema()
    defs: dict[str, Any] = schema.setdefault("$defs", {})
    for family in ("rule", "selector"):
        known = kinds(family)
        for name, cls in known.items():
            own = cls.model_json_schema()
            defs |= own.pop("$defs", {})
            own["properties"]["kind"] = {"const": name, "title": "Kind", "type": "string"}
            own["required"] = sorted({*own.get("required", []), "kind"})
            defs[f"{family}.{name}"] = own
        refs = [{"$ref": f"#/$defs/{family}.{name}"} for name in known]
        defs[family] = {"anyOf": [{"enum": list(known), "type": "string"}, {"type": "null"}, *refs]}
    schema = _with_families(schema)
    schema["required"] = ["pipelines"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _with_families(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_families(v) for v in node]
    if not isinstance(node, dict):
        return node
    if "x-family" in node:
        return {"$ref": f"#/$defs/{node['x-family']}", **{k: v for k, v in node.items() if k != "x-family"}}
    out = {k: _with_families(v) for k, v in node.items()}
    if out.get("type") == "array" and out.get("items") == {"$ref": "#/$defs/rule"}:
        del out["type"], out["items"]
        out["anyOf"] = [{"$ref": "#/$defs/rule"}, {"type": "array", "items": {"$ref": "#/$defs/rule"}}]
    return out
