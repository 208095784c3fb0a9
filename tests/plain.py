"""The reference for every fast path: `Frame.update` on one matrix at a time, and the formula of the weight's update. It uses no stacks, no
kernels and no expressions multiplied into weights, and writes nothing in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspace_opt.algebra.frame import Frame
from subspace_opt.engine.moment import step_of
from subspace_opt.engine.work import Options, Phase, Piece, Stack, Work
from subspace_opt.plan import Plan, Row
from subspace_opt.plan.views import Block


class Plain:
    """Trains copies of parameters by the formulas alone. `plan`: the plan of an optimizer for parameters of these names and shapes."""

    def __init__(self, plan: Plan, weights: dict[str, Tensor], lr: float, weight_decay: float) -> None:
        self.rows = {row.entry.name: row for row in plan.rows}
        self.weights = {name: w.detach().clone() for name, w in weights.items()}
        self.lr, self.weight_decay, self.tables = lr, weight_decay, dict[Any, Tensor]()
        self.state: dict[tuple[str, str, int], dict[str, Tensor]] = {}
        self.count = 0

    def step(self, grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            self.weights[name] = self._updated(self.rows[name], self.weights[name], grad)
        self.count += 1

    def _updated(self, row: Row, weight: Tensor, grad: Tensor) -> Tensor:
        view, blocks = row.view, []
        parts = zip(row.splits, view.cut(view.whole(weight)), view.cut(view.whole(grad)), strict=True)
        for index, ((block, frame), ws, gs) in enumerate(parts):
            matrices = [self._matrix(row, index, block, frame, i, ws[i : i + 1], gs[i : i + 1]) for i in range(block.count)]
            blocks.append(torch.cat(matrices))
        return view.restore(blocks, weight.shape)

    def _matrix(self, row: Row, index: int, block: Block, frame: Frame, i: int, weight: Tensor, grad: Tensor) -> Tensor:
        w, g = weight.to(row.compute_dtype), grad.to(row.compute_dtype)
        state = self.state.setdefault((row.entry.name, block.name, i), self._zeros(frame, w))
        piece = Piece(self._work(row, weight, grad, state), index, i, i + 1)
        step = step_of(self._stack(frame, piece), Options(), self.tables)
        if step.first and frame.primes:
            state.update(frame.prime(g, w, state, step))
            return weight
        update, new = frame.update(g, w, state, step)
        if frame.pipeline.apply:
            state.update({key: new[key] for key in frame.slots})
            return (w - update.dense()).to(weight.dtype)
        change = self.lr * row.lr_scale * update.dense()
        kept = 1 - self.lr * row.lr_scale * self.weight_decay * row.decay_scale
        match frame.pipeline.decay:
            case "before":
                w = w * kept - change
            case "after":
                w = (w - change) * kept
            case "coupled":
                w = w - change
        state.update({key: new[key] for key in frame.slots})
        if step.refresh:
            state["refreshed"] = step.t.clone()
        return w.to(weight.dtype)

    def _zeros(self, frame: Frame, like: Tensor) -> dict[str, Tensor]:
        return {key: like.new_zeros(1, *slot.shape, dtype=slot.dtype or like.dtype) for key, slot in frame.slots.items()}

    def _work(self, row: Row, weight: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Work:
        known = {"refreshed": state["refreshed"]} if "refreshed" in row.state and "refreshed" in state else {}
        rates = {"lr": self.lr * row.lr_scale, "weight_decay": self.weight_decay * row.decay_scale}
        return Work(row, weight, grad, **rates, state=known, count=self.count)

    def _stack(self, frame: Frame, piece: Piece) -> Stack:
        t = self.count if frame.primes else self.count + 1
        refresh = frame.opens and (self.count == 0 or frame.pipeline.selector.refreshes(t, piece.work.row.turn))
        return Stack(frame, Phase.FIRST if self.count == 0 else Phase.BEGUN, refresh, [piece])
