"""Roles from names and shapes alone: the words by which the field names its parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

# Parts of a name that wrappers insert. They change nothing about the parameter.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical_name(name: str) -> str:
    """A parameter's name without the parts that `torch.compile`, activation checkpointing and FSDP insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Role:
    """The role of a parameter, with what decided it: a module, the model, its config, a name, the shape, or the user.

    `parts` are the names and rows of the matrices in a fused weight. If their rows alternate, each of `groups` equal groups of rows holds a
    share of every part.
    """

    name: str
    why: str
    parts: tuple[tuple[str, int], ...] = ()
    groups: int = 1
    is_guess: bool = False  # nothing but the number of dimensions decided

    def __str__(self) -> str:
        return f"{self.name} by {self.why}"


# In this order, against every part of a name.
OF_ANY = (
    ("head", re.compile(r"(?<!multi)(?<!multi_)head|^(classifier|score|qa_outputs|unembed\w*|logits?)$")),
    ("router", re.compile(r"router")),
)
# Against the last words of a name: those of a raw parameter, or of an embedding.
POSITION = re.compile(
    r"pos(ition)?s?_?(al)?_?(emb|bias|enc|table)|(^|_)(wpe|position\w*|relative_\w*bias\w*)$|^pos$|positional", re.IGNORECASE
)
OF_RAW = (
    ("ssm", re.compile(r"^(A_logs?|A|D|Ds|dt_bias|time_decay|time_first)$")),
    ("position", POSITION),
    ("token", re.compile(r"tokens?$|token_(embedding|emb)s?$|^(class_embedding|query_embed\w*|latents?|probe|registers?)$", re.IGNORECASE)),
    ("bias", re.compile(r"bias\w*$", re.IGNORECASE)),
    ("hidden", re.compile(r"^experts?$")),
)
OF_PLAIN = (
    ("position", POSITION),
    ("embedding", re.compile(r"^(wte|embed\w*|\w*embeddings?|shared)$", re.IGNORECASE)),
    ("norm", re.compile(r"norm\d*$|^ln(_\w+|\d+)?$", re.IGNORECASE)),
)
PATCH = re.compile(r"patch_?emb", re.IGNORECASE)
GATES = ("gate", "gating", "gate_network", "wg")


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether all dimensions but one are 1, as in the (n, 1) weight of a layer with one input."""
    return math.prod(shape) == max(shape, default=1)


def expert_parents(names: Collection[str]) -> frozenset[str]:
    """The paths of the modules that hold a stack or list of experts."""
    return frozenset(found.group(1) for name in names if (found := re.match(r"(.*?)\.?\bexperts?\b", name)))


def head_or_router(words: list[str], experts: Collection[str]) -> Role | None:
    """The role of a layer whose path says that it is a head or a router."""
    for role, pattern in OF_ANY:
        if word := next((word for word in words if pattern.search(word)), None):
            return Role(role, f"name {word}")
    if words and words[-1] in GATES and ".".join(words[:-1]) in experts:
        return Role("router", f"name {words[-1]} beside experts")
    return None


def raw_role(name: str, shape: tuple[int, ...]) -> Role | None:
    """The role of a parameter that a module of no known class holds: its last word may say it."""
    word = name.rpartition(".")[2]
    for role, pattern in OF_RAW:
        if pattern.search(word):
            return Role(role, f"name {word}")
    return Role("vector", "shape") if is_vector(shape) else None


def role_by_name(name: str, shape: tuple[int, ...], modules: Collection[str] = (), experts: Collection[str] = ()) -> Role:
    """The role of a parameter without its model.

    Args:
        name: Canonical name.
        modules: The kinds of module that hold it, as routes with `module` know them.
        experts: Paths of modules with experts, from `expert_parents`.
    """
    *path, last = name.split(".")
    for kind in ("embedding", "head", "norm", "conv"):
        if kind in modules:
            return Role(kind, f"module kind {kind}") if len(shape) > 1 or kind != "conv" else Role("bias", "module kind conv")
    if len(shape) < 2:
        return Role("bias", f"name {last}") if last.endswith("bias") else Role("vector", "shape")
    words = path if last == "weight" else [*path, last]
    found = head_or_router(words, experts)
    if found is not None:
        return found
    if "linear" in modules:
        return Role("vector", "shape") if is_vector(shape) else Role("hidden", "module kind linear")
    if last == "weight":
        plain = next((Role(role, f"name {words[-1]}") for role, pattern in OF_PLAIN if words and pattern.search(words[-1])), None)
    else:
        plain = raw_role(name, shape)
    if plain is not None:
        return plain
    return Role("vector", "shape") if is_vector(shape) else Role("hidden", "shape", is_guess=True)
