"""The spec as a model: named pipelines, routes that send parameters to pipelines, and defaults. Also writes a spec as YAML and JSON."""

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
from ..schedules import Scheduled
from .summary import spec_html, spec_text

__all__ = ["MODULE_KINDS", "ROLES", "Defaults", "ModuleKind", "RoleName", "Route", "Spec", "SpecError", "rules", "selectors"]

ModuleKind = Literal["embedding", "head", "linear", "conv", "norm", "transposed"]
MODULE_KINDS: tuple[str, ...] = get_args(ModuleKind)
RoleName = Literal[
    "embedding", "position", "token", "patch", "head", "router", "norm", "bias", "vector", "conv", "depthwise", "ssm", "fused", "hidden"
]
ROLES: tuple[str, ...] = get_args(RoleName)


class SpecError(ValueError):
    """The spec cannot be used. The message says where the error is, what was found there, what is allowed and what to do."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Defaults(Model):
    """The values that `build` uses unless the caller gives others."""

    lr: float = Field(1e-3, ge=0.0, description="Learning rate.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay, multiplied by the learning rate.")


class Route(Model):
    """Sends parameters to a pipeline and says how they are viewed as matrices. A parameter must meet all conditions of the route."""

    use: str = Field(description="Name of the pipeline that the parameters use.")
    name: Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = Field(
        (), description="Globs. At least one must match the parameter's name."
    )
    module: Annotated[tuple[ModuleKind, ...], BeforeValidator(_listed, json_schema_input_type=ModuleKind | list[ModuleKind])] = Field(
        (), description="Kinds of module. The parameter must belong to one of them; kinds are known only if `build` is given a model."
    )
    role: Annotated[tuple[RoleName, ...], BeforeValidator(_listed, json_schema_input_type=RoleName | list[RoleName])] = Field(
        (), description="Roles. The parameter must have one of them. docs/roles.md says how a role is found."
    )
    min_dims: NonNegativeInt | None = Field(None, description="Smallest number of dimensions.")
    max_dims: NonNegativeInt | None = Field(None, description="Largest number of dimensions.")
    min_side: PositiveInt | None = Field(None, description="Lower bound for the shorter side of the matrices.")
    max_side: PositiveInt | None = Field(None, description="Upper bound for the longer side of the matrices.")
    view: Literal["auto", "flatten", "stack", "modes"] = Field(
        "auto",
        description="How a parameter of three or more dimensions is viewed. `flatten`: one matrix (O, rest). `stack`: a stack of matrices. "
        "`modes`: one matrix (O, rest) whose joined dimensions get a basis each (selector `kron_eigen`). `auto`: `flatten` for "
        "convolutions and for four or more dimensions, else `stack`.",
    )
    merge: PositiveInt | None = Field(
        None,
        description="With `view: modes`: neighbouring dimensions, the first included, are joined while their product is at most this "
        "(SOAP's `merge_dims`). The first joined dimension is the rows.",
        examples=[64],
    )
    split: dict[str, PositiveInt] | Literal["auto"] | None = Field(
        "auto",
        description="Cuts the rows of a fused weight into blocks: name of the block to number of rows. `auto` cuts a weight of role "
        "`fused` into its known parts, unless its pipeline updates every entry by itself. `null` cuts nothing.",
    )
    heads: PositiveInt | None = Field(None, description="Cuts the rows into this number of equal blocks.")
    transposed: bool | None = Field(None, description="Whether the weight is stored as (in, out). If omitted, the module's type decides.")

    @model_validator(mode="after")
    def _one_cut(self) -> Route:
        if isinstance(self.split, dict) and self.heads is not None:
            raise ValueError("`split` and `heads` both cut the rows; give one of them")
        if self.merge is not None and self.view != "modes":
            raise ValueError("`merge` joins the dimensions of `view: modes`; use that view, or leave `merge` out")
        if self.merge is not None and (isinstance(self.split, dict) or self.heads is not None):
            raise ValueError("`merge` may join the rows that `split` or `heads` would cut; leave one of them out")
        return self

    def accepts(self, name: str, dims: int, sides: tuple[int, int], modules: frozenset[str], role: str = "") -> bool:
        """True if a parameter takes this route. `sides`: the shorter and the longer side of its matrices."""
        return (
            (not self.name or any(fnmatch.fnmatchcase(name, glob) for glob in self.name))
            and (not self.module or bool(modules.intersection(self.module)))
            and (not self.role or role in self.role)
            and (self.min_dims is None or dims >= self.min_dims)
            and (self.max_dims is None or dims <= self.max_dims)
            and (self.min_side is None or sides[0] >= self.min_side)
            and (self.max_side is None or sides[1] <= self.max_side)
        )

    def __str__(self) -> str:
        given = self.model_dump(exclude={"use"}, exclude_defaults=True)
        conditions = [f"{key} {'|'.join(v) if isinstance(v, tuple) else v}" for key, v in given.items()]
        return ", ".join(conditions) or "everything else"


# The routes of a spec that has a pipeline `matrix` and no routes. Its `other` is AdamW unless the spec defines one.
STANDARD_ROUTES = (
    {"role": ["hidden", "fused", "conv"], "use": "matrix"},
    {"use": "other"},
)
STANDARD_OTHER = {"complement": {"kind": "adam", "beta1": 0.9, "beta2": 0.95}}


class Spec(Model):
    """A complete optimizer."""

    version: Literal[1] = Field(1, description="Version of the file format.")
    name: str = Field("unnamed", min_length=1, description="Name of the spec, used in messages and tables.")
    source: tuple[str, ...] = Field((), strict=False, description="The paper, and the reference code with its commit.")
    about: str = Field("", description="What the optimizer does, in a few lines.")
    notes: str = Field("", description="How the spec differs from its sources, and how the sources differ from each other.")
    published: tuple[str, ...] = Field((), strict=False, description="Settings that the authors published, by model size.")
    defaults: Defaults = Field(default=Defaults(), description="Learning rate and weight decay that `build` uses unless others are given.")
    pipelines: dict[str, Pipeline] = Field(min_length=1, description="The pipelines by name.")
    routes: tuple[Route, ...] = Field(
        (), strict=False, description="Tried in order. The first route that accepts a parameter decides its pipeline."
    )
    roles: dict[str, RoleName] = Field(
        {}, description="Corrects roles: glob of parameter names to role. The first glob that matches decides, before the model does."
    )

    @model_validator(mode="before")
    @classmethod
    def _standard(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("routes") or not isinstance(data.get("pipelines"), Mapping):
            return data
        pipelines = data["pipelines"]
        if "matrix" not in pipelines and not set(data) <= set(cls.model_fields):
            return data  # the unknown key, perhaps a misspelt `routes`, is the error to report
        if "matrix" not in pipelines:
            raise _misrouted(
                ("pipelines",), "a spec without `routes` needs a pipeline named `matrix` and may have `other`; rename it or add `routes`"
            )
        return {**data, "pipelines": {"other": STANDARD_OTHER, **pipelines}, "routes": list(STANDARD_ROUTES)}

    @model_validator(mode="after")
    def _routes_lead_somewhere(self) -> Spec:
        for i, route in enumerate(self.routes):
            if route.use not in self.pipelines:
                raise _misrouted(("routes", i, "use"), f"no pipeline is named '{route.use}'; {suggest(route.use, self.pipelines)}")
        unused = set(self.pipelines) - {route.use for route in self.routes}
        if unused:
            raise _misrouted(
                ("pipelines", min(unused)), "no route uses this pipeline; add a route with `use: NAME`, or remove the pipeline"
            )
        return self

    def __repr__(self) -> str:
        return spec_text(self.name, *self._shown())

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return spec_html(self.name, *self._shown())

    def _shown(self) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
        """Pipelines as plain data without defaults, and pairs of (condition, pipeline), for `summary`."""
        pipelines = {name: _fields(pipeline, full=False) for name, pipeline in self.pipelines.items()}
        return pipelines, [(str(route), route.use) for route in self.routes]

    def to_json(self) -> str:
        """The spec without its prose, as one line of JSON. Checkpoints store this form."""
        plain = self.model_dump(mode="json", exclude={"about", "notes", "published"})
        # Not sort_keys: the order of the blocks in a `split` says which rows each has. Only the order of the pipelines has no meaning.
        plain["pipelines"] = dict(sorted(plain["pipelines"].items()))
        return json.dumps(plain, separators=(",", ":"))

    def to_yaml(self, *, full: bool = False) -> str:
        """YAML that reads back as an equal spec. Without `full`, fields with their default value are left out."""
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
    """A validation error of the whole spec, reported at one place in it."""
    return PydanticCustomError("route", "{message}", {"message": message, "place": place})


def _fields(model: Model, full: bool) -> dict[str, Any]:
    """A model's fields as plain data, `kind` first. Fields with their default value are included only if `full`."""
    plain: dict[str, Any] = {}
    schedules = model.schedules if isinstance(model, Scheduled) else {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if name in schedules:
            plain[name] = schedules[name].plain()
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        # A default of None or () is left out even if `full`: reading the file gives the same default.
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
        return DoubleQuotedScalarString(value)  # YAML reads these characters as line breaks unless they are quoted
    if isinstance(value, tuple):
        items = [_plain(v, full) for v in value]
        return items[0] if len(items) == 1 and isinstance(value[0], Component) else items
    return value


def _on_a_line(value: Any) -> Any:
    """Mark a mapping or list of at most 100 characters to be written on one line; in a list of mappings, each mapping gets a line."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [_on_a_line(item) for item in value]
    if not isinstance(value, dict | list) or len(str(value)) > 100:
        return value
    node = CommentedMap(value) if isinstance(value, dict) else CommentedSeq(value)
    node.fa.set_flow_style()
    return node
