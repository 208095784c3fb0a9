"""The records of a study: one for each finished run, stored as one JSON object a line.

A record holds everything that a report shows, so a report can be drawn again without training, and by people who were not there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..run.events import Times as StepTimes
from ..run.events import finite

__all__ = ["Entry", "Points", "Record", "Stage", "Status", "StepTimes", "Study", "from_line", "to_line"]

Stage = Literal["sweep", "final"]
Status = Literal["finished", "diverged"]
Points = tuple[tuple[int, float], ...]  # (update, value)


@dataclass(frozen=True)
class Record:
    """The outcome of one run of a study."""

    key: str  # hash of everything that determines the outcome; the same run has the same key in every study
    stage: Stage
    label: str  # name of the optimizer in this study
    seed: int
    values: dict[str, float]  # what the sweep varies: {"lr": 0.004, "rank": 64}
    steps: int  # updates planned; of a sweep fewer than of the final runs
    status: Status
    reason: str  # why a diverged run ended; else empty
    validation: Points  # nats per token
    train: Points  # nats per token, smoothed, at most 200 points
    seconds_at: tuple[float, ...]  # seconds of training, without validation, at each point of `validation`
    tokens_per_step: int
    parameters: int
    planned_state_bytes: int | None  # None if the optimizer has no plan
    measured_state_bytes: int
    optimizer_ms: StepTimes
    step_ms: StepTimes  # forward, backward, clipping, optimizer
    captured_energy: Points = ()  # share of the gradient's energy in the subspace, mean over layers weighted by energy; empty without one
    spec: dict[str, Any] = field(default_factory=dict)  # as run, all overrides applied
    config: dict[str, Any] = field(default_factory=dict)  # the `TrainConfig`
    machine: dict[str, str] = field(default_factory=dict)  # {"cpu": ..., "gpu": ..., "threads": ...}
    versions: dict[str, str] = field(default_factory=dict)  # {"subspace-opt": ..., "torch": ..., "python": ...}

    @property
    def loss(self) -> float:
        """The last validation loss in nats per token; infinity if the run diverged."""
        return self.validation[-1][1] if self.status == "finished" and self.validation else math.inf


@dataclass(frozen=True)
class Entry:
    """One optimizer of a study and what its sweep found."""

    label: str
    spec: dict[str, Any]  # as given, before the sweep
    best: dict[str, float]  # values of the final runs
    tried: tuple[Record, ...]  # all runs of the sweep, in the order they were made
    finals: tuple[Record, ...]  # one for each seed, in the order of the seeds
    at_edge: tuple[str, ...] = ()  # swept fields whose best value is the largest or smallest that was tried


@dataclass(frozen=True)
class Study:
    """Everything that a report needs."""

    title: str
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    problem: dict[str, Any]  # model, text, steps, batch: {"model": "mini", "text": "...", "steps": 600, ...}
    command: str  # the command that makes this study again
    machine: dict[str, str]
    versions: dict[str, str]


def to_line(record: Record) -> str:
    """A record as one line of JSON; missing and non-finite values are `null`."""
    return json.dumps(finite(asdict(record)), allow_nan=False)


def from_line(line: str) -> Record:
    """The record of a line that `to_line` wrote.

    Raises:
        ValueError, TypeError, KeyError: the line is incomplete, as after a kill, or of another version.
    """
    read: Mapping[str, Any] = json.loads(line)
    times = {name: StepTimes(**{k: _number(v) for k, v in read[name].items()}) for name in ("optimizer_ms", "step_ms")}
    points = {name: _points(read[name]) for name in ("validation", "train", "captured_energy")}
    values = {name: _number(value) for name, value in read["values"].items()}
    seconds = tuple(_number(value) for value in read["seconds_at"])
    return Record(**{**read, **times, **points, "values": values, "seconds_at": seconds})


def _points(pairs: Iterable[Any]) -> Points:
    return tuple((int(step), _number(value)) for step, value in pairs)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
