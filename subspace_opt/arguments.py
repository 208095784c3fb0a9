"""Arguments of an optimizer: a model's parameters, checks of options and groups, and counterparts of other optimizers' options."""

from __future__ import annotations

import fnmatch
import math
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .algebra import Rule, Selector
from .algebra.pipeline import moment_fields
from .algebra.storage import StateDtype
from .plan.modules import module_kinds, refuse_flat
from .plan.names import canonical_name
from .plan.roles import find_roles
from .registry import Component, kind_of, suggest
from .spec import RoleName, Spec, SpecError, with_roles, with_state_dtype

SpecLike = Spec | Mapping[str, Any] | str | os.PathLike[str]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

GROUP_KEYS = (
    "params",
    "param_names",
    "lr",
    "weight_decay",
    "momentum",
    "betas",
    "values",
    "maximize",
    "spec",
    "overrides",
    "use",
    "refresh",
    "state_version",
    "keys",
)
# Keys that schedulers and checkpoints write into groups, and `lr_scale`, by which timm's schedulers multiply a group's lr.
FOREIGN_GROUP_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "lr_scale")


class Counterpart(NamedTuple):
    """Fields of a spec that mean the same as another optimizer's option."""

    family: type[Component]
    field: str
    beside: str = ""  # a field that the component must have too


COUNTERPARTS = {
    "rank": Counterpart(Selector, "rank"),
    "update_proj_gap": Counterpart(Selector, "every"),
    "precondition_frequency": Counterpart(Selector, "every"),
    "shampoo_beta": Counterpart(Selector, "beta"),
    "eps": Counterpart(Rule, "eps", beside="beta2"),
    "adam_beta1": Counterpart(Component, "beta1"),
    "adam_beta2": Counterpart(Component, "beta2"),
    "adam_epsilon": Counterpart(Component, "eps", beside="beta2"),
    "momentum": Counterpart(Rule, "beta", beside="nesterov"),
    "mu": Counterpart(Rule, "beta", beside="nesterov"),
    "nesterov": Counterpart(Rule, "nesterov"),
    "ns_steps": Counterpart(Rule, "steps"),
    "amsgrad": Counterpart(Rule, "amsgrad"),
}
SIDES = {
    "std": "short",
    "reverse_std": "long",
    "right": "right",
    "left": "left",
}  # values of GaLore's `proj_type`, and those of `orient` that mean the same
NOT_NEEDED = {
    "fused": "PyTorch's fused kernels are used for every parameter that they can update",
    "foreach": "matrices of one shape are computed together; the option `stacking` controls that",
    "differentiable": "a step cannot be differentiated",
}


def named_parameters(model_or_params: nn.Module | Params) -> tuple[Params, dict[str, Any]]:
    """Parameters as an optimizer takes them, and the options that a model implies: `modules`, `model_roles`, under DDP `process_group`."""
    if not isinstance(model_or_params, nn.Module):
        return model_or_params, {}
    module = model_or_params
    known: dict[str, Any] = {}
    if isinstance(module, nn.parallel.DistributedDataParallel):
        known["process_group"] = module.process_group
        module = module.module
    refuse_flat(module)
    found, roles = module_kinds(module), find_roles(module)
    named = OrderedDict((canonical_name(name), p) for name, p in module.named_parameters())
    if not named:
        raise SpecError("the model has no parameters")
    known["modules"] = {name: found.get(id(p), frozenset()) for name, p in named.items()}
    known["model_roles"] = {name: roles[id(p)] for name, p in named.items()}
    return named.items(), known


def with_model(params: nn.Module | Params, model: nn.Module | None) -> tuple[Params, dict[str, Any]]:
    """Parameters with the names that a model gives them, and the options that it implies.

    Args:
        params: Parameters, (name, parameter) pairs, groups, or a model, which stands for all its parameters.
        model: Names the parameters that have no names yet. None leaves them as they are.

    Raises:
        ValueError: A parameter without a name is not in the model.
    """
    if isinstance(params, nn.Module):
        return named_parameters(params)
    if isinstance(params, Tensor):
        return params, {}  # torch's class refuses it
    given: list[Any] = list(params)
    if model is None:
        return given, {}
    named: Any
    named, known = named_parameters(model)
    names = {id(p): name for name, p in named}
    return [{**one, "params": _named(one["params"], names)} if _lacks_names(one) else one for one in _grouped(given)], known


def _grouped(given: list[Any]) -> list[Any]:
    """Parameters as one group, if they are not groups already."""
    return given if given and isinstance(given[0], dict) else [{"params": given}]


def _lacks_names(group: Any) -> bool:
    """True if a group holds parameters, and neither pairs nor `param_names` name them."""
    return isinstance(group, dict) and "params" in group and "param_names" not in group


def _named(params: Any, names: Mapping[int, str]) -> list[Any]:
    """Pairs of name and parameter; pairs stay as they are."""
    out: list[Any] = []
    for p in [params] if isinstance(params, Tensor) else params:
        if isinstance(p, Tensor) and id(p) not in names:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is not in the given model; pass the model whose parameters these are")
        out.append((names[id(p)], p) if isinstance(p, Tensor) else p)
    return out


# ------------------------------------------------------------------------------------------------------------------- checks


def with_options(spec: Spec, roles: Mapping[str, RoleName] | None, state_dtype: StateDtype | Mapping[str, StateDtype] | None) -> Spec:
    """The spec with the roles and state dtypes that options of the optimizer give."""
    if roles:
        spec = with_roles(spec, roles)
    return spec if state_dtype is None else with_state_dtype(spec, state_dtype)


def chosen(name: str, value: Any, kind: Any) -> Any:
    """The value of an option, checked against its `Literal` type."""
    if value not in kind.__args__:
        raise ValueError(f"{name} is '{value}'; {suggest(str(value), kind.__args__)}")
    return value


def compile_backend(compile: bool | str) -> str | None:
    """The backend of torch.compile that the option `compile` asks for, None for False.

    Raises:
        ValueError: The installed torch has no backend of that name.
    """
    if isinstance(compile, bool):
        return "inductor" if compile else None
    from torch._dynamo.backends.registry import list_backends  # late: importing the compiler takes seconds

    known = list_backends(exclude_tags=())
    if compile not in known:
        raise ValueError(f"compile is {compile!r}; {suggest(str(compile), known)}")
    return compile


def check_rates(group: Mapping[str, Any]) -> None:
    """Raise a ValueError unless lr and weight decay are finite numbers of 0 or more."""
    lr, decay = group.get("lr", 0.0), group.get("weight_decay", 0.0)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, value in (("learning rate", lr), ("weight_decay value", decay)):
        number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        if not number or not math.isfinite(float(value)) or float(value) < 0:
            raise ValueError(f"Invalid {name}: {value}; it must be a finite number, 0 or more")


def check_moments(group: Mapping[str, Any], spec: Spec) -> None:
    """Raise a ValueError unless `momentum` and `betas` of a group are decay rates that its spec has."""
    momentum, betas = group.get("momentum"), group.get("betas")
    if betas is not None and (not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2):
        raise ValueError(f"Invalid betas: {betas!r}; it must be two numbers, such as (0.9, 0.999)")
    given = ([("momentum", momentum)] if momentum is not None else []) + [(f"betas[{i}]", beta) for i, beta in enumerate(betas or ())]
    for name, value in given:
        number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        if not number or not 0 < float(value) < 1:
            raise ValueError(f"Invalid {name}: {value}; it must be a number between 0 and 1")
    fields = [moment_fields(pipeline) for pipeline in spec.pipelines.values()]
    for name, value, has in (
        ("momentum", momentum, any(f.first for f in fields)),
        ("betas", betas, any(f.first for f in fields) and any(f.second for f in fields)),
    ):
        if value is not None and not has:
            raise ValueError(f"a parameter group sets `{name}`, and no rule of spec '{spec.name}' has such a decay rate; leave it out")


def check_globs(roles: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise a ValueError if a glob of `roles` matches no parameter: the correction would have no effect."""
    for glob in roles:
        if not any(fnmatch.fnmatchcase(name, glob) for name in names):
            raise ValueError(f"roles: '{glob}' matches no parameter; {suggest(glob, names)}")


def warn_of_no_gradient(steps: int) -> None:
    """Warn that several steps in a row found no gradient."""
    warnings.warn(
        f"no parameter had a gradient in {steps} steps in a row, so the optimizer changes nothing. Usual causes: the model's "
        "parameters were replaced after the optimizer was built (`to_empty`, a new layer): build the optimizer after that; the "
        "model is frozen (requires_grad=False); zero_grad() runs between backward() and step(); backward() is not called",
        UserWarning,
        stacklevel=caller_level(),
    )


def caller_level() -> int:
    """The `stacklevel` by which a warning of the calling function names the first line outside this package and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "subspace_opt"):
        frame, level = frame.f_back, level + 1
    return level


def check_group(group: Any, version: int) -> None:
    """Raise if a parameter group is not a dict, has an unknown key, or belongs to another version of the state.

    An unknown key is an error, because ignoring it would hide a typing error.
    """
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group is a dict, such as {{'params': [weight], 'lr': 1e-3}}, and this is a {type(group).__name__}")
    for key in group:
        if key not in GROUP_KEYS + FOREIGN_GROUP_KEYS:
            raise ValueError(
                f"unknown key '{key}' in a parameter group; {suggest(key, GROUP_KEYS)} (options of the spec go into `overrides`, "
                "as {'matrix.selector.rank': 128})"
            )
    if group.get("state_version", version) != version:
        raise ValueError(
            f"this parameter group has state version {group['state_version']}, and the current version is {version}; leave the key out of "
            "a new group: load_state_dict brings older state up to date"
        )


# ------------------------------------------------------------------------------------------------ options of other optimizers


def refuse_options(given: Mapping[str, Any], spec: Spec, known: Sequence[str]) -> None:
    """Raise a TypeError for options that do not exist, and say what to write instead.

    Args:
        spec: The spec in force. Its fields correspond to other optimizers' options.
        known: The options that do exist.
    """
    if not given:
        return
    overrides: dict[str, Any] = {}
    translated, parts = [], []
    for word, value in given.items():
        if found := dict(counterparts(word, value, spec)):
            overrides |= found
            translated.append(f"'{word}'")
        elif word in NOT_NEEDED:
            parts.append(f"'{word}' is not needed, leave it out: {NOT_NEEDED[word]}")
        elif word in COUNTERPARTS or word in ("betas", "scale", "proj_type"):
            parts.append(f"'{word}' has no counterpart in spec '{spec.name}', leave it out")
        else:
            parts.append(f"'{word}' is no option; {suggest(word, known)}")
    if translated:
        verb = "is" if len(translated) == 1 else "are"
        parts.insert(0, f"{', '.join(translated)} {verb} part of the spec '{spec.name}'; use overrides={overrides!r}")
    raise TypeError("; ".join(parts))


def split_options(given: Mapping[str, Any], spec: Spec, known: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options from a trainer's command line or configuration, as options of the optimizer and overrides of its spec.

    An option in neither is another optimizer's word, such as `rank` or `betas`, or a dotted path, such as `matrix.selector.rank`. Both
    become overrides, and an override that is given in `overrides` wins.

    Args:
        known: The options that the optimizer has.

    Raises:
        TypeError: An option that is neither the optimizer's nor has a counterpart in the spec.
    """
    options = {word: value for word, value in given.items() if word in known}
    paths = {word: value for word, value in given.items() if "." in word}
    words = {word: value for word, value in given.items() if word not in known and "." not in word}
    found = {word: dict(counterparts(word, value, spec)) for word, value in words.items()}
    refuse_options({word: words[word] for word, overrides in found.items() if not overrides}, spec, known)
    translated = {path: value for overrides in found.values() for path, value in overrides.items()}
    return options, {**translated, **paths, **(options.pop("overrides", None) or {})}


def counterparts(word: str, value: Any, spec: Spec) -> Iterator[tuple[str, Any]]:
    """Paths and values in the spec that mean the same as another optimizer's option, such as `update_proj_gap` or `betas`."""
    if word == "betas":
        if isinstance(value, Sequence) and len(value) == 2:
            stems = [path.removesuffix("1") for path in _paths(spec, Counterpart(Rule, "beta1", beside="beta2"))]
            yield from ((f"{stem}{i}", beta) for stem in stems for i, beta in enumerate(value, 1))
    elif word == "proj_type":
        yield from ((f"{name}.orient", SIDES[value]) for name in _opening(spec) if value in list(SIDES))
    elif word == "scale":
        found = _paths(spec, Counterpart(Rule, "factor")) or _paths(spec, Counterpart(Rule, "scale"))
        yield from ((path, value) for path in found or [f"{name}.mix.inside" for name in _opening(spec)])
    else:
        yield from ((path, value) for path in _paths(spec, COUNTERPARTS.get(word, Counterpart(Component, word))))
        if word in ("momentum", "mu"):
            yield from ((f"{name}.feedback", value) for name, pipeline in spec.pipelines.items() if pipeline.feedback)


def _opening(spec: Spec) -> list[str]:
    """Names of the pipelines that open a subspace."""
    return [name for name, pipeline in spec.pipelines.items() if pipeline.inside]


def _paths(spec: Spec, wanted: Counterpart) -> list[str]:
    """The paths of a field in all rules and selectors of the spec, as `overrides` takes them."""
    found = []
    for name, pipeline in spec.pipelines.items():
        for place in type(pipeline).model_fields:
            value = getattr(pipeline, place)
            parts = value if isinstance(value, tuple) else (value,)
            for i, part in enumerate(parts):
                found += _paths_in(f"{name}.{place}" + (f".{i}" if len(parts) > 1 else ""), part, wanted)
    return found


def _paths_in(path: str, part: Any, wanted: Counterpart) -> list[str]:
    """The same in one component. Components inside it are searched only if it has no such field itself."""
    if not isinstance(part, wanted.family) or kind_of(type(part)) == "none":
        return []
    fields = type(part).model_fields
    if wanted.field in fields and (not wanted.beside or wanted.beside in fields):
        return [f"{path}.{wanted.field}"]
    return [found for field in fields for found in _paths_in(f"{path}.{field}", getattr(part, field), wanted)]
