"""The spec as a model: named pipelines, routes that send parameters to them, defaults; and how it is written back."""

from __future__ import annotations

import fnmatch
import io
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from .. import rules, selectors
from ..algebra.pipeline import Pipeline
from ..registry import Component, Model, suggest

__all__ = ["MODULE_KINDS", "Defaults", "ModuleKind", "Route", "Spec", "SpecError", "rules", "selectors"]

ModuleKind = Literal["embedding", "head", "linear", "conv", "norm", "transposed"]
MODULE_KINDS: tuple[str, ...] = get_args(ModuleKind)


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
