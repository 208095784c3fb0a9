"""Keys of parameters: the words that seed their random draws and spread their refreshes.

A parameter's key is its canonical name when the optimizer is built, or `group0.param1` if it has no name. Loading a checkpoint gives it the
key under which its state was made, and it keeps that key for the rest of the run, under any name. Groups and checkpoints carry
`keys`, a mapping from name to key, for the parameters whose key is not their name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..plan.names import canonical_name
from .migrations import CheckpointError


def names_in(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of every group's parameters: those given, or `group0.param1`.

    `torch.distributed.checkpoint` lists a group's parameters by qualified name in the order of the optimizer that loads. The list
    `param_names` beside it has the order of the optimizer that saved. The qualified names give the order if both lists hold the same names,
    or if their lengths differ.
    """
    out = []
    for g, group in enumerate(groups):
        ids, given = list(group["params"]), list(group.get("param_names") or ())
        by_canonical = {canonical_name(name): name for name in given}
        qualified = bool(given) and all(isinstance(i, str) for i in ids)
        if qualified and {canonical_name(i) for i in ids} == set(by_canonical):
            out.append([by_canonical[canonical_name(i)] for i in ids])
        elif qualified and len(given) != len(ids):
            out.append(ids)
        else:
            out.append(given[: len(ids)] if len(given) >= len(ids) else [f"group{g}.param{i}" for i in range(len(ids))])
    return out


def keys_in(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The keys of every group's parameters."""
    out = []
    for group, names in zip(groups, names_in(groups), strict=True):
        kept = group.get("keys") or {}
        out.append([kept.get(name, canonical_name(name)) for name in names])
    return out


def saved_keys(groups: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    """The key of every saved parameter, by the id that the checkpoint gives it.

    Raises:
        CheckpointError: `keys` is no mapping of strings to strings, or two parameters share a key.
    """
    for group in groups:
        kept = group.get("keys") or {}
        if not isinstance(kept, Mapping) or not all(isinstance(word, str) and word for pair in kept.items() for word in pair):
            raise CheckpointError(f"the checkpoint's `keys` must map names to keys, but the file is damaged and has {kept!r}")
    keys = [key for some in keys_in(groups) for key in some]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise CheckpointError(
            f"two parameters of the checkpoint have the key '{twice[0]}', so their random draws would be equal: the file is damaged"
        )
    return dict(zip((i for group in groups for i in group["params"]), keys, strict=True))


def differing(names: Sequence[str], keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """The entry `keys` of a group, or nothing if every key is its parameter's canonical name."""
    found = {name: key for name, key in zip(names, keys, strict=True) if key != canonical_name(name)}
    return {"keys": found} if found else {}
