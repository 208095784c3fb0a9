"""The events of a run, and its `Result` at the end.

All are plain data: the command line renders them, tests compare them, `log.jsonl` stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from statistics import mean, median
from typing import Any, Literal

Status = Literal["finished", "interrupted", "diverged"]
Curve = tuple[tuple[int, float], ...]  # (step, loss in nats per byte)


@dataclass(frozen=True, slots=True)
class Started:
    """A run starts, or resumes after `step` updates."""

    run: str
    step: int
    steps: int
    parameters: int
    state_bytes: int | None  # as planned; None if the optimizer has no plan
    device: str
    corpus: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """One update has been made. `loss` is that of the batch before the update, in nats per byte."""

    run: str
    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_second: float
    eta_seconds: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The validation loss after `step` updates, in nats per byte."""

    run: str
    step: int
    loss: float

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte."""
        return self.loss / math.log(2)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint has been written."""

    run: str
    step: int
    path: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A run has finished, or was interrupted and has saved a checkpoint."""

    run: str
    step: int
    status: Status
    seconds: float


Event = Started | Stepped | Evaluated | Saved | Ended
OnEvent = Callable[[Event], None]


def finite(value: Any) -> Any:
    """Plain data for JSON: dataclasses become dicts, tuples lists, and numbers that are not finite None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: finite(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record(event: Event) -> dict[str, Any]:
    """An event as a dict, ready for JSON."""
    extra = {"bits_per_byte": event.bits_per_byte} if isinstance(event, Evaluated) else {}
    return {"event": type(event).__name__.lower(), **asdict(event), **extra}


@dataclass(frozen=True, slots=True)
class Times:
    """Statistics of one kind of time over the updates of a run, in milliseconds. All but `first` leave the first update out."""

    first: float  # with allocation and first basis
    median: float
    p95: float
    worst: float
    mean: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """The statistics of times in seconds, in the order of the updates; nan where there is none."""
        later = sorted(seconds[1:]) or [math.nan]
        first = seconds[0] if seconds else math.nan
        p95 = later[math.ceil(0.95 * len(later)) - 1]
        return cls(*(1e3 * value for value in (first, median(later), p95, later[-1], mean(later))))


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a run. Times cover this process only: a resumed run starts again at zero."""

    run: str
    status: Status
    step: int
    parameters: int
    lr: float  # the peak
    train: Curve
    validation: Curve
    planned_state_bytes: int | None
    measured_state_bytes: int
    optimizer_ms: float  # median of `optimizer.step()`
    mean_optimizer_ms: float  # above the median if some steps are expensive, such as those with a refresh
    step_ms: float  # median of a whole update: forward, backward, clipping, optimizer
    tokens_per_second: float  # at the median
    optimizer_times: Times
    step_times: Times
    seconds: Curve  # (step, seconds of all updates so far, without validation) at each validation of this process
    captured_energy: Curve = ()  # (step, share of the gradients' energy in the subspaces) at each validation of this process

    @property
    def validation_loss(self) -> float:
        """The last validation loss in nats per byte; nan if there was no validation."""
        return self.validation[-1][1] if self.validation else math.nan

    @property
    def bits_per_byte(self) -> float:
        """The last validation loss in bits per byte."""
        return self.validation_loss / math.log(2)
