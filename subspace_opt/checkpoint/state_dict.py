"""Matches a saved state dictionary with an optimizer: by name, checked against the plan, with dtypes as saved.

All functions are pure. Nothing of the optimizer changes before everything is checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ..engine import lowbit
from ..plan import COUNTERS, Plan, Row, make_plan
from ..spec import Spec
from .keys import differing, names_in, saved_keys
from .migrations import CheckpointError, migrated

MOST = 5  # differences shown

Reader = Callable[[dict[Tensor, dict[str, Any]]], dict[Tensor, dict[str, Any]]]


def matched(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], plan: Plan, reader: Reader | None = None
) -> tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]]:
    """The state by parameter, and the groups with the saved options, as `Optimizer.__setstate__` takes them.

    Args:
        reader: A function of the checked state by parameter. It returns this rank's part of the state that ranks share, and only that.

    Raises:
        CheckpointError: Spec, parameters, slots, shapes or dtypes differ. The message names the first differences.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise CheckpointError("this is not an optimizer's state dictionary: it needs `state` and `param_groups`")
    for saved in state_dict["param_groups"]:
        if not isinstance(saved.get("spec"), str):
            raise CheckpointError("another optimizer saved this checkpoint: its parameter groups have no `spec`")
    state_dict = migrated(state_dict)
    saved_groups = state_dict["param_groups"]
    own = [p for group in groups for p in group["params"]]
    pairs = _pairs(saved_groups, groups, own)
    rows = dict(zip(map(id, own), plan.rows, strict=True))
    merged = _merged_groups(saved_groups, groups, pairs, rows)
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
    shared = {} if reader is None else reader(state)
    return {param: shared[param] if param in shared else _kept(slots, param, rows[id(param)]) for param, slots in state.items()}, merged


def _kept(slots: dict[str, Any], param: Tensor, row: Row) -> dict[str, Any]:
    """The state of a parameter on its device, in storage of its own."""
    return {key: value if key in COUNTERS else _copied(value, param, key, row) for key, value in slots.items()}


def _copied(value: Tensor, param: Tensor, key: str, row: Row) -> Tensor:
    if lowbit.found(value) is not None:
        return lowbit.copied(value, param.device)
    value = value.detach()
    value = value.full_tensor() if hasattr(value, "full_tensor") else value  # ranks that shared it save a DTensor
    value = value.to(device=param.device, copy=True).contiguous()
    return lowbit.coded(value, row.codes[key]) if key in row.codes else value


def _pairs(saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], own: list[Tensor]) -> list[tuple[Any, Tensor]]:
    """Pairs (saved id, parameter): by name if both sides have names, else by position."""
    saved_ids = [i for group in saved_groups for i in group["params"]]
    names = [n for group in groups for n in group.get("param_names", ())]
    saved_names = [n for some in names_in(saved_groups) for n in some]
    if names and saved_names and all(len(group["params"]) == len(group.get("param_names", ())) for group in saved_groups):
        ids = dict(zip(saved_names, saved_ids, strict=True))
        missing, unknown = sorted(set(names) - set(ids)), sorted(set(ids) - set(names))
        if missing or unknown:
            raise CheckpointError(
                "the checkpoint is of another model: "
                + "; ".join(
                    f"{what} {', '.join(some[:MOST])}{' ...' if len(some) > MOST else ''}"
                    for what, some in (("it lacks", missing), ("it also has", unknown))
                    if some
                )
            )
        return [(ids[name], p) for name, p in zip(names, own, strict=True)]
    if len(saved_groups) != len(groups):
        raise CheckpointError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, and this optimizer has {len(groups)}; "
            "build both optimizers from the model or from named parameters, which are matched by name"
        )
    for i, (a, b) in enumerate(zip(saved_groups, groups, strict=True)):
        if len(a["params"]) != len(b["params"]):
            raise CheckpointError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: group {i} has "
                f"{len(a['params'])} parameters there and {len(b['params'])} here"
            )
    return list(zip(saved_ids, own, strict=True))


def _merged_groups(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[dict[str, Any]], pairs: list[tuple[Any, Tensor]], rows: Mapping[int, Row]
) -> list[dict[str, Any]]:
    """This optimizer's groups with their own parameters and the saved options.

    A group takes its options from the saved group, or groups, that hold its parameters. It keeps its own names, or takes the saved names
    if it has none. Keys are the saved keys.
    """
    home = {i: group for group in saved_groups for i in group["params"]}
    saved_of = {id(p): saved for saved, p in pairs}
    saved_ids = [i for group in saved_groups for i in group["params"]]
    name_of = dict(zip(saved_ids, [name for names in names_in(saved_groups) for name in names], strict=True))
    key_of = saved_keys(saved_groups)
    merged = []
    for index, (group, own_names) in enumerate(zip(groups, names_in(groups), strict=True)):
        own_ids = [saved_of[id(p)] for p in group["params"]]
        sources = distinct([home[i] for i in own_ids]) or list(saved_groups[index : index + 1]) or [group]
        options = _options_of(sources, group, index, [rows[id(p)] for p in group["params"]])
        named = "param_names" in group or not all("param_names" in source for source in sources)
        names = own_names if named else [name_of[i] for i in own_ids]
        given = {} if named else {"param_names": names}
        own = {k: v for k, v in group.items() if k != "keys"}
        merged.append({**own, **options, **given, **differing(names, [key_of[i] for i in own_ids]), "params": group["params"]})
    return merged


def _options_of(sources: Sequence[Mapping[str, Any]], group: Mapping[str, Any], index: int, rows: Sequence[Row]) -> dict[str, Any]:
    """The saved options for one group, checked: the same spec and pipeline as here, and one value for every option."""
    options: list[dict[str, Any]] = [
        {k: dict(v) if isinstance(v, dict) else v for k, v in source.items() if k not in ("params", "param_names", "keys")}
        for source in sources
    ]
    for kept in options:
        _check_spec(kept["spec"], group["spec"], [] if group.get("use") else rows)
        if kept.get("use") != group.get("use"):
            raise CheckpointError(
                f"parameter group {index} has `use` {kept.get('use')!r} in the checkpoint and {group.get('use')!r} here; give it the same"
            )
    clash = sorted({k for kept in options[1:] for k in kept if not equal(kept[k], options[0].get(k))})
    if clash:
        raise CheckpointError(
            f"the parameters of group {index} were saved in groups that differ in {', '.join(clash)}; group them as they were saved"
        )
    return options[0]


def distinct(groups: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every group once, in the order of its first occurrence."""
    return list({id(group): group for group in groups}.values())


def equal(a: Any, b: Any) -> bool:
    """True if two group options are equal. A learning rate may be a tensor."""
    return bool(torch.equal(a, b)) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _check_spec(saved: str, own: str, rows: Sequence[Row]) -> None:
    """Raise unless the saved spec has this spec's pipelines, and its routes or roles lay every row out as they are."""
    if saved == own or _filled(saved) == own:
        return
    try:
        there, here = json.loads(saved), json.loads(own)
        difference = _difference(there["pipelines"], here["pipelines"], "pipelines")
        if difference is None and not _is_same_layout(saved, rows):
            difference = _difference(there["routes"], here["routes"], "routes") or "its roles differ"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's spec cannot be read: {error!r}") from None
    if difference:
        raise CheckpointError(
            f"the checkpoint has spec '{there.get('name')}' and this optimizer has '{here.get('name')}': {difference}; build the optimizer "
            "from the checkpoint's spec"
        )


def _is_same_layout(saved: str, rows: Sequence[Row]) -> bool:
    """Whether the routes of a saved spec give every row the pipeline and the view that it has."""
    try:
        planned = make_plan(Spec.model_validate_json(saved), [row.entry for row in rows])
    except ValueError:  # a spec that no longer reads, or a parameter that no route accepts
        return False
    return all((a.pipeline, a.view) == (b.pipeline, b.view) for a, b in zip(planned.rows, rows, strict=True))


def _filled(text: str) -> str:
    """A saved spec with the fields that specs have gained since. With their default values the code behaves as before."""
    try:
        return Spec.model_validate_json(text).to_json()
    except ValidationError:
        return text  # `_check_spec` then compares the text as it was written


def _difference(there: Any, here: Any, path: str) -> str | None:
    """The first place where two plain values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        if path.endswith(".split") and list(there) != list(here):
            return f"{path} cuts the rows into {', '.join(there)} there and {', '.join(here)} here"
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
    """One parameter's saved state. Every slot that does not fit the plan adds a line to `problems`."""
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
                problems.append(f"'{name}': slot '{key}' is stored as {how}, here as {row.codes.get(key, 'numbers')}")
            out[key] = value
        elif value.dtype != dtype:
            problems.append(f"'{name}': slot '{key}' has dtype {value.dtype}, here {dtype}")
        else:
            out[key] = value
    return out
