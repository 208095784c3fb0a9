"""timm: presets and other specs in timm's registry of optimizers, so that `create_optimizer_v2(model, "cosmos")` builds one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from ..arguments import Params, SpecLike, split_options
from ..optimizer import OPTIONS, SubspaceOptimizer
from ..spec import Spec, load_spec, preset_names
from .libraries import needed

needed("timm", "timm", "1.0.12")

from timm.optim import OptimInfo, OptimizerRegistry  # noqa: E402
from timm.optim._optim_factory import default_registry  # noqa: E402

ANY_SPEC = "subspace"  # the registered name whose option `spec` is a preset's name or a path
PREFIX = "subspace-"  # before the name of a preset that timm has too, such as adamw
REMEDY = "give the model, create_optimizer_v2(model, ...), or named parameters"

_model: ContextVar[nn.Module | None] = ContextVar("model of the optimizer that timm creates", default=None)


def register(specs: Mapping[str, SpecLike] | None = None, registry: OptimizerRegistry = default_registry) -> list[str]:
    """Add specs to timm's registry of optimizers and return the names by which `create_optimizer_v2` finds them.

    timm passes only parameters to an optimizer. The registry is therefore changed: during a call of `create_optimizer` it remembers the
    model that it was given, and names and roles come from that model. All other optimizers are created as before.

    Args:
        specs: Specs by name. None registers all presets, and `subspace`, whose option `spec` is a preset's name or a path. A preset whose
            name timm uses itself is registered with the prefix `subspace-`.
        registry: The registry to change; timm's own by default.

    Raises:
        SpecError: A spec cannot be used.
        ValueError: A name that timm cannot look up, or that it uses itself.
    """
    taken = {name for name in registry.list_optimizers() if not _is_ours(registry, name)}
    if specs is None:
        found = {PREFIX + name if name in taken else name: load_spec(name) for name in preset_names()}
        infos = [*_infos(found), OptimInfo(ANY_SPEC, _create_any, "the spec that the option `spec` gives")]
    else:
        infos = _infos({name: load_spec(spec) for name, spec in specs.items()})
    for info in infos:
        if info.name != info.name.lower() or "_" in info.name:
            raise ValueError(f"timm cannot look up '{info.name}': use lower-case letters, digits and hyphens")
        if info.name in taken:
            raise ValueError(f"timm has an optimizer '{info.name}' of its own; register the spec as '{PREFIX}{info.name}'")
    _remember_model(registry)
    for info in infos:
        registry._optimizers.pop(info.name, None)  # one of ours, from an earlier call
        registry.register(info)
    return [info.name for info in infos]


def _infos(specs: Mapping[str, Spec]) -> list[OptimInfo]:
    """Entries of the registry. They have eps and betas, so that timm passes these options on."""
    return [OptimInfo(name, functools.partial(_create, spec), spec.about or "", has_betas=True) for name, spec in specs.items()]


def _is_ours(registry: OptimizerRegistry, name: str) -> bool:
    created = registry.get_optimizer_info(name).opt_class
    return created is _create_any or (isinstance(created, functools.partial) and created.func is _create)


def _remember_model(registry: OptimizerRegistry) -> None:
    """Make `registry.create_optimizer` remember its model while it runs, and refuse timm's Lookahead around one of our optimizers."""
    create = registry.create_optimizer
    if hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_optimizer(model_or_params: nn.Module | Params, opt: str, *args: Any, **options: Any) -> Any:
        wrapper, _, name = opt.lower().rpartition("_")
        if wrapper and name in registry.list_optimizers() and _is_ours(registry, name):
            raise ValueError(
                f"'{opt}': timm's Lookahead adds weights to the optimizer's state, which no checkpoint could load; write '{name}'"
            )
        token = _model.set(model_or_params if isinstance(model_or_params, nn.Module) else None)
        try:
            return create(model_or_params, opt, *args, **options)
        finally:
            _model.reset(token)

    registry.create_optimizer = create_optimizer


def _create_any(params: Params, *, spec: SpecLike | None = None, **options: Any) -> SubspaceOptimizer:
    if spec is None:
        raise TypeError(f"'{ANY_SPEC}' needs the option `spec`, a preset's name or a path: --opt-kwargs spec=cosmos")
    return _create(load_spec(spec), params, **options)


def _create(spec: Spec, params: Params, **given: Any) -> SubspaceOptimizer:
    """An optimizer from timm's groups, with timm's options as options of the optimizer or overrides of the spec."""
    options, overrides = split_options(given, spec, OPTIONS)
    listed: list[Any] = list(params)
    groups = [_without_fallback(group, spec) for group in (listed if listed and isinstance(listed[0], dict) else [{"params": listed}])]
    model = _model.get()
    if model is None:
        _check_named(groups)
    optimizer = SubspaceOptimizer(groups, spec, model=model, overrides=overrides, **options)
    for group in optimizer.param_groups:
        if "lr_scale" in group:
            group["initial_lr"] = group["lr"]  # from here timm's schedulers start, and multiply by lr_scale
            group["lr"] = group["lr"] * group["lr_scale"]
    return optimizer


def _check_named(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for p in group["params"]:
            if isinstance(p, Tensor):
                raise ValueError(f"a parameter of shape {tuple(p.shape)} has no name, and roles and state depend on names; {REMEDY}")


def _without_fallback(group: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """The group with timm's `use_fallback` as a choice of pipeline: timm calls the pipeline `other` the fallback."""
    kept = {key: value for key, value in group.items() if key != "use_fallback"}
    if not group.get("use_fallback"):
        return kept
    if "other" not in spec.pipelines:
        raise ValueError(
            f"fallback_list selects the pipeline 'other', and '{spec.name}' has {', '.join(spec.pipelines)}; leave the list out"
        )
    return {"use": "other", **kept}
