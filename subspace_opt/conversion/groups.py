"""Parameter groups: which saved parameter is which of the model, whose spec is what, and the learning rates under the new spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..arguments import Params, named_parameters
from ..checkpoint import keys_in, migrated, names_in
from ..plan.names import canonical_name
from ..spec import Spec, load_spec
from .source import ConversionError

RATES = ("initial_lr", "max_lr", "min_lr")  # rates that schedulers keep in a group
MOST = 5


class SavedGroup(NamedTuple):
    """One parameter group of the saved state."""

    options: Mapping[str, Any]
    ids: list[Any]  # of its parameters, in the saved state
    params: list[tuple[str | None, Tensor]]
    keys: list[str] | None  # of its parameters, if this package saved it
    spec: Spec

    @property
    def is_ours(self) -> bool:
        """True if this package saved it."""
        return self.keys is not None


def read_groups(state_dict: Mapping[str, Any], model: nn.Module | Params) -> tuple[list[SavedGroup], dict[str, Any], Mapping[str, Any]]:
    """The groups with the model's parameters, the options that the model implies, and the saved state in the current layout.

    Raises:
        ConversionError: It is no optimizer's state, or that of an optimizer which cannot be converted, or of another model.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ConversionError("this is not an optimizer's state dictionary: it needs `state` and `param_groups`")
    ours = [isinstance(group.get("spec"), str) for group in state_dict["param_groups"]]
    if any(ours) and not all(ours):
        raise ConversionError(
            "some parameter groups of this state have a `spec` and others have none: it was put together from two optimizers"
        )
    if all(ours):
        state_dict = migrated(state_dict)
    groups = state_dict["param_groups"]
    params, known = named_parameters(model)
    known.pop("process_group", None)  # the converted state is whole
    named = list(_named(params))
    ids = [i for group in groups for i in group["params"]]
    by_id = dict(zip(ids, _matched(groups, ids, named), strict=True))
    keys = keys_in(groups) if all(ours) else [None] * len(groups)
    out = []
    for group, own_keys in zip(groups, keys, strict=True):
        spec = (
            load_spec(_parsed(group["spec"]))
            if all(ours)
            else foreign_spec(group, [state_dict["state"].get(i) or {} for i in group["params"]])
        )
        out.append(SavedGroup(group, list(group["params"]), [by_id[i] for i in group["params"]], own_keys, spec))
    return out, known, state_dict


def _parsed(text: str) -> Spec:
    try:
        return Spec.model_validate_json(text)
    except ValueError as error:
        raise ConversionError(f"the spec in this state cannot be read, perhaps because a plugin is missing: {error}") from None


def _named(params: Params) -> Iterator[tuple[str | None, Tensor]]:
    """Names and parameters of a model, of pairs, of parameters or of groups."""
    for item in params:
        if isinstance(item, Mapping):
            inner = item["params"]
            names = item.get("param_names")
            inner = list(zip(names, inner, strict=True)) if names else ([inner] if isinstance(inner, Tensor) else inner)
            yield from _named(inner)
        elif isinstance(item, Tensor):
            yield None, item
        else:
            yield item[0], item[1]


def _matched(
    groups: Sequence[Mapping[str, Any]], ids: list[Any], named: list[tuple[str | None, Tensor]]
) -> list[tuple[str | None, Tensor]]:
    """For each saved parameter that of the model: by name if both have names, else by position."""
    has_names = all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups)
    if has_names and all(name is not None for name, _ in named):
        own = {canonical_name(name): (name, p) for name, p in named if name is not None}
        saved = [canonical_name(name) for names in names_in(groups) for name in names]
        missing = [name for name in saved if name not in own]
        if missing:
            listed = ", ".join(missing[:MOST]) + (" ..." if len(missing) > MOST else "")
            raise ConversionError(
                f"the state has parameters that the given model lacks: {listed}; give the model that this state belongs to"
            )
        return [own[name] for name in saved]
    for candidates in (named, [pair for pair in named if pair[1].requires_grad]):
        if len(candidates) == len(ids):
            return candidates
    raise ConversionError(
        f"the state has {len(ids)} parameters without names and the given model has {len(named)}; give the parameters in the order in "
        "which the optimizer had them: model=[(name, parameter), ...]"
    )


# ---------------------------------------------------------------------------------------------------- torch's own optimizers


def foreign_spec(group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> Spec:
    """The spec that computes what torch's AdamW, Adam or SGD computes, so that its state can be read as one of this package.

    Raises:
        ConversionError: Another optimizer saved the group.
    """
    slots = sorted({key for state in states for key, value in state.items() if value is not None})
    if "betas" in group and set(slots) <= {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} and group.get("eps") is not None:
        beta1, beta2 = map(float, group["betas"])
        rule = {"kind": "adam", "beta1": beta1, "beta2": beta2, "eps": float(group["eps"]), "amsgrad": bool(group.get("amsgrad"))}
        return _whole("torch.optim.AdamW", {"complement": rule})
    if "dampening" in group and set(slots) <= {"momentum_buffer"}:
        if not group["momentum"]:
            return _whole("torch.optim.SGD", {"complement": {"kind": "sgd"}})
        damped = {"dampening": float(group["dampening"])} if group["dampening"] else {"nesterov": bool(group["nesterov"])}
        rule = {"kind": "heavy_ball", "beta": float(group["momentum"]), **damped}
        return _whole("torch.optim.SGD", {"momentum": rule, "complement": {"kind": "sgd"}})
    options = ", ".join(sorted(set(group) - {"params", "param_names"}))
    raise ConversionError(
        f"this state was saved by an optimizer that cannot be converted: its slots are {', '.join(slots) or 'none'}, its groups have "
        f"{options}. States of subspace_opt and of torch's AdamW, Adam and SGD can be converted"
    )


def _whole(name: str, pipeline: dict[str, Any]) -> Spec:
    return Spec.model_validate({"name": name, "pipelines": {"all": pipeline}, "routes": [{"use": "all", "split": None, "view": "flatten"}]})


# -------------------------------------------------------------------------------------------------------------- new options


def new_options(
    saved: Sequence[SavedGroup], spec: Spec, lr: float | None, weight_decay: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The options of every group under the new spec, and remarks on them.

    A spec of the same name keeps the rates. Another one has its own default, which groups share in the ratios of their old rates, and at
    the point of the schedule that the run has reached.
    """
    same = all(group.spec.name == spec.name for group in saved)
    usual = {"lr": lr, "weight_decay": weight_decay}
    peaks = {"lr": _top(saved, "initial_lr"), "weight_decay": _top(saved, "weight_decay")}
    options: list[dict[str, Any]] = []
    for group in saved:
        made: dict[str, Any] = {"maximize": bool(group.options.get("maximize", False))}
        if group.options.get("use") in spec.pipelines:
            made["use"] = group.options["use"]
        for name, given in usual.items():
            keeps = same and given is None
            wanted = getattr(spec.defaults, name) if given is None else given
            made[name] = float(group.options[name]) if keeps else _scaled(float(group.options[name]), peaks[name], wanted)
            if name == "lr":
                for rate in (rate for rate in RATES if rate in group.options):
                    old = float(group.options[rate])
                    made[rate] = old if keeps else _scaled(old, peaks["lr"], wanted)
        options.append(made)
    return options, list(_remarks(saved, options, same, spec))


def _top(saved: Sequence[SavedGroup], name: str) -> float:
    """The largest value of a rate over all groups; `lr` itself if no scheduler keeps an initial one."""
    return max((float(group.options.get(name, group.options.get("lr", 0.0))) for group in saved), default=0.0)


def _scaled(old: float, top: float, wanted: float) -> float:
    return wanted if top == 0 else wanted * (old / top)


def _remarks(saved: Sequence[SavedGroup], options: Sequence[Mapping[str, Any]], same: bool, spec: Spec) -> Iterator[str]:
    for i, (group, made) in enumerate(zip(saved, options, strict=True)):
        for name in ("lr", "weight_decay"):
            old = float(group.options[name])
            change = f"{old:g}" if old == made[name] else f"{old:g} -> {made[name]:g}"
            yield f"group {i}: {name} {change}" + ("" if same else f" (pass {name}= to choose another)" if old != made[name] else "")
        dropped = [key for key in ("values", "momentum", "betas") if group.is_ours and group.options.get(key)]
        if dropped:
            yield f"group {i}: {', '.join(dropped)} dropped: set them again on the new optimizer, whose paths and rates differ"
        if group.options.get("use") and group.options["use"] not in spec.pipelines:
            yield f"group {i}: use '{group.options['use']}' dropped: '{spec.name}' has no such pipeline, so its routes decide"
