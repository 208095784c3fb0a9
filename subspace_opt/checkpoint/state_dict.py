"""State dictionaries: checked against the plan, matched by name, dtypes kept. Pure functions; nothing is changed before all is checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..engine import lowbit
from ..plan import COUNTERS, Plan, Row
from ..spec import Spec

MOST = 5  # differences shown
STATE_VERSION = 1  # of the layout of a state dictionary; every parameter group carries it

Reader = Callable[[Tensor, str, Tensor, tuple[int, ...]], Tensor]


class CheckpointError(ValueError):
    """A state dictionary that is not of this optimizer; nothing has been loaded."""


def _with_version(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Version 1 differs from the first layout by carrying its number, which `migrated` writes."""
    return state_dict


# From each older version to the next. Pure functions of a whole state dictionary, whose `state` may be empty: they return another and
# leave theirs as it is. Who changes names, shapes, dtypes or meaning of state adds one here and raises STATE_VERSION.
MIGRATIONS: dict[int, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {0: _with_version}


def migrated(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dictionary in today's layout; one without a version is of version 0.

    Raises:
        CheckpointError: a version that is not known here, or groups of several versions.
    """
    version = _version(state_dict["param_groups"])
    while version < STATE_VERSION:
        state_dict = MIGRATIONS[version](state_dict)
        version += 1
        state_dict = {**state_dict, "param_groups": [{**group, "state_version": version} for group in state_dict["param_groups"]]}
    return state_dict


def _version(groups: Sequence[Mapping[str, Any]]) -> int:
    found = [group.get("state_version", 0) for group in groups]
    if not found:
        return STATE_VERSION
    odd = [version for version in found if type(version) is not int or version < 0]
    if odd:
        raise CheckpointError(f"the checkpoint's state_version is {odd[0]!r}, not a number: it is damaged, or of another optimizer")
    if len(set(found)) > 1:
        raise CheckpointError(
            f"the checkpoint's parameter groups are of state versions {sorted(set(found))}: it was put together from several; load each "
            "into an optimizer of its own and save that"
        )
    if found[0] > STATE_VERSION:
        raise CheckpointError(
            f"the checkpoint's state is of version {found[0]} and this subspace_opt reads up to {STATE_VERSION}; "
            "install the subspace_opt that saved it, or a newer one"
        )
    return int(found[0])


def matched(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], plan: Plan, readers: Mapping[int, Reader] = MappingProxyType({})
) -> tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]]:
    """The state by parameter and the groups with the saved options, for `Optimizer.__setstate__`.

    `readers`: by `id` of parameters of which this rank keeps a part, how that is taken from a checkpoint's tensor.

    Raises:
        CheckpointError: other spec, other parameters, missing or foreign slots, other shapes or dtypes, naming what differs.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise CheckpointError("this is no optimizer's state dictionary: it needs `state` and `param_groups`")
    for saved in state_dict["param_groups"]:
        if not isinstance(saved.get("spec"), str):
            raise CheckpointError("the checkpoint is of another optimizer: its groups carry no spec")
    state_dict = migrated(state_dict)
    saved_groups = state_dict["param_groups"]
    own = [p for group in groups for p in group["params"]]
    pairs = _pairs(saved_groups, groups, own)
    merged = _merged_groups(saved_groups, groups, pairs)
    rows = dict(zip(map(id, own), plan.rows, strict=True))
    state: dict[Tensor, dict[str, Any]] = {}
    foreign = set(state_dict["state"]) - {saved for saved, _ in pairs}
    if foreign:
        raise CheckpointError(f"the checkpoint has state for parameters in none of its groups: {sorted(map(str, foreign))[:MOST]}")
    problems: list[str] = []
    for saved, param in pairs:
        if saved in state_dict["state"] and state_dict["state"][saved]:
            state[param] = _loaded(state_dict["state"][saved], rows[id(param)], param, problems)
    if problems:
        more = f"\n... and {len(problems) - MOST} more" if len(problems) > MOST else ""
        raise CheckpointError("the checkpoint does not fit this optimizer:\n" + "\n".join(problems[:MOST]) + more)
    for param, slots in state.items():
        for key, value in slots.items():
            if key not in COUNTERS:
                slots[key] = _kept(value, param, key, rows[id(param)], readers.get(id(param)))
    return state, merged


def _kept(value: Tensor, param: Tensor, key: str, row: Row, reader: Reader | None) -> Tensor:
    """A slot on the parameter's device, in a storage of its own: whole, or this rank's part of it."""
    if reader is not None:
        return reader(param, key, value.detach(), row.state[key][0])
    if lowbit.found(value) is not None:
        return lowbit.copied(value, param.device)
    value = value.detach()
    value = value.full_tensor() if hasattr(value, "full_tensor") else value  # saved by ranks that shared it
    value = value.to(device=param.device, copy=True).contiguous()
    return lowbit.coded(value, row.codes[key]) if key in row.codes else value


def _pairs(saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], own: list[Tensor]) -> list[tuple[Any, Tensor]]:
    """(saved id, parameter): by name where both sides have names, else by position."""
    saved_ids = [i for group in saved_groups for i in group["params"]]
    saved_names = [n for group in saved_groups for n in group.get("param_names", ())]
    names = [n for group in groups for n in group.get("param_names", ())]
    if saved_names and names and len(saved_names) == len(saved_ids):
        ids = dict(zip(saved_names, saved_ids, strict=True))
        missing, unknown = sorted(set(names) - set(ids)), sorted(set(ids) - set(names))
        if missing or unknown:
            raise CheckpointError(
                "the checkpoint is of another model: "
                + "; ".join(
                    f"{what} {', '.join(some[:MOST])}{' ...' if len(some) > MOST else ''}"
                    for what, some in (("it lacks", missing), ("it has besides", unknown))
                    if some
                )
            )
        return [(ids[name], p) for name, p in zip(names, own, strict=True)]
    if len(saved_groups) != len(groups):
        raise CheckpointError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, this optimizer has {len(groups)}; "
            "build both from named parameters (or the model) to match by name"
        )
    for i, (a, b) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(a["params"]) != len(b["params"]):
            raise CheckpointError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: group {i} has "
                f"{len(a['params'])} parameters there and {len(b['params'])} here"
            )
    return list(zip(saved_ids, own, strict=True))


def _merged_groups(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[dict[str, Any]], pairs: list[tuple[Any, Tensor]]
) -> list[dict[str, Any]]:
    """Own parameters, saved options: those of the saved group or groups that hold the group's parameters.

    Names are the group's own, or those saved if it has none: draws depend on them.
    """
    home = {i: group for group in saved_groups for i in group["params"]}
    saved_of = {id(p): saved for saved, p in pairs}
    merged = []
    for index, group in enumerate(groups):
        sources = distinct([home[saved_of[id(p)]] for p in group["params"]]) or list(saved_groups[index : index + 1]) or [group]
        options = [{k: v for k, v in source.items() if k not in ("params", "param_names")} for source in sources]
        for kept in options:
            _check_spec(kept["spec"], group["spec"])
            if kept.get("use") != group.get("use"):
                raise CheckpointError(
                    f"parameter group {index} has `use` {kept.get('use')!r} in the checkpoint and {group.get('use')!r} here; "
                    "give it the same"
                )
        clash = sorted({k for kept in options[1:] for k in kept if not equal(kept[k], options[0].get(k))})
        if clash:
            raise CheckpointError(
                f"the parameters of group {index} were in groups with different {', '.join(clash)}; group them as they were saved"
            )
        names = {"param_names": list(sources[0]["param_names"])} if "param_names" in sources[0] and "param_names" not in group else {}
        merged.append({**group, **options[0], **names, "params": group["params"]})
    return merged


def distinct(groups: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each group once, in the order of its first place."""
    return list({id(group): group for group in groups}.values())


def equal(a: Any, b: Any) -> bool:
    """Whether two options of groups are the same; a learning rate may be a tensor."""
    return bool(torch.equal(a, b)) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _check_spec(saved: str, own: str) -> None:
    if saved == own or _filled(saved) == own:
        return
    try:
        there, here = json.loads(saved), json.loads(own)
        difference = _difference(there["pipelines"], here["pipelines"], "pipelines") or _difference(
            there["routes"], here["routes"], "routes"
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's spec cannot be read: {error!r}") from None
    if difference:
        raise CheckpointError(
            f"the checkpoint is of spec '{there.get('name')}', this optimizer of '{here.get('name')}': {difference}; build the optimizer "
            "from the checkpoint's own spec to go on with it"
        )


def _filled(text: str) -> str:
    """A saved spec with what has been added to specs since, at its default: that is what it was before there was a choice."""
    try:
        return Spec.model_validate_json(text).to_json()
    except ValidationError:
        return text  # the difference is told by what is written there


def _difference(there: Any, here: Any, path: str) -> str | None:
    """The first place where two plain values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        if path.endswith(".split") and list(there) != list(here):
            return f"{path} cuts {', '.join(there)} there and {', '.join(here)} here"
        for key in sorted(set(there) | set(here)):
            if key not in there or key not in here:
                return f"{path}.{key} is only in {'the checkpoint' if key in there else 'this spec'}"
            found = _difference(there[key], here[key], f"{path}.{key}")
            if found:
                return found
        return None
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for i, (a, b) in enumerate(zip(there, here, strict=True)):
            found = _difference(a, b, f"{path}.{i}")
            if found:
                return found
        return None
    return None if there == here else f"{path} is {there!r} there and {here!r} here"


def _loaded(saved: Mapping[str, Any], row: Row, param: Tensor, problems: list[str]) -> dict[str, Any]:
    """One parameter's state on its device, in its own storages; what does not fit goes to `problems`."""
    name, out = row.entry.name, {}
    odd = sorted(set(saved) ^ set(row.state))
    problems += [f"'{name}': slot '{key}' is {'unknown here' if key in saved else 'missing'}" for key in odd]
    for key, (shape, dtype) in row.state.items():
        if key not in saved:
            continue
        value = saved[key]
        if key in COUNTERS:
            if not isinstance(value, Tensor | int | float) or (isinstance(value, Tensor) and value.numel() != 1):
                problems.append(f"'{name}': slot '{key}' is {type(value).__name__}, not a number")
                continue
            out[key] = torch.tensor(float(value), dtype=torch.float32)
        elif not isinstance(value, Tensor):
            problems.append(f"'{name}': slot '{key}' is {type(value).__name__}, not a tensor")
        elif tuple(value.shape) != shape:
            problems.append(f"'{name}': slot '{key}' has shape {tuple(value.shape)}, here {shape}")
        elif (how := lowbit.found(value)) is not None:
            if how != row.codes.get(key):
                problems.append(f"'{name}': slot '{key}' is kept as {how}, here as {row.codes.get(key, 'numbers')}")
            out[key] = value
        elif value.dtype != dtype:
            problems.append(f"'{name}': slot '{key}' has dtype {value.dtype}, here {dtype}")
        else:
            out[key] = value
    return out
