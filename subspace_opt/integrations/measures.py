"""Measurements of a run: the part of the gradients that the subspaces hold, and the sizes of the updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..algebra.frame import Frame
from ..algebra.projection import project
from ..algebra.shaped import part
from ..engine.moment import step_of
from ..engine.work import Options, Phase, Piece, Stack, Work
from ..optimizer import SubspaceOptimizer
from ..plan import Row


@torch.no_grad()
def captured_energy(optimizer: SubspaceOptimizer) -> dict[str, float]:
    """The share of every gradient's squared norm that lies in its subspace, from 0 to 1, by parameter.

    Call it after `step()` and before `zero_grad()`: it uses the bases in force and the gradients in `p.grad`. A parameter is left out if
    it has no subspace, no gradient or no state yet, if the columns of its basis are not orthonormal (APOLLO), or if the basis exists only
    during a step (Dion).

    Raises:
        ValueError: A parameter is sharded, so that its gradient and its basis are on different ranks.
    """
    found = {}
    tables: dict[Any, Tensor] = {}
    for p, row in _rows(optimizer):
        if hasattr(p, "device_mesh"):
            raise ValueError(
                f"'{row.entry.name}' is sharded: its gradient and its basis are on different ranks, so the captured energy cannot be "
                "measured; measure the sizes of updates only (energy=False)"
            )
        if p.grad is None or not optimizer.state.get(p) or float(optimizer.state[p]["step"]) < 1:
            continue
        work = Work(row, p, p.grad, 0.0, 0.0, optimizer.state[p], count=int(optimizer.state[p]["step"]))
        energies = [_energy(work, i, tables, optimizer._options) for i, (_, frame) in enumerate(row.splits) if _has_subspace(frame)]
        whole = sum(total for _, total in energies)
        if whole > 0:
            found[row.entry.name] = sum(inside for inside, _ in energies) / whole
    return found


class UpdateSizes:
    """The sizes of the updates of one step, relative to the weights: call it before the step, and the result after the step.

    It keeps a copy of all trained weights in between.
    """

    def __init__(self, optimizer: SubspaceOptimizer) -> None:
        self._before = [(p, row, p.detach().clone()) for p, row in _rows(optimizer) if p.requires_grad and p.numel()]

    @torch.no_grad()
    def by_pipeline(self) -> dict[str, float]:
        """`|change| / |weight before|`, over all parameters of a pipeline. With sharded parameters, all ranks must call it."""
        sums: dict[str, list[float]] = {}
        for p, row, before in self._before:
            pair = sums.setdefault(row.pipeline, [0.0, 0.0])
            pair[0] += _squared(p.detach() - before)
            pair[1] += _squared(before)
        return {name: (change / size) ** 0.5 for name, (change, size) in sums.items() if size > 0}


def means(values: dict[str, float], optimizer: SubspaceOptimizer) -> dict[str, float]:
    """The mean of values by parameter, for each pipeline."""
    by_pipeline: dict[str, list[float]] = {}
    for name, value in values.items():
        by_pipeline.setdefault(optimizer.plan.by_name[name].pipeline, []).append(value)
    return {name: sum(some) / len(some) for name, some in by_pipeline.items()}


def _rows(optimizer: SubspaceOptimizer) -> Iterator[tuple[Tensor, Row]]:
    """All parameters with their rows of the plan."""
    yield from zip((p for group in optimizer.param_groups for p in group["params"]), optimizer.plan.rows, strict=True)


def _has_subspace(frame: Frame) -> bool:
    """True if there is a basis after the step, and the part of a gradient inside is never longer than the gradient."""
    return frame.opens and frame.selector_traits.orthonormal and frame.selector_traits.keeps_basis


def _energy(work: Work, index: int, tables: dict[Any, Tensor], options: Options) -> tuple[float, float]:
    """The squared norm of the coordinates of one block's gradients, and that of the gradients."""
    block, frame = work.row.splits[index]
    piece = Piece(work, index, 0, block.count)
    step = step_of(Stack(frame, Phase.BEGUN, False, [piece]), options, tables)
    state = {key: piece.slot(key) for key in frame.slots if key.startswith("selector.")}
    g = piece.of(work.grads).to(work.row.compute_dtype)
    g = g.mT if frame.turned else g
    coords = project(g, frame.pipeline.selector.basis(part("selector", state), step))
    return _squared(coords), _squared(g)


def _squared(x: Tensor) -> float:
    """The squared norm. For a distributed tensor, of the whole tensor."""
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
