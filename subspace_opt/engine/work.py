"""The units of one step: parameters, pieces of them, and stacks of pieces that are computed together.

A *piece* is a run of matrices of one parameter; a *stack* is pieces of equal shape, pipeline and age.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from ..algebra.frame import Frame
from ..algebra.pipeline import Values
from ..plan import COUNTERS, Row, state_key
from ..plan.views import Block
from . import lowbit
from .flags.gate import each, gated
from .rounding import Rounding
from .strategies import part_of_rows

Nonfinite = Literal["raise", "skip", "propagate"]
Stacking = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Options:
    """Options of the engine beside the spec."""

    nonfinite: Nonfinite = "raise"
    rounding: Rounding = "nearest"
    stacking: Stacking = "auto"
    batch_bytes: int = 64 * 2**20
    seed: int = 0
    capturable: bool = False  # counters are on the device, and no step between refreshes reads them


@dataclass
class Work:
    """One parameter in one step."""

    row: Row
    param: Tensor
    grad: Tensor
    lr: float | Tensor
    weight_decay: float
    state: dict[str, Any] = field(default_factory=dict)
    scale: float | Tensor = 1.0  # brings a gradient too large to be squared back into range
    gate: Tensor | None = None  # 0-d bool on the device: the parameter is updated; None: it is, and the host knows it
    refresh: bool = False  # requested by a call, or repeated after a failure
    count: int = 0  # updates before this one; -1: all gradients so far were 0
    last_refresh: int | None = None  # the update of the last refresh, if the counter of the state is on a device
    held: bool = False  # the first update failed and is not counted
    silent: set[int] = field(default_factory=set)  # matrices, or experts, that get neither update nor decay
    values: Values = ()  # numbers of the pipeline that the parameter's group sets
    holders: tuple[int, ...] = ()  # ranks that update the same matrix, each its own copy
    outbox: Tensor | None = None  # receives the update, of the parameter's shape, if the weights are on other ranks

    @property
    def name(self) -> str:
        return self.row.entry.name

    @property
    def key(self) -> str:
        """The word that random draws and refresh offsets depend on."""
        return self.row.key

    @cached_property
    def splits(self) -> tuple[tuple[Block, Frame], ...]:
        """Blocks and frames of the row, with the group's numbers in them."""
        return tuple((block, frame.at(self.values)) for block, frame in self.row.splits) if self.values else self.row.splits

    @cached_property
    def weights(self) -> list[Tensor]:
        """One stack `(count, rows, cols)` per block, in the parameter's own storage if its strides allow it."""
        return self.row.view.cut(self.row.view.whole(self.param.detach()))

    @cached_property
    def grads(self) -> list[Tensor]:
        return self.row.view.cut(self.row.view.whole(self.grad.detach()))

    @cached_property
    def outgoing(self) -> list[Tensor]:
        """The outbox, viewed as the weights are. `write_back` copies it to the outbox if it is no view."""
        assert self.outbox is not None
        return self.row.view.cut(self.row.view.whole(self.outbox))

    @cached_property
    def compensations(self) -> list[Tensor] | None:
        if not self.row.compensated or self.outbox is not None:
            return None
        return self.row.view.cut(self.row.view.whole(self.state["compensation"]))

    @cached_property
    def is_matrix(self) -> bool:
        """True if the parameter itself is the one matrix of its view."""
        view = self.row.view
        return len(view.blocks) == 1 and not view.transposed and tuple(self.param.shape) == (view.rows, view.cols)


@dataclass(frozen=True)
class Piece:
    """Matrices `start` to `stop` of one block of a parameter, or some rows of one."""

    work: Work
    index: int
    start: int
    stop: int
    rows: tuple[int, int] | None = None  # the first row, and the first row after the piece

    @property
    def block(self) -> Block:
        return self.work.splits[self.index][0]

    @property
    def frame(self) -> Frame:
        return self.work.splits[self.index][1]

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """True if these are all matrices of the block."""
        return self.size == self.block.count

    def of(self, blocks: list[Tensor]) -> Tensor:
        """This piece of the parameter's weights, gradients or compensations, `(count, rows, cols)`."""
        part = blocks[self.index][self.start : self.stop]
        return part if self.rows is None else part[:, slice(*self.rows)]

    def stored(self, key: str) -> Tensor:
        """A state tensor of the block as it is stored, without a stack dimension for one matrix."""
        value: Tensor = self.work.state[state_key(self.block, key)]
        return value

    def be_silent(self) -> None:
        """Note that these matrices get no update and no decay."""
        each = self.block.heads if self.work.row.view.count > 1 else 1  # an expert is cut into heads
        self.work.silent |= {i // each for i in range(self.start, self.stop)}

    def slot(self, key: str) -> Tensor:
        """The piece of a state tensor, with a leading stack dimension; a copy if it is stored as codes."""
        value = self.stored(key)
        if key in self.frame.codes:
            shape = self.frame.slots[key].shape
            rows = shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])
            return lowbit.read(value, *self._entries(shape), self.work.row.compute_dtype).view(self.size, *rows)
        if self.rows is not None and (part := part_of_rows(self.frame, key, *self.rows)) is not None:
            value = value[..., part, :] if len(self.frame.slots[key].dims) > 1 else value[..., part]
        return value.unsqueeze(0) if self.block.count == 1 else value[self.start : self.stop]

    def put(self, key: str, value: Tensor, gate: Tensor | None = None) -> None:
        """Write the piece of a state tensor back to its storage, coded if it is stored as codes; only the matrices whose gate is open."""
        if key not in self.frame.codes:
            slot = self.slot(key)
            slot.copy_(value if gate is None else gated(gate, value, slot))
            return
        first = self._entries(self.frame.slots[key].shape)[0]
        if gate is None:
            lowbit.write(self.stored(key), first, value.reshape(-1))
            return
        for i, (one, own) in enumerate(zip(value, each(gate, self.size), strict=True)):
            lowbit.write(self.stored(key), first + i * one.numel(), one.reshape(-1), own)

    def _entries(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Indices of the piece's first entry in the block's flat state tensor, and of the first entry after the piece."""
        each = prod(shape)
        if self.rows is None:
            return self.start * each, self.stop * each
        first, beyond = (self.start * each + row * (each // shape[0]) for row in self.rows)
        return first, beyond


class Phase(Enum):
    """The state of a matrix."""

    WAITING = "all gradients so far were 0"
    FIRST = "this is its first gradient"
    BEGUN = "it has state"


@dataclass(frozen=True)
class Stack:
    """Pieces that are computed together."""

    frame: Frame
    phase: Phase
    refresh: bool
    pieces: list[Piece]
    gate: Tensor | None = None  # bool on the device, for all matrices or `(B,)` for each: it is updated

    @property
    def sizes(self) -> list[int]:
        return [piece.size for piece in self.pieces]

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].work.row.compute_dtype


def allocate(row: Row, param: Tensor, state: dict[str, Any], *, capturable: bool = False) -> None:
    """Fill `state` with zeros as the plan declares it, each tensor in its own storage; `capturable`: counters on the device too."""
    for key, (shape, dtype) in row.state.items():
        device = torch.device("cpu") if key in COUNTERS and not capturable else param.device
        how = row.codes.get(key)
        state[key] = torch.zeros(shape, dtype=dtype, device=device) if how is None else lowbit.zeros(shape, how, device)
