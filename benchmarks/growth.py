"""The models, results and exponents of `scaling.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

import torch
from step_time import hidden_matrices
from torch import nn

from subspace_opt import build
from subspace_opt.plan import Plan
from subspace_opt.plan.costs import flops
from subspace_opt.spec import load_spec

LAYER_WIDTH, RANK_WIDTH = 256, 512  # width of the models on the axes `layers` and `rank`
RANK = "matrix.selector.rank"

Quartiles = tuple[float, float, float]  # lower quartile, median, upper quartile


@dataclass(frozen=True)
class Place:
    """One model on an axis."""

    axis: str  # width, layers or rank
    at: int
    width: int
    layers: int
    rank: int | None  # None: the rank of the preset


@dataclass(frozen=True)
class Cost:
    """The planner's prediction for one preset at one place."""

    state: int  # bytes
    weights: int  # bytes
    tables: int  # bytes, shared by all matrices
    flops: float  # of a step, including the refresh if every step has one
    refresh_flops: float | None  # of a step that refreshes all bases; None if steps do not differ in that

    @property
    def needed(self) -> int:
        """Bytes that are held all the time: state, tables, weights and gradients."""
        return self.state + self.tables + 2 * self.weights

    @property
    def work(self) -> float:
        """The expected measure of time: operations, or bytes moved if all rules are elementwise."""
        return self.flops or float(self.state + 3 * self.weights)


@dataclass(frozen=True)
class Effort:
    """The limits of the measurement at one point."""

    steps: int
    refreshes: int
    seconds: float


@dataclass(frozen=True)
class Point:
    """The result of one preset at one place. Times in milliseconds, sizes in bytes."""

    preset: str
    place: Place
    cost: Cost
    step: Quartiles
    refresh: Quartiles | None
    steps: int  # number of timed steps
    state: int
    temporaries: int
    refresh_temporaries: int | None


@dataclass(frozen=True)
class Fit:
    """Exponents of one preset along one axis, measured and in theory; None if a value is missing or 0."""

    preset: str
    axis: str
    points: int
    step: float
    step_last: float  # between the two largest points
    step_theory: float
    refresh: float | None
    refresh_theory: float | None
    state: float
    state_theory: float
    temporaries: float | None


def hidden(place: Place, device: torch.device) -> nn.Module:
    """The model of a place."""
    return hidden_matrices(place.width, place.layers, device)


def overrides_of(place: Place) -> dict[str, Any]:
    """The overrides of a preset at a place."""
    return {} if place.rank is None else {RANK: place.rank}


def predict(preset: str, place: Place) -> Cost:
    """The cost of a point, from the plan of a model on the meta device."""
    model = hidden(place, torch.device("meta"))
    plan = build(preset, model, overrides=overrides_of(place)).plan
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    plain = refresh = 0.0
    for row in plan.rows:
        for block, frame in row.splits:
            between, renewed = flops(frame)
            always = frame.opens and frame.pipeline.selector.every == 1
            plain += block.count * (between + (renewed if always else 0.0))
            refresh += block.count * (between + renewed)
    return Cost(plan.total_bytes, weights, sum(plan.constants.values()), plain, refresh if periodic(plan) else None)


def periodic(plan: Plan) -> list[str]:
    """The pipelines in use that refresh their basis at some steps only."""
    return sorted({row.pipeline for row in plan.rows for _, frame in row.splits if frame.opens and frame.pipeline.selector.every != 1})


def has_rank(preset: str) -> bool:
    """True if the pipeline `matrix` has a selector with a rank."""
    pipeline = load_spec(preset).pipelines.get("matrix")
    return pipeline is not None and getattr(pipeline.selector, "rank", None) is not None


def places(widths: Sequence[int], layers: Sequence[int], ranks: Sequence[int]) -> list[Place]:
    """All models, axis by axis, smallest first."""
    return [
        *(Place("width", width, width, 1, None) for width in widths),
        *(Place("layers", count, LAYER_WIDTH, count, None) for count in layers),
        *(Place("rank", rank, RANK_WIDTH, 1, rank) for rank in ranks),
    ]


def fit_exponent(at: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The least-squares slope of log value against log place; None if a value is missing or 0, or if there is only one point."""
    positive = [value for value in values if value]
    if len(at) < 2 or len(positive) < len(at):
        return None
    return linear_regression([math.log(x) for x in at], [math.log(y) for y in positive]).slope


def fit_exponents(points: Sequence[Point]) -> list[Fit]:
    """The exponents of every preset along every axis with at least two points."""
    fits = []
    for axis, preset in dict.fromkeys((p.place.axis, p.preset) for p in points):
        own = [p for p in points if (p.place.axis, p.preset) == (axis, preset)]
        at = [p.place.at for p in own]

        def slope(of: Callable[[Point], float | None], own: list[Point] = own, at: list[int] = at) -> float | None:
            return fit_exponent(at, [of(p) for p in own])

        def sure(value: float | None) -> float:
            return math.nan if value is None else value

        if len(own) < 2:
            continue
        fits.append(
            Fit(
                preset,
                axis,
                len(own),
                step=sure(slope(lambda p: p.step[1])),
                step_last=sure(slope(lambda p: p.step[1], own[-2:], at[-2:])),
                step_theory=sure(slope(lambda p: p.cost.work)),
                refresh=slope(lambda p: None if p.refresh is None else p.refresh[1]),
                refresh_theory=slope(lambda p: p.cost.refresh_flops),
                state=sure(slope(lambda p: p.state)),
                state_theory=sure(slope(lambda p: p.cost.state)),
                temporaries=slope(lambda p: p.temporaries),
            )
        )
    return fits
