"""A saved state as what it tells about the gradients: averages with the bases of their coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..algebra.core import Dim, Slot, State, Step
from ..algebra.frame import Frame
from ..algebra.shaped import part
from ..checkpoint import CheckpointError
from ..engine import lowbit
from ..engine.moment import step_of
from ..engine.work import Options, Phase, Piece, Stack, Work
from ..plan import Row, state_key
from ..plan.views import Block
from .moments import Known, Moment, dense, rotated
from .responses import Response, responses


class ConversionError(CheckpointError):
    """The state cannot be converted. The message says what was found and what to do."""


@dataclass
class Blocks:
    """The matrices of one block of a parameter with their state, in the dtype of computation."""

    row: Row
    index: int
    frame: Frame
    state: State
    count: int  # updates that the rules have counted
    refreshed: int | None  # the update of the last refresh, if a slot resets at refreshes
    seed: int = 0
    tables: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def block(self) -> Block:
        return self.row.splits[self.index][0]

    def step(self, device: torch.device, *, phase: Phase = Phase.FIRST, count: int = 0) -> Step:
        """The step of a first update, or of another one: counts, draws and tables as in a run."""
        empty = torch.empty(0, device=device)
        work = Work(row=self.row, param=empty, grad=empty, lr=0.0, weight_decay=0.0, count=count)
        piece = Piece(work, self.index, 0, self.block.count)
        return step_of(Stack(self.frame, phase, phase is Phase.FIRST, [piece]), Options(seed=self.seed), self.tables)

    def updates(self, slot: Slot) -> int:
        """The number of signals in a slot: all updates, or those since the last refresh."""
        if slot.transport == "reset" and self.refreshed is not None:
            return max(self.count - self.refreshed + 1, 0)
        return self.count

    @cached_property
    def begun(self) -> Tensor:
        """Whether each matrix has had a gradient, `(B,)`."""
        has = [value.reshape(value.size(0), -1).any(1) for value in self.state.values()]
        return torch.stack(has).any(0) if has else torch.ones(self.block.count, dtype=torch.bool)

    def sides(self) -> tuple[Tensor | None, Tensor | None] | None:
        """The bases of the rows and columns in the weight's own orientation; None if the selector does not keep its basis."""
        if not self.frame.selector_traits.keeps_basis:
            return None
        like = next(iter(self.state.values()))
        like = like if like.is_floating_point() else like.new_zeros(like.size(0), dtype=self.row.compute_dtype)
        return own_sides(self.frame, part("selector", self.state), self.step(like.device), like.reshape(like.size(0), -1))


def own_sides(frame: Frame, state: State, step: Step, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The bases of rows and columns, as dense columns in the weight's own orientation."""
    basis = frame.pipeline.selector.basis(state, step)
    left, right = dense(basis.left, frame.rows.size, like), dense(basis.right, frame.cols.size, like)
    return (right, left) if frame.turned else (left, right)


def read_blocks(row: Row, saved: Mapping[str, Any], frames: tuple[Frame, ...], seed: int) -> list[Blocks]:
    """The state of every block of a parameter.

    Raises:
        ConversionError: A slot is missing, or has another shape than spec and parameter imply.
    """
    primes = any(frame.primes for frame in frames)
    count = int(float(saved["step"])) - primes
    refreshed = int(float(saved["refreshed"])) if "refreshed" in saved else None
    out: list[Blocks] = []
    tables: dict[Any, Tensor] = {}
    for index, ((block, _), frame) in enumerate(zip(row.splits, frames, strict=True)):
        state: State = {}
        for key, slot in frame.slots.items():
            state[key] = _numbers(saved, state_key(block, key), (block.count, *slot.shape), slot, row)
        out.append(Blocks(row, index, frame, state, count, refreshed, seed, tables))
    return out


def _numbers(saved: Mapping[str, Any], key: str, shape: tuple[int, ...], slot: Slot, row: Row) -> Tensor:
    """A slot `(B, *dims)` as plain numbers in the dtype of computation."""
    value = saved.get(key)
    if not isinstance(value, Tensor):
        raise ConversionError(
            f"'{row.entry.name}': the state has no tensor '{key}', which its spec implies; it is damaged, or of another model"
        )
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    value = lowbit.whole(value)
    expected = shape if shape[0] > 1 else shape[1:]
    if tuple(value.shape) != expected:
        raise ConversionError(
            f"'{row.entry.name}': slot '{key}' has shape {tuple(value.shape)}, and for a parameter of shape {row.entry.shape} it must have "
            f"{expected}; give the model that this state belongs to"
        )
    return value.detach().reshape(shape).to(slot.dtype or row.compute_dtype)


# ------------------------------------------------------------------------------------------------------------ what it tells


def known(blocks: Blocks) -> Known:
    """The mean of the gradients, their second moments and their covariances, as far as the state tells them."""
    frame, sides = blocks.frame, blocks.sides() if blocks.frame.opens else (None, None)
    means, seconds = (list(_moments(blocks, degree, sides)) for degree in (1, 2))
    return Known(
        mean=_whole_mean(means, frame) or _from_feedback(blocks),
        square=_pick([m for place, m in seconds if place != "complement" or not is_residual(frame)]),
        covariances=tuple(_covariances(blocks, sides)) if sides is not None else (),
    )


def _moments(blocks: Blocks, degree: int, sides: tuple[Tensor | None, Tensor | None] | None) -> Any:
    """The averages with one entry for each entry of the matrix or of its coordinates, with their place."""
    frame = blocks.frame
    found = responses(frame)
    for key, rule, rows, cols in frame.places():
        place = key.partition(".")[0]
        own_basis = any(len(set(slot.dims)) < len(slot.dims) or slot.holds == "basis" for slot in rule.slots(rows, cols).values())
        for name, slot in rule.slots(rows, cols).items():
            response = found.get(f"{key}.{name}", Response(0))
            if response.degree != degree or slot.dims != (rows, cols) or (degree == 2 and own_basis):
                continue
            weight = response.weight(blocks.updates(slot))
            if weight <= 0 or (place == "inside" and sides is None):
                continue
            value = blocks.state[f"{key}.{name}"] / weight
            turned = frame.turned and place not in ("finish", "apply")
            at = sides if place == "inside" and sides is not None else (None, None)
            yield place, Moment(value.mT if turned else value, *at, response.noise, response.decay, f"{key}.{name}")


def _whole_mean(found: list[tuple[str, Moment]], frame: Frame) -> Moment | None:
    """The mean of the whole gradient: of full space, else inside the subspace with that of the complement, if there are both."""
    outside = next((m for place, m in found if place == "complement"), None)
    inside = next((m for place, m in found if place == "inside"), None)
    if is_residual(frame) and outside is not None and not any(place == "momentum" for place, _ in found):
        if inside is None:
            return outside
        whole = rotated(inside, None, None) + outside.value
        return Moment(whole, None, None, outside.noise, outside.decay, f"{inside.name} + {outside.name}")
    return _pick([m for _, m in found])


def feedback_response(feedback: float) -> Response:
    """The answer of the error to a gradient that the subspace transmits: heavy ball without the newest gradient."""
    return Response(1, feedback, feedback * (1 + feedback), feedback)


def _from_feedback(blocks: Blocks) -> Moment | None:
    """The mean in the error feedback, which is the momentum of Trion and Dion."""
    share = blocks.frame.pipeline.feedback
    weight = feedback_response(share).weight(blocks.count) if share else 0.0
    if not share or weight == 0:
        return None
    error = blocks.state["feedback.error"]  # in the weight's own orientation
    return Moment(error / weight, None, None, (1 - share) / (1 + share), share, "feedback.error")


def is_residual(frame: Frame) -> bool:
    """True if the rules of the complement see the residual of a subspace."""
    return frame.has_complement and frame.opens and not frame.pipeline.complement[0].traits(frame.rows, frame.cols).takes_whole


def _pick(found: list[Moment]) -> Moment | None:
    """The first one of full space, else the first one."""
    return next((m for m in found if m.is_full), found[0] if found else None)


def _covariances(blocks: Blocks, sides: tuple[Tensor | None, Tensor | None]) -> Any:
    """The slots named `covariance`, by side of the weight: in the coordinates of the basis, or of the whole side."""
    frame = blocks.frame
    left, right = sides
    working = (("right", left), ("left", right)) if frame.turned else (("left", left), ("right", right))  # rows, columns
    for key, slot in frame.slots.items():
        if key.rpartition(".")[2] != "covariance" or len(slot.dims) != 2 or slot.dims[0] != slot.dims[1]:
            continue
        for (_, basis), own, inner, side in zip(working, (frame.rows, frame.cols), frame.inner, _own_names(frame), strict=True):
            if slot.dims[0] == inner and inner != own:
                yield side, basis, blocks.state[key]
            elif slot.dims[0] == Dim(own.name, own.size):
                yield side, None, blocks.state[key]


def _own_names(frame: Frame) -> tuple[str, str]:
    """The sides of the weight that the rows and the columns of the working orientation are."""
    return ("right", "left") if frame.turned else ("left", "right")
