"""Rows of a plan: the kind, the view and the state of one parameter. No tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from ..algebra import storage
from ..algebra.frame import Frame
from ..algebra.storage import Codes
from .names import Role, canonical_name
from .views import Block, View

STEP_BYTES = 4  # the float32 counter of a parameter
COUNTERS = ("step", "refreshed")  # scalars kept on the host: the number of updates, and the update that took the last new basis


UNKNOWN = Role("hidden", "shape", is_guess=True)


@dataclass(frozen=True)
class Entry:
    """A parameter, as the plan knows it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    modules: frozenset[str] = frozenset()
    frozen: bool = False
    lr: float = 0.0
    weight_decay: float = 0.0
    use: str | None = None  # the pipeline that the parameter's group chose; it overrides all routes
    role: Role | None = None  # as a model tells it; None: by name and shape
    key: str = ""  # seeds the random draws and spreads the refreshes; the default is the canonical name

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", canonical_name(self.name))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Row:
    """One parameter of the plan."""

    entry: Entry
    view: View
    pipeline: str
    splits: tuple[tuple[Block, Frame], ...]
    why: str
    role: Role = UNKNOWN
    compensated: bool = False
    decay: float = 0.0
    lr_scale: float = 1.0
    decay_scale: float = 1.0
    position: tuple[int, int] = (0, 1)  # index among the parameters of its pipeline, and how many there are

    @property
    def key(self) -> str:
        """The word that stands for this parameter in every random draw; no two parameters of an optimizer share one."""
        return self.entry.key

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of its matrices during a step, and of its state unless a slot says otherwise."""
        return torch.float64 if self.entry.dtype == torch.float64 else torch.float32

    @cached_property
    def turn(self) -> float:
        """A number in [0, 1) that spreads refreshes over a period. It depends on the key alone, not on the other parameters."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32

    @cached_property
    def state(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor of its state."""
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"step": ((), torch.float32)}
        for block, frame in self.splits:
            for key, slot in frame.slots.items():
                shape = slot.shape if block.count == 1 else (block.count, *slot.shape)
                named = torch.float32 if key in frame.codes else storage.DTYPES.get(frame.wanted.get(key, ""))
                out[state_key(block, key)] = (shape, named or slot.dtype or self.compute_dtype)
        if any(slot.transport == "reset" for _, frame in self.splits for slot in frame.slots.values()):
            out["refreshed"] = ((), torch.float32)  # slots that restart at a refresh are bias-corrected from this update on
        if self.compensated:
            out["compensation"] = (self.entry.shape, self.entry.dtype)
        return out

    @cached_property
    def codes(self) -> dict[str, Codes]:
        """The tensors of its state that are stored as codes. Their dtype in `state` is that of the decoded numbers."""
        return {state_key(block, key): how for block, frame in self.splits for key, how in frame.codes.items()}

    @cached_property
    def stored(self) -> dict[str, str]:
        """How each slot named in the spec's `state_dtype` is stored, with the reason if that differs from what was asked."""
        out = {}
        for block, frame in self.splits:
            for key, wanted in frame.wanted.items():
                why = storage.why_not(wanted, prod(frame.slots[key].shape))
                out[state_key(block, key)] = f"{_short(self.compute_dtype)} ({why})" if why else wanted
        return out

    @property
    def converts(self) -> bool:
        """True if a slot is stored in another dtype than it is computed in. Fused kernels, which work in place, then cannot be used."""
        slots = {state_key(block, key): slot for block, frame in self.splits for key, slot in frame.slots.items()}
        return bool(self.codes) or any(self.state[key][1] != (slot.dtype or self.compute_dtype) for key, slot in slots.items())

    @property
    def state_bytes(self) -> int:
        """Bytes of state held once the parameter has had a gradient."""
        if self.entry.frozen:
            return 0
        return sum(
            self.codes[key].nbytes(prod(shape)) if key in self.codes else prod(shape) * dtype.itemsize
            for key, (shape, dtype) in self.state.items()
        )

    @property
    def matrices(self) -> int:
        """Number of matrices that its view makes of the parameter."""
        return sum(block.count for block, _ in self.splits)

    @property
    def ranks(self) -> list[int]:
        """Rank of each block after clamping."""
        return [frame.rank for _, frame in self.splits if frame.rank is not None]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "name": self.entry.name,
            "shape": list(self.entry.shape),
            "role": self.role.name,
            "view": str(self.view),
            "pipeline": self.pipeline,
            "rank": self.ranks,
            "lr_scale": self.lr_scale,
            "weight_decay": self.decay,
            "state_bytes": self.state_bytes,
            "stored": self.stored,
            "adamw_bytes": adamw_bytes(self.entry),
            "why": self.why,
        }


def said(row: Row) -> str:
    """How the slots named in `state_dtype` are stored, as the text of one table cell."""
    return ", ".join(f"{key} {how}" for key, how in row.stored.items()) or "-"


def state_key(block: Block, key: str) -> str:
    """The name of a slot in a parameter's state."""
    return f"{block.name}.{key}" if block.name else key


def adamw_bytes(entry: Entry) -> int:
    """Bytes of `torch.optim.AdamW`'s state: two moments in the parameter's dtype and a counter."""
    return 0 if entry.frozen else 2 * entry.numel * entry.dtype.itemsize + STEP_BYTES


def _short(dtype: torch.dtype) -> str:
    return "fp64" if dtype == torch.float64 else "fp32"
