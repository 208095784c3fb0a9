"""The part of a gradient that a subspace holds, measured between `step()` and `zero_grad()` by one product for each matrix."""

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
from ..plan import Row


@torch.no_grad()
def captured_energy(optimizer: Any) -> dict[str, float]:
    """The share of every gradient's squared norm that lies in its subspace, from 0 to 1, by parameter.

    Call it after `step()` and before `zero_grad()`: it uses the bases in force and the gradients in `p.grad`. A parameter is left out if
    it has no subspace, no gradient or no state yet, if the columns of its basis are not orthonormal (APOLLO), or if the basis exists only
    during a step (Dion).

    Raises:
        ValueError: A parameter is sharded, so that its gradient and its basis are on different ranks.
    """
    found = {}
    tables: dict[Any, Tensor] = {}
    for p, row in rows_of(optimizer):
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


@torch.no_grad()
def mean_captured_energy(optimizer: Any) -> float | None:
    """The share of the squared norm of all gradients that have a subspace, which lies in these subspaces; None if there is none.

    Raises:
        ValueError: as `captured_energy`.
    """
    shares = captured_energy(optimizer)
    sizes = {row.entry.name: squared(p.grad) for p, row in rows_of(optimizer) if row.entry.name in shares and p.grad is not None}
    whole = sum(sizes.values())
    return sum(shares[name] * size for name, size in sizes.items()) / whole if whole > 0 else None


def rows_of(optimizer: Any) -> Iterator[tuple[Tensor, Row]]:
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
    return squared(coords), squared(g)


def squared(x: Tensor) -> float:
    """The squared norm. For a distributed tensor, of the whole tensor."""
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
