"""The content of a snapshot: state under flat keys, its comparison with model and optimizer, and empty tensors to load it into."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from ..checkpoint import MOST, differing, distinct, equal, matched, names_in, saved_keys
from ..optimizer import SubspaceOptimizer
from .manifest import SnapshotError

MODEL = "model."
STATE = "optimizer.state."


@dataclass
class Content:
    """The state of model and optimizer by flat keys, under the names that parameters have without wrappers."""

    tensors: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)  # all values that are not tensors
    slots: dict[str, tuple[str, str]] = field(default_factory=dict)  # (parameter, slot) by key
    groups: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def now(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> Content:
        """The state to save. It has no optimizer state if the optimizer has made no step."""
        fresh = not optimizer.state
        content = cls.template(model, optimizer)
        if fresh:  # `template` has made this state
            for key in content.slots:
                content.tensors.pop(key, None)
                content.values.pop(key, None)
            content.slots = {}
        return content

    @classmethod
    def template(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> Content:
        """The keys, shapes and dtypes to load into: as `now`, but with the state that an optimizer would have after its first step."""
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise SnapshotError("the model is wrapped in FullyShardedDataParallel (FSDP1); snapshots support fully_shard (FSDP2)")
        fresh = not optimizer.state
        weights, held = get_state_dict(model, optimizer)
        found: Any = held  # `state` and `param_groups`; the annotation gives both one type
        if fresh:  # torch has made a step to learn which state there is, and AdamW would count that step
            optimizer.state.clear()
        content = cls(groups=list(found["param_groups"]))
        for name, value in weights.items():
            content._put(MODEL + name, value)
        for name, slots in found["state"].items():
            for slot, value in slots.items():
                content._put(f"{STATE}{name}.{slot}", value)
                content.slots[f"{STATE}{name}.{slot}"] = (name, slot)
        return content

    def _put(self, key: str, value: Any) -> None:
        if key in self.tensors or key in self.values:
            raise SnapshotError(f"two entries of the state have the key '{key}'; rename the parameter")
        (self.tensors if isinstance(value, Tensor) else self.values)[key] = value


def packed_rest(content: Content, optimizer: torch.optim.Optimizer, extra: Any) -> bytes:
    """The bytes of the file with all values that are not tensors.

    Raises:
        SnapshotError: the file could not be loaded again with `weights_only=True`.
    """
    rest = {
        "optimizer": type(optimizer).__qualname__,
        "param_groups": content.groups,
        "slots": content.slots,
        "values": content.values,
        "extra": extra,
    }
    file = io.BytesIO()
    try:
        torch.save(rest, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # objects may raise any exception when they are pickled
        raise SnapshotError(
            "`extra`, an option of a parameter group or an entry of state could not be loaded again with torch.load(weights_only=True); "
            f"turn it into tensors, numbers, strings, lists and dicts: {error}"
        ) from error
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------------------- loading


def check_model(path: Path, own: Content, rest: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes of the model with the snapshot.

    Raises:
        SnapshotError: they differ.
    """
    here = {key for key in (*own.tensors, *own.values) if key.startswith(MODEL)}
    there = {key for key in (*metadata, *rest["values"]) if key.startswith(MODEL)}
    problems = _named("the snapshot lacks", here - there) + _named("the snapshot has in addition", there - here)
    problems = problems or _differences(own, metadata, here)
    if problems:
        raise SnapshotError(f"{path} belongs to another model: {'; '.join(problems[:MOST])}; build the model as it was when it was saved")


def _named(what: str, keys: set[str]) -> list[str]:
    names = sorted(key.removeprefix(MODEL) for key in keys)
    return [f"{what} {', '.join(names[:MOST])}{' ...' if len(names) > MOST else ''}"] if names else []


def _differences(own: Content, metadata: Mapping[str, Any], keys: set[str]) -> list[str]:
    """A sentence for each tensor whose shape or dtype differs. torch.distributed.checkpoint would cast it silently."""
    out = []
    for key in sorted(keys):
        if key in own.tensors and key in metadata:
            value, saved = own.tensors[key], metadata[key]
            if tuple(value.shape) != tuple(saved.size):
                out.append(f"'{key.removeprefix(MODEL)}' has shape {tuple(saved.size)} there and {tuple(value.shape)} here")
            elif value.dtype != saved.properties.dtype:
                out.append(f"'{key.removeprefix(MODEL)}' has dtype {saved.properties.dtype} there and {value.dtype} here")
    return out


def arranged(path: Path, saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The saved options of parameter groups, rearranged to the groups, order and names of the optimizer.

    Most optimizers match groups and parameters by position.

    Raises:
        SnapshotError: the parameters differ, or parameters of one group were saved in groups with different options.
    """
    home = {name: group for group in saved for name in group["params"]}
    names = {name: other for group in saved for name, other in zip(group["params"], group.get("param_names", ()), strict=False)}
    here = {name for group in own for name in group["params"]}
    problems = _named("the snapshot lacks", here - set(home)) + _named("the snapshot has in addition", set(home) - here)
    if problems:
        raise SnapshotError(
            f"{path}: the optimizer has other parameters than the saved one: {'; '.join(problems)}; build the optimizer as it was saved"
        )
    out = []
    for index, group in enumerate(own):
        sources = distinct([home[name] for name in group["params"]]) or list(saved[index : index + 1]) or [group]
        options = [{k: v for k, v in source.items() if k not in ("params", "param_names", "keys")} for source in sources]
        clash = sorted({k for other in options[1:] for k in other if not equal(other[k], options[0].get(k))})
        if clash:
            raise SnapshotError(
                f"{path}: the saved groups of the parameters of group {index} differ in {', '.join(clash)}; group them as they were saved"
            )
        arranged = {k: _on_device_of(group.get(k), v) for k, v in options[0].items()}
        if "param_names" in group or any(name in names for name in group["params"]):
            arranged["param_names"] = list(group.get("param_names") or (names[name] for name in group["params"]))
        out.append({**arranged, "params": list(group["params"])})
    if all("state_version" in group for group in saved):  # only this package's optimizers have keys
        keys = saved_keys(saved)
        for group, called in zip(out, names_in(out), strict=True):
            group |= differing(called, [keys[name] for name in group["params"]])
    return out


def _on_device_of(own: Any, value: Any) -> Any:
    """The saved option `value`. A tensor, such as a learning rate, moves to the device of `own`, the optimizer's value."""
    return value.to(own.device) if isinstance(value, Tensor) and isinstance(own, Tensor) else value


def check_optimizer(
    path: Path,
    own: Content,
    rest: Mapping[str, Any],
    metadata: Mapping[str, Any],
    groups: list[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Compare the optimizer with the saved one, before any large file is read.

    A `SubspaceOptimizer` checks the parameter groups with its own code, because it can load state of an older version with other slots.

    Raises:
        SnapshotError: the class of the optimizer, the slots, their shapes or dtypes differ.
        CheckpointError: the state of a SubspaceOptimizer belongs to another spec or version.
    """
    if isinstance(optimizer, SubspaceOptimizer):
        matched({"state": {}, "param_groups": groups}, optimizer.param_groups, optimizer.plan)
        return
    if rest["optimizer"] != type(optimizer).__qualname__:
        raise SnapshotError(
            f"{path} has the state of {rest['optimizer']}, and this is {type(optimizer).__qualname__}: build the optimizer as it was saved"
        )
    here, there = _slots_of(own.slots), _slots_of(rest["slots"])
    problems = [
        f"'{name}' has slots {', '.join(sorted(there[name]))} there and {', '.join(sorted(here[name]))} here"
        for name in sorted(here.keys() & there.keys())
        if here[name] != there[name]
    ]
    problems = problems or _differences(own, metadata, set(own.slots))
    if problems:
        raise SnapshotError(
            f"{path}: the optimizer has other options than the saved one: {'; '.join(problems[:MOST])}; build the optimizer as it was saved"
        )


def _slots_of(slots: Mapping[str, tuple[str, str]]) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for name, slot in slots.values():
        out.setdefault(name, set()).add(slot)
    return out


def empty_like_saved(key: str, saved: Any, own: Content, slots: Mapping[str, tuple[str, str]]) -> Tensor:
    """An empty tensor to load a saved one into, with the placements of the same tensor in this model or optimizer.

    A slot that the optimizer does not have yet gets the placements of its parameter if the shapes agree; else the tensor is not sharded.
    """
    alike = own.tensors.get(key)
    if alike is None and key in slots:
        alike = own.tensors.get(MODEL + slots[key][0])
    if alike is not None and tuple(alike.shape) == tuple(saved.size):
        return torch.empty_like(alike, dtype=saved.properties.dtype, requires_grad=False)
    return torch.empty(saved.size, dtype=saved.properties.dtype)
