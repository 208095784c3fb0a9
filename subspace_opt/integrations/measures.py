"""Measurements of a run: the part of the gradients that the subspaces hold, and the sizes of the updates."""

from __future__ import annotations

import torch

from ..diagnostics.energy import captured_energy, rows_of, squared
from ..optimizer import SubspaceOptimizer

__all__ = ["UpdateSizes", "captured_energy", "means"]


class UpdateSizes:
    """The sizes of the updates of one step, relative to the weights: call it before the step, and the result after the step.

    It keeps a copy of all trained weights in between.
    """

    def __init__(self, optimizer: SubspaceOptimizer) -> None:
        self._before = [(p, row, p.detach().clone()) for p, row in rows_of(optimizer) if p.requires_grad and p.numel()]

    @torch.no_grad()
    def by_pipeline(self) -> dict[str, float]:
        """`|change| / |weight before|`, over all parameters of a pipeline. With sharded parameters, all ranks must call it."""
        sums: dict[str, list[float]] = {}
        for p, row, before in self._before:
            pair = sums.setdefault(row.pipeline, [0.0, 0.0])
            pair[0] += squared(p.detach() - before)
            pair[1] += squared(before)
        return {name: (change / size) ** 0.5 for name, (change, size) in sums.items() if size > 0}


def means(values: dict[str, float], optimizer: SubspaceOptimizer) -> dict[str, float]:
    """The mean of values by parameter, for each pipeline."""
    by_pipeline: dict[str, list[float]] = {}
    for name, value in values.items():
        by_pipeline.setdefault(optimizer.plan.by_name[name].pipeline, []).append(value)
    return {name: sum(some) / len(some) for name, some in by_pipeline.items()}
