"""How the slots of a pipeline answer to a constant gradient: which are averages of the gradient or of its squares, and with which weights.

A conversion must know the sum of the weights in a slot: `1 - beta^n` for an EMA, `(1 - beta^n) / (1 - beta)` for heavy ball, n for AdaGrad.
No rule declares it. The rules of every place therefore run on 1 x 1 matrices with a constant gradient, and the answers tell it. Slots
behind a nonlinear rule, such as the second moments of orthogonalized matrices, are found to be no averages of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import Basis, Coords, Dim, Rule, State, Step
from ..algebra.frame import Frame
from ..algebra.shaped import keyed, part, store

UPDATES = 4  # three fix the weights, the fourth tests them
NEAR = 1e-6


class Response(NamedTuple):
    """The answer of a slot to a constant gradient g, after n updates: `weight(n) g^degree`."""

    degree: int  # 1: an average of the gradient; 2: of its squares; 0: neither
    first: float = 0.0  # weight after one update
    second: float = 0.0
    decay: float = 0.0  # the share of a weight that the next update keeps

    def weight(self, n: float) -> float:
        """The sum of the weights after `n` updates."""
        if n < 1:
            return 0.0
        growth = n - 1 if self.decay == 1 else (1 - self.decay ** (n - 1)) / (1 - self.decay)
        return self.first + (self.second - self.first) * growth

    @property
    def noise(self) -> float:
        """The variance of the average of independent signals of variance 1, after many updates."""
        return (1 - self.decay) / (1 + self.decay)


def fitted(values: Sequence[float], degree: int) -> Response:
    """The response whose weights after 1, 2, ... updates are `values`; degree 0 if they are no sums of geometric weights."""
    first, second, third, fourth = values
    step = second - first
    decay = (third - second) / step if abs(step) > NEAR * abs(first) else 0.0
    found = Response(degree, first, second, 1.0 if abs(decay - 1) < NEAR else decay)
    right = 0 <= decay < 1 + NEAR and math.isclose(found.weight(UPDATES), fourth, rel_tol=NEAR)
    return found if right else Response(0)


def degree_of(values: Sequence[float], doubled: Sequence[float]) -> int:
    """The power of the gradient that a slot grows by, from its values with a gradient and with twice the gradient; 0 if neither 1 nor 2."""
    for degree in (1, 2):
        if all(a != 0 and math.isclose(b, 2.0**degree * a, rel_tol=NEAR) for a, b in zip(values, doubled, strict=True)):
            return degree
    return 0


def responses(frame: Frame) -> dict[str, Response]:
    """The answer of every slot of the rules, by dotted key. Slots of the selector and of weight rules are left out."""
    if "responses" not in frame.memo:
        plain, doubled = (_answers(frame, size) for size in (1.0, 2.0))
        frame.memo["responses"] = {
            key: fitted(values, degree_of(values, doubled[key])) if degree_of(values, doubled[key]) else Response(0)
            for key, values in plain.items()
        }
    found: dict[str, Response] = frame.memo["responses"]
    return found


def _answers(frame: Frame, size: float) -> dict[str, list[float]]:
    """The value of every slot after each of a few updates with the gradient `size`."""
    places = _places(frame)
    state: State = {}
    for _, rules, rows, cols in places:
        for key, rule in rules:
            kept = {name: torch.zeros(1, *slot.shape, dtype=slot.dtype or torch.float64) for name, slot in rule.slots(rows, cols).items()}
            store(key, kept, state)
    found: dict[str, list[float]] = {key: [] for key in state}
    g = torch.full((1, 1, 1), size, dtype=torch.float64)
    for t in range(1, UPDATES + 1):
        signal = g
        for place, rules, rows, cols in places:
            x = torch.ones_like(g) if place == "finish" else signal  # the update that `finish` sees is no average of the gradient
            for key, rule in rules:
                x, new = rule.apply(x, g, part(key, state), _step(t, rows, cols, x))
                store(key, {name: value.clone() for name, value in new.items()}, state)
            signal = x if place == "momentum" else signal
        for key, value in state.items():
            found[key].append(float(value.double().sum()))
    return found


def _places(frame: Frame) -> list[tuple[str, list[tuple[str, Rule]], Dim, Dim]]:
    """The rules by place, and the sides of their signal with size 1."""
    p, unit = frame.pipeline, {dim: dim._replace(size=1, modes=()) for dim in (frame.rows, frame.cols, *frame.inner)}
    outer, inner = (unit[frame.rows], unit[frame.cols]), (unit[frame.inner[0]], unit[frame.inner[1]])
    found = [("momentum", p.momentum, outer)]
    found += [("inside", p.inside, inner)] if frame.opens else []
    found += [("complement", p.complement, outer)] if frame.has_complement else []
    return [(place, keyed(place, rules), *sides) for place, rules, sides in [*found, ("finish", p.finish, outer)]]


def _step(t: int, rows: Dim, cols: Dim, x: Tensor) -> Step:
    clock = torch.tensor(float(t), dtype=torch.float64)
    coords = Coords(x, x, x)
    return Step(t=clock, age=clock, first=t == 1, refresh=t == 1, rows=rows, cols=cols, inside=coords, whole=x, basis=Basis())
