"""Versions of the state dictionary, and the migrations that bring an older one up to date."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

STATE_VERSION = 2  # version of the state dictionary's layout; every parameter group carries it


class CheckpointError(ValueError):
    """The state dictionary does not fit this optimizer. Nothing has been loaded."""


def _with_version(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """From 0 to 1: groups carry `state_version`, which `migrated` writes."""
    return state_dict


def _with_keys(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """From 1 to 2: a group may carry `keys`. In version 1 the key was always the name. A missing entry means that, too."""
    return state_dict


# From each version to the next. A migration is a pure function of a whole state dictionary, whose `state` may be empty. It returns another
# dictionary and leaves its argument as it is. A change to names, shapes, dtypes or meaning of state needs a migration here and a higher
# STATE_VERSION.
MIGRATIONS: dict[int, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {0: _with_version, 1: _with_keys}


def migrated(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dictionary in the current layout. A dictionary without a version has version 0.

    Raises:
        CheckpointError: The version is unknown here, or groups have different versions.
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
        raise CheckpointError(
            f"the checkpoint's state_version is {odd[0]!r}, not a whole number of 0 or more: the file is damaged, or another optimizer "
            "saved it"
        )
    if len(set(found)) > 1:
        raise CheckpointError(
            f"the checkpoint's parameter groups have different state versions, {sorted(set(found))}: it was put together from several "
            "checkpoints. Load each into an optimizer of its own and save that"
        )
    if found[0] > STATE_VERSION:
        raise CheckpointError(
            f"the checkpoint's state has version {found[0]} and this subspace_opt reads versions up to {STATE_VERSION}; "
            "install the subspace_opt that saved it, or a newer one"
        )
    return int(found[0])
