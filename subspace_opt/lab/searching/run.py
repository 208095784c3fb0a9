"""A search: successive halving under budgets of bytes, step time and total time, then a confirmation on another problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from ... import build
from ..config import TrainConfig
from ..corpus import VOCAB_SIZE, Corpus
from ..errors import LabError
from ..model import SIZES, meta_model
from ..run.events import OnEvent
from ..run.measure import planned_bytes
from ..study.execute import Executor, InterruptedStudyError, one_by_one, side_by_side
from ..study.plan import SWEEP_SEED, Candidate, StudyConfig, Task, task
from ..study.records import Record, Study
from ..study.run import OnProgress, Progress, run_study
from ..study.statistics import Pairing, pair, pareto_front, ranking
from ..study.store import Store
from .halving import affordable, rungs, survivors
from .space import Space

UNIT = Candidate(label="adamw", spec="adamw")  # bytes and times are relative to it
HALVING_SHARE = 0.5  # of the time; the rest is for the confirmation
CONFIRM_SEED = 101  # the first seed of the confirmation: no run of the halving has one of its seeds
SWEEPS = 5  # runs that a sweep of a learning rate usually takes


class SearchConfig(BaseModel):
    """What to search, and within which budgets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    problem: TrainConfig = Field(description="model, text and batch; its `steps` are the most updates of one run")
    confirm_data: tuple[str, ...] = Field(description="another text for the confirmation")
    confirm_model: str = Field(description="a model of about twice the width or depth for the confirmation")
    references: tuple[Candidate, ...] = Field(description="optimizers that a winner must beat")
    space: Path | None = Field(default=None, description="YAML file of the space; none: the space of this package")
    budget: PositiveFloat = Field(description="seconds for everything")
    bytes: PositiveFloat = Field(default=1.0, description="most state bytes, relative to AdamW's")
    time: PositiveFloat = Field(default=2.0, description="longest median update (forward, backward and optimizer), relative to AdamW's")
    first_steps: PositiveInt = Field(default=50, description="updates of the first rung")
    seeds: PositiveInt = Field(default=3, description="seeds of the confirmation")
    jobs: PositiveInt = Field(default=1, description="runs side by side")
    out: Path = Field(description="folder for records and report")
    command: str = Field(default="", description="the command that makes this search again")
    plugins: tuple[Path, ...] = Field(default=(), description="Python files that register kinds")


@dataclass(frozen=True)
class Trial:
    """What the search knows of one candidate."""

    candidate: Candidate
    bytes: float  # relative to AdamW's
    time: float  # median update relative to AdamW's, in the first rung
    losses: dict[int, float]  # updates of a rung -> the lowest loss over learning rates
    lr: float  # of the lowest loss in the last rung that it ran


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    trials: tuple[Trial, ...]  # of all candidates and references that ran, best first
    front: tuple[str, ...]  # of the last rung: no other has a loss, bytes and time that are all as low
    too_large: tuple[str, ...]  # left out before they ran
    too_slow: tuple[str, ...]  # left out after the first rung
    not_tried: int  # candidates for which the budget had no room
    finalist: Candidate | None  # None if no candidate meets the budgets
    confirmation: Study | None
    pairing: Pairing | None  # of the finalist and the best reference, in the confirmation
    winner: Candidate | None  # the finalist with its learning rate, if the confirmation holds
    updates: tuple[int, int] = (0, 0)  # of a run in the last rung, and of a final run in the confirmation


def search(
    config: SearchConfig, *, on_event: OnEvent | None = None, on_progress: OnProgress | None = None, execute: Executor | None = None
) -> Found:
    """Search, then confirm. Finished runs are stored, so the same call continues an interrupted search.

    Raises:
        LabError: the problem cannot be posed, or the budget is too small for two candidates.
        InterruptedStudyError: a signal arrived.
    """
    return _Search(config, on_event, on_progress, execute).go()


@dataclass
class _State:
    """Candidates that are still in the search, with their best learning rate."""

    alive: dict[str, Candidate]
    rates: dict[str, float]
    losses: dict[str, dict[int, float]] = field(default_factory=dict)


class _Search:
    def __init__(self, config: SearchConfig, on_event: OnEvent | None, on_progress: OnProgress | None, execute: Executor | None) -> None:
        self.config, self.on_event, self.on_progress = config, on_event, on_progress
        self.corpus = Corpus.load(config.problem.data, max_bytes=config.problem.max_bytes)
        self.other_text()
        self.store = Store(config.out).read()
        self.given = execute
        here = side_by_side(config.jobs, config.plugins) if config.jobs > 1 else one_by_one(self.corpus, on_event)
        self.execute: Executor = execute or here
        self.references = {one.label: one for one in (UNIT, *config.references)}

    def other_text(self) -> None:
        """Check that the confirmation has another text."""
        there = Corpus.load(self.config.confirm_data, max_bytes=self.config.problem.max_bytes)
        if there.fingerprint == self.corpus.fingerprint:
            raise LabError("--confirm-data: this is the text of the search. Give another one, or no winner can be confirmed")

    def go(self) -> Found:
        bytes_, too_large, candidates = self.planned()
        self.run([self.task(UNIT, self.config.first_steps, self.rate(UNIT))])
        unit = self.record(UNIT, self.config.first_steps, self.rate(UNIT))
        most, seconds = len(candidates), unit.step_ms.median / 1e3
        left = self.config.budget * HALVING_SHARE * self.config.jobs / (seconds * max(1.0, self.config.time))
        count = affordable(most + len(self.references), self.config.first_steps, self.config.problem.steps, left)
        count -= len(self.references)
        if count < 2:
            raise LabError(
                f"--budget: {self.config.budget:.0f} s allow fewer than two candidates, as one update takes {seconds:.2f} s. "
                "Give more time, fewer --first-steps, or a smaller model"
            )
        state = _State(dict(list(_spread(candidates, count).items())), {})
        state.alive |= self.references
        not_tried, tried = most - min(most, count), dict(state.alive)
        times, too_slow = self.halve(state, unit)
        trials = [Trial(tried[name], bytes_[name], times[name], losses, state.rates[name]) for name, losses in state.losses.items()]
        return self.confirmed(trials, state, too_large, too_slow, not_tried)

    # -------------------------------------------------------------------------------------------------------------- the halving

    def planned(self) -> tuple[dict[str, float], tuple[str, ...], dict[str, Candidate]]:
        """State bytes relative to AdamW's, the candidates that take too many, and the others."""
        model = meta_model(self.config.problem.model, vocab_size=VOCAB_SIZE, max_length=self.config.problem.length)

        def planned(candidate: Candidate) -> float:
            return float(planned_bytes(build(candidate.loaded(), model)) or 0)

        unit = planned(UNIT)
        space = {one.label: one for one in Space.load(self.config.space).candidates()}
        if same := sorted(space.keys() & self.references.keys()):
            raise LabError(f"--against: {same[0]} is also the name of a candidate. Give the reference another name: ref={same[0]}")
        ratios = {name: planned(one) / unit for name, one in {**space, **self.references}.items()}
        too_large = tuple(name for name in space if ratios[name] > self.config.bytes)
        if len(too_large) == len(space):
            least = min(ratios[name] for name in space)
            raise LabError(f"--bytes: no candidate has so little state; the smallest takes {least:.2f} of AdamW's. Give at least that")
        return ratios, too_large, {name: one for name, one in space.items() if name not in too_large}

    def halve(self, state: _State, unit: Record) -> tuple[dict[str, float], tuple[str, ...]]:
        """Run the rungs. Returns the update time of each candidate relative to AdamW's, and the candidates that take too long."""
        plan = rungs(len(state.alive), self.config.first_steps, self.config.problem.steps)
        times: dict[str, float] = {}
        too_slow: tuple[str, ...] = ()
        for number, rung in enumerate(plan):
            points = {name: [state.rates.get(name, self.rate(one))] for name, one in state.alive.items()}
            if number:
                points = {name: [rate / 2, rate, 2 * rate] for name, (rate,) in points.items()}
            self.run([self.task(state.alive[name], rung.steps, rate) for name, rates in points.items() for rate in rates])
            for name, rates in points.items():
                found = {rate: self.record(state.alive[name], rung.steps, rate) for rate in rates}
                state.rates[name] = min(found, key=lambda rate: (found[rate].loss, rate))
                state.losses.setdefault(name, {})[rung.steps] = found[state.rates[name]].loss
                times.setdefault(name, min(one.step_ms.median for one in found.values()) / unit.step_ms.median)
            if not number:
                too_slow = tuple(name for name in state.alive if name not in self.references and times[name] > self.config.time)
            if number + 1 < len(plan):
                losses = {name: state.losses[name][rung.steps] for name in state.alive if name not in (*too_slow, *self.references)}
                kept = survivors(losses, max(2, plan[number + 1].count - len(self.references)))
                state.alive = {name: one for name, one in state.alive.items() if name in kept or name in self.references}
        state.alive = {name: one for name, one in state.alive.items() if name not in too_slow}
        return times, too_slow

    def rate(self, candidate: Candidate) -> float:
        return candidate.loaded().defaults.lr

    def task(self, candidate: Candidate, steps: int, lr: float) -> Task:
        config = self.config
        study = StudyConfig(candidates=(candidate,), problem=config.problem, sweep_steps=steps, out=config.out)
        return task(study, candidate, "sweep", SWEEP_SEED, {"lr": lr}, self.corpus.fingerprint)

    def record(self, candidate: Candidate, steps: int, lr: float) -> Record:
        return self.store.records[self.task(candidate, steps, lr).key]

    def run(self, tasks: Sequence[Task]) -> None:
        """Run the tasks that are not stored."""
        missing = [one for one in tasks if one.key not in self.store.records]
        try:
            for number, record in enumerate(self.execute(missing) if missing else (), start=1):
                self.store.add(record)
                if self.on_progress:
                    self.on_progress(Progress(number, len(missing) - number, math.nan, record))
        except InterruptedStudyError as error:
            raise InterruptedStudyError(
                f"{error}. {len(self.store.records)} finished runs are stored in {self.config.out}; the same command continues"
            ) from error

    # --------------------------------------------------------------------------------------------------------- the confirmation

    def confirmed(self, trials: list[Trial], state: _State, too_large: tuple[str, ...], too_slow: tuple[str, ...], not_tried: int) -> Found:
        """Compare the best candidate with the references on another text, another model and other seeds."""
        last = max(max(one.losses) for one in trials)
        trials.sort(key=lambda one: (-max(one.losses), one.losses[max(one.losses)]))
        reached = {one.candidate.label: one for one in trials if last in one.losses}
        names = list(reached)
        front = [names[i] for i in pareto_front([(one.losses[last], one.bytes, one.time) for one in reached.values()])]
        own = [one for name, one in reached.items() if name not in self.references and name in state.alive]
        outcome: dict[str, Any] = {"trials": tuple(trials), "front": tuple(front), "too_large": too_large, "too_slow": too_slow}
        outcome["not_tried"] = not_tried
        if not own or not math.isfinite(own[0].losses[last]):
            return Found(**outcome, finalist=None, confirmation=None, pairing=None, winner=None)
        finalist = own[0].candidate
        study = self.confirm(finalist)
        entries = {entry.label: entry for entry in study.entries}
        best = next(entry for entry in ranking(study.entries) if entry.label != finalist.label)
        pairing = pair(entries[finalist.label], best)
        updates = (last, self.confirm_steps())
        is_below = pairing.below == len(pairing.seeds) and pairing.difference.excludes_zero and pairing.difference.mean < 0
        holds = is_below and updates[1] >= updates[0]  # a shorter confirmation would ask another question than the search
        winner = _with_rate(finalist, entries[finalist.label].best["lr"]) if holds else None
        return Found(**outcome, finalist=finalist, confirmation=study, pairing=pairing, winner=winner, updates=updates)

    def confirm(self, finalist: Candidate) -> Study:
        config, problem = self.config, self.config.problem
        candidates = (finalist, *self.references.values())
        confirm = StudyConfig(
            candidates=candidates,
            problem=problem.model_copy(update={"model": config.confirm_model, "data": config.confirm_data, "steps": self.confirm_steps()}),
            seeds=config.seeds,
            first_seed=CONFIRM_SEED,
            sweep_steps=max(1, self.confirm_steps() // 2),
            jobs=config.jobs,
            out=config.out / "confirmation",
            title=f"Confirmation of {finalist.label}",
            command=config.command,
            plugins=config.plugins,
        )
        return run_study(confirm, on_event=self.on_event, on_progress=self.on_progress, execute=self.given)

    def confirm_steps(self) -> int:
        """Updates of a run of the confirmation, from the time that is left for it and the sizes of the two models."""
        config = self.config
        small, large = (sum(p.numel() for p in self.model(name).parameters()) for name in (config.problem.model, config.confirm_model))
        update = self.record(UNIT, config.first_steps, self.rate(UNIT)).step_ms.median / 1e3 * large / small * max(1.0, config.time)
        runs = (1 + len(self.references)) * (SWEEPS / 2 + config.seeds)
        return max(2, min(config.problem.steps, int(config.budget * (1 - HALVING_SHARE) * config.jobs / (update * runs))))

    def model(self, name: str) -> Any:
        return meta_model(name, vocab_size=VOCAB_SIZE, max_length=self.config.problem.length)


def next_size(model: str) -> str:
    """The size after `model`, which has about twice its width.

    Raises:
        LabError: there is no next size.
    """
    names = list(SIZES)
    if model not in names[:-1]:
        raise LabError(f"--confirm-model: give a model of about twice the size of {model}, as there is no next size")
    return names[names.index(model) + 1]


def _spread(candidates: dict[str, Candidate], count: int) -> dict[str, Candidate]:
    """`count` candidates at equal distances in the order of the space, so that every place keeps its variety."""
    names = list(candidates)
    if count >= len(names):
        return dict(candidates)
    return {name: candidates[name] for name in (names[i * len(names) // count] for i in range(count))}


def _with_rate(candidate: Candidate, lr: float) -> Candidate:
    return candidate.model_copy(update={"overrides": {**candidate.overrides, "defaults.lr": lr}})
