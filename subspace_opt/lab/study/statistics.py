"""Statistics of a study: intervals over seeds, differences paired by seed, costs, and the way to the reference's final loss. All pure.

Losses are in nats per token, times in milliseconds unless the name says seconds. Missing numbers are `nan`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .records import Entry, Record, Study

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half-width of its confidence interval."""

    mean: float
    half: float  # nan with fewer than two values
    count: int  # values that the mean covers

    @property
    def low(self) -> float:
        """The lower end of the interval; nan without an interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval; nan without an interval."""
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and does not contain 0."""
        return self.low > 0 or self.high < 0


def student_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability for Student's distribution with `freedom` degrees of freedom.

    Bisects the finite sums for P(|T| <= t) of Abramowitz and Stegun, 26.7.3 and 26.7.4, over the angle atan(t / sqrt(freedom)).

    Raises:
        ValueError: the probability is not between 0 and 1, or there are no degrees of freedom.
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"student_quantile: needs 0 < probability < 1 and freedom >= 1, not {probability} and {freedom}")
    inside = abs(2 * probability - 1)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < inside else (low, middle)
    return math.copysign(math.sqrt(freedom) * math.tan((low + high) / 2), 2 * probability - 1)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if freedom % 2 else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of the finite values with its 95 % interval: mean +- t s / sqrt(n), where s is the standard deviation of the sample."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Estimate(math.nan, math.nan, 0)
    if len(finite) == 1:
        return Estimate(finite[0], math.nan, 1)
    t = student_quantile((1 + CONFIDENCE) / 2, len(finite) - 1)
    return Estimate(statistics.fmean(finite), t * statistics.stdev(finite) / math.sqrt(len(finite)), len(finite))


# ------------------------------------------------------------------------------------------------------------ differences


@dataclass(frozen=True)
class Pairing:
    """Final losses of two optimizers, seed by seed. A diverged run counts as above every finished run."""

    first: str
    second: str
    seeds: tuple[int, ...]  # seeds with a run of both, of which at least one finished
    below: int  # seeds in which the first has the lower loss
    above: int
    difference: Estimate  # first - second, over the seeds in which both finished
    first_diverged: tuple[int, ...]  # seeds
    second_diverged: tuple[int, ...]

    def turned(self) -> Pairing:
        """The same comparison with the roles of the two exchanged."""
        value = Estimate(-self.difference.mean, self.difference.half, self.difference.count)
        return Pairing(self.second, self.first, self.seeds, self.above, self.below, value, self.second_diverged, self.first_diverged)


def losses(entry: Entry) -> dict[int, float]:
    """The final loss of each seed; infinity if its run diverged."""
    return {record.seed: record.loss for record in entry.finals}


def diverged(entry: Entry) -> tuple[int, ...]:
    """The seeds whose final run diverged."""
    return tuple(seed for seed, loss in losses(entry).items() if not math.isfinite(loss))


def pair(first: Entry, second: Entry) -> Pairing:
    """Compare two optimizers on the seeds that both have."""
    ours, theirs = losses(first), losses(second)
    seeds = tuple(seed for seed in ours if seed in theirs and min(ours[seed], theirs[seed]) < math.inf)
    return Pairing(
        first.label,
        second.label,
        seeds,
        below=sum(ours[seed] < theirs[seed] for seed in seeds),
        above=sum(ours[seed] > theirs[seed] for seed in seeds),
        difference=estimate(ours[seed] - theirs[seed] for seed in seeds),
        first_diverged=tuple(seed for seed in seeds if math.isinf(ours[seed])),
        second_diverged=tuple(seed for seed in seeds if math.isinf(theirs[seed])),
    )


def ranking(entries: Iterable[Entry]) -> list[Entry]:
    """Entries from best to worst: by the share of diverged runs first, then by the mean final loss. Entries without final runs are last."""

    def key(entry: Entry) -> tuple[float, float]:
        runs = list(losses(entry).values())
        lost = sum(not math.isfinite(loss) for loss in runs) / len(runs) if runs else 2.0
        mean = estimate(runs).mean
        return lost, math.inf if math.isnan(mean) else mean

    return sorted(entries, key=key)


# ----------------------------------------------------------------------------------------------------- way to the reference


@dataclass(frozen=True)
class Reached:
    """Tokens and seconds to the reference's final loss, each divided by those of the reference in the same seed."""

    tokens: Estimate
    seconds: Estimate
    reached: int  # seeds in which the optimizer reaches that loss
    seeds: int  # seeds in which both runs finished


def find_reference(study: Study) -> Entry | None:
    """The entry with the label `adamw`, else the first whose spec is AdamW on every parameter, else None."""
    named = (entry for entry in study.entries if _letters(entry.label) == "adamw")
    return next(named, None) or next((entry for entry in study.entries if _is_adamw(entry)), None)


def _is_adamw(entry: Entry) -> bool:
    names = [entry.label, *(text for text in entry.spec.values() if isinstance(text, str))]
    if any(_letters(name) in ("adamw", "torchadamw", "torchoptimadamw") for name in names):
        return True
    pipelines = entry.spec.get("pipelines")
    return isinstance(pipelines, Mapping) and bool(pipelines) and all(_is_adam(pipeline) for pipeline in pipelines.values())


def _is_adam(pipeline: Any) -> bool:
    """Whether a pipeline has Adam as its complement and no other rule, selector or feedback."""
    if not isinstance(pipeline, Mapping):
        return False
    complement = pipeline.get("complement")
    only = complement[0] if isinstance(complement, Sequence) and len(complement) == 1 else complement
    selector = pipeline.get("selector") or {"kind": "none"}
    places = ("feedback", "momentum", "inside", "finish", "apply")
    is_alone = not any(pipeline.get(place) for place in places) and isinstance(selector, Mapping) and selector.get("kind") == "none"
    return is_alone and isinstance(only, Mapping) and only.get("kind") == "adam"


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def crossing(record: Record, target: float) -> tuple[float, float] | None:
    """(update, seconds) at which the validation loss first reaches `target`, interpolated linearly; None if it never does.

    If the first validation is already below the target, its position is returned: an upper bound.
    """
    before: tuple[float, float, float] | None = None
    for (update, loss), seconds in zip(record.validation, record.seconds_at, strict=True):
        if math.isfinite(loss) and loss <= target:
            if before is None:
                return float(update), seconds
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (update - before[0]), before[2] + share * (seconds - before[2])
        if math.isfinite(loss):
            before = (update, loss, seconds)
    return None


def reach(entry: Entry, reference: Entry) -> Reached:
    """How soon an optimizer reaches the reference's final loss, seed by seed. The reference itself has ratios of 1."""
    theirs = {record.seed: record for record in reference.finals if record.status == "finished"}
    tokens, seconds, both = [], [], 0
    for record in entry.finals:
        other = theirs.get(record.seed)
        if record.status != "finished" or other is None:
            continue
        both += 1
        ours, its = crossing(record, other.loss), crossing(other, other.loss)
        if ours is not None and its is not None:
            tokens.append(_ratio(ours[0] * record.tokens_per_step, its[0] * other.tokens_per_step))
            seconds.append(_ratio(ours[1], its[1]))
    return Reached(estimate(tokens), estimate(seconds), len(tokens), both)


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else math.nan


# ------------------------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Costs:
    """Memory and time of one optimizer over its final runs."""

    planned_state_bytes: int | None
    measured_state_bytes: int
    step_median: float  # median over seeds of the medians
    step_p95: float  # median over seeds
    step_worst: float  # of all seeds
    optimizer_median: float
    share: float  # mean optimizer time / mean step time
    seconds: float  # mean over seeds of the training time of a finished run


def costs(entry: Entry) -> Costs | None:
    """The costs of an optimizer; None without final runs."""
    if not entry.finals:
        return None
    steps, own = [r.step_ms for r in entry.finals], [r.optimizer_ms for r in entry.finals]
    return Costs(
        entry.finals[0].planned_state_bytes,
        max(r.measured_state_bytes for r in entry.finals),
        _median(t.median for t in steps),
        _median(t.p95 for t in steps),
        max((t.worst for t in steps if math.isfinite(t.worst)), default=math.nan),
        _median(t.median for t in own),
        _ratio(estimate(t.mean for t in own).mean, estimate(t.mean for t in steps).mean),
        estimate(r.seconds_at[-1] for r in entry.finals if r.status == "finished" and r.seconds_at).mean,
    )


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


# -------------------------------------------------------------------------------------------------------------- whole study


@dataclass(frozen=True)
class Line:
    """Everything that a table says about one optimizer."""

    entry: Entry
    number: int  # position in the study, which decides its colour and marker
    loss: Estimate
    to_best: Pairing | None  # None for the best itself
    to_reference: Pairing | None  # None for the reference itself, or without one
    reached: Reached | None  # None without a reference
    costs: Costs | None
    diverged: tuple[int, ...]  # seeds


def summarize(study: Study) -> list[Line]:
    """One line for each optimizer, from best to worst."""
    ranked, reference = ranking(study.entries), find_reference(study)
    numbers = {id(entry): number for number, entry in enumerate(study.entries)}
    return [
        Line(
            entry,
            numbers[id(entry)],
            estimate(losses(entry).values()),
            None if entry is ranked[0] else pair(entry, ranked[0]),
            None if reference is None or entry is reference else pair(entry, reference),
            None if reference is None else reach(entry, reference),
            costs(entry),
            diverged(entry),
        )
        for entry in ranked
    ]


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Positions of the points that no other beats or equals in every coordinate, the cheapest first. Leaves out points with `nan`.

    Of equal points the first one stays.
    """
    order = sorted((i for i, point in enumerate(points) if all(map(math.isfinite, point))), key=lambda i: points[i])
    front: list[int] = []
    for i in order:  # a point that beats this one is smaller in this order, so it comes before
        if not any(all(a <= b for a, b in zip(points[j], points[i], strict=True)) for j in front):
            front.append(i)
    return front
