"""Names for parameter groups that a trainer made of bare parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..arguments import Params, named_parameters


def named_groups(params: Params, model: nn.Module | None, remedy: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Parameter groups with names, and the options that the model implies: roles, kinds of modules, under DDP its process group.

    Args:
        params: Parameters, (name, parameter) pairs, or parameter groups.
        model: The model that holds the parameters. None if only names that come with the parameters are known.
        remedy: What a user writes to give the names. It ends the message of an error.

    Raises:
        ValueError: A parameter has no name.
    """
    names: Mapping[int, str] = {}
    known: dict[str, Any] = {}
    if model is not None:
        pairs, known = named_parameters(model)
        names = {id(p): name for name, p in pairs}
    given = list(params)
    groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]  # type: ignore[assignment]
    return [{**group, "params": _named(group, names, remedy)} for group in groups], known


def _named(group: Mapping[str, Any], names: Mapping[int, str], remedy: str) -> list[tuple[str, Tensor]]:
    params: Iterable[Any] = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    pairs = []
    for item in params:
        name, p = item if isinstance(item, tuple) else (names.get(id(item)), item)
        if name is None:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} has no name, and roles and state depend on names; {remedy}")
        pairs.append((name, p))
    return pairs
