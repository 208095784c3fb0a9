"""A whole study: sweeps in rounds, then final runs over seeds. Finished runs are stored at once, and stored runs are not made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..corpus import Corpus
from ..errors import LabError
from ..run.events import OnEvent
from .execute import Executor, InterruptedStudyError, Ranks, machine, one_by_one, side_by_side, versions
from .plan import SWEEP_SEED, Candidate, StudyConfig, Task, axes, task
from .records import Entry, Record, Stage, Study
from .store import Store
from .sweep import Axis, Point, Search, search
from .turns import by_turns, timed


@dataclass(frozen=True)
class Progress:
    """How far a study is. `left` counts the runs that are known so far: a sweep may still widen its grid."""

    done: int  # runs of this study that are stored
    left: int
    seconds_left: float  # estimate for the known runs; nan before the first run has ended
    record: Record | None = None  # the run that has just ended


_SHOWN = {"model", "steps", "batch_size", "accumulate", "length", "warmup", "min_lr_ratio", "clip"}  # fields of the problem in a report

OnProgress = Callable[[Progress], None]


def run_study(
    config: StudyConfig,
    *,
    on_event: OnEvent | None = None,
    on_progress: OnProgress | None = None,
    execute: Executor | None = None,
) -> Study:
    """Run what is not stored yet, and return the study.

    Under torchrun the runs are divided over the ranks, which must share the folder `config.out`.

    Args:
        on_event: Called with every event of every run of this process; not with `jobs` above 1.
        on_progress: Called before and after every run.
        execute: Runs tasks; by default they are trained here, or in `config.jobs` processes.

    Raises:
        LabError: the problem cannot be posed, or a stored record cannot be read.
        InterruptedStudyError: a signal arrived; the same call continues.
    """
    config.checked()
    runner = _Runner(config, on_event, on_progress, execute)
    try:
        return runner.go()
    finally:
        runner.ranks.leave()


class _Runner:
    def __init__(self, config: StudyConfig, on_event: OnEvent | None, on_progress: OnProgress | None, execute: Executor | None) -> None:
        problem = config.problem
        self.config, self.on_progress = config, on_progress
        self.corpus = Corpus.load(problem.data, max_bytes=problem.max_bytes)
        self.ranks = Ranks()
        self.store = Store(config.out, self.ranks.rank)
        self.agree()
        self.tasks: dict[tuple[Any, ...], Task] = {}
        here = side_by_side(config.jobs, config.plugins) if config.jobs > 1 else one_by_one(self.corpus, on_event)
        self.execute: Executor = execute or here
        self.turns = config.turns if execute is None and self.ranks.rank == 0 else 0
        self.seeds = range(config.first_seed, config.first_seed + config.seeds)
        self.axes = {candidate.label: axes(config, candidate) for candidate in config.candidates}

    def go(self) -> Study:
        """Sweep until no candidate wants another run, then make the final runs."""
        candidates = self.config.candidates
        while wanted := [self.sweep_task(each, point) for each in candidates for point in self.searched(each).wanted]:
            self.run(wanted)
        finals = [one for each in candidates for one in self.final_tasks(each, self.searched(each))]
        if missing := [one for one in finals if one.key not in self.store.records]:
            self.run(missing)
        return self.study()

    def run(self, tasks: Sequence[Task]) -> None:
        """Run tasks, store their records, and wait for those of other ranks."""
        try:
            self.say(None)
            if own := self.ranks.own(tasks):
                for record in self.execute(own):
                    self.store.add(record)
                    self.say(record)
        except InterruptedStudyError as error:
            raise InterruptedStudyError(
                f"{error}. {len(self.store.records)} finished runs are stored in {self.config.out}; the same command continues"
            ) from error
        self.agree()

    def agree(self) -> None:
        """Read the records of all ranks. No rank adds one before all have read the same."""
        self.ranks.wait()
        self.store.read()
        self.ranks.wait()

    # ------------------------------------------------------------------------------------------------------------------ tasks

    def searched(self, candidate: Candidate) -> Search:
        return search(self.axes[candidate.label], self.tried(candidate))

    def tried(self, candidate: Candidate) -> dict[Point, float]:
        """The losses of a candidate's sweep by point: those stored, from the start outwards."""
        lines, found, wanted = self.axes[candidate.label], {}, search(self.axes[candidate.label], {}).wanted
        while wanted:  # walk the sweep along what is stored: other points of the grid may be stored by another study
            known = {point: self.store.records.get(self.sweep_task(candidate, point).key) for point in wanted}
            found.update({point: record.loss for point, record in known.items() if record is not None})
            wanted = () if None in known.values() else search(lines, found).wanted
        return found

    def sweep_task(self, candidate: Candidate, point: Point) -> Task:
        return self.task(candidate, "sweep", SWEEP_SEED, _values(self.axes[candidate.label], point))

    def final_tasks(self, candidate: Candidate, found: Search) -> list[Task]:
        values = _values(self.axes[candidate.label], found.best)
        return [self.task(candidate, "final", seed, values) for seed in self.seeds]

    def task(self, candidate: Candidate, stage: Stage, seed: int, values: dict[str, float]) -> Task:
        place = candidate.label, stage, seed, tuple(values.items())
        if place not in self.tasks:
            self.tasks[place] = task(self.config, candidate, stage, seed, values, self.corpus.fingerprint)
        return self.tasks[place]

    # --------------------------------------------------------------------------------------------------------------- reporting

    def say(self, record: Record | None) -> None:
        """Tell the caller how far the study is."""
        if self.on_progress is None:
            return
        known: dict[str, Task] = {}
        for candidate in self.config.candidates:
            points, found = self.tried(candidate), self.searched(candidate)
            sweep = [self.sweep_task(candidate, point) for point in (*points, *found.wanted)]
            known |= {one.key: one for one in (*sweep, *self.final_tasks(candidate, found))}
        missing = [one for key, one in known.items() if key not in self.store.records]
        self.on_progress(Progress(len(known) - len(missing), len(missing), self.seconds_left(missing), record))

    def seconds_left(self, missing: Sequence[Task]) -> float:
        """Updates left times the mean seconds of an update of the same optimizer, or of all."""
        speeds: dict[str, list[float]] = {}
        for record in self.store.records.values():
            if record.seconds_at and record.validation[-1][0]:
                speeds.setdefault(record.label, []).append(record.seconds_at[-1] / record.validation[-1][0])
        every = [speed for each in speeds.values() for speed in each]
        if not every:
            return float("nan")
        own = {label: sum(each) / len(each) for label, each in speeds.items()}
        overall = sum(every) / len(every)
        seconds = sum(one.config.steps * own.get(one.label, overall) for one in missing)
        return seconds / max(self.config.jobs, self.ranks.world)

    def study(self) -> Study:
        config, problem = self.config, self.config.problem
        entries = tuple(self.entry(candidate) for candidate in config.candidates)
        if self.turns:
            firsts = [self.final_tasks(candidate, self.searched(candidate))[0] for candidate in config.candidates]
            times = by_turns(firsts, self.corpus, self.turns, config.out)
            entries = tuple(replace(one, finals=tuple(timed(record, times[one.label]) for record in one.finals)) for one in entries)
        return Study(
            title=config.title or f"{', '.join(candidate.label for candidate in config.candidates)} on {problem.model}",
            entries=entries,
            seeds=tuple(self.seeds),
            problem=self.problem(),
            command=config.command,
            machine=machine(),
            versions=versions(),
        )

    def problem(self) -> dict[str, Any]:
        config, problem = self.config, self.config.problem
        return {
            **problem.model_dump(mode="json", include=_SHOWN),
            "weight_decay": "each spec's own" if problem.weight_decay is None else problem.weight_decay,
            "text": self.corpus.describe(),
            "eval_windows": problem.eval_batches * problem.batch_size,
            "tuned": ", ".join(config.tune),
            "sweep_steps": config.sweep_steps,
            "sweep_seed": SWEEP_SEED,
            "jobs": config.jobs,
            "turns": self.turns,
        }

    def entry(self, candidate: Candidate) -> Entry:
        found, records = self.searched(candidate), self.store.records
        tried = [records[self.sweep_task(candidate, point).key] for point in self.tried(candidate)]
        finals = [records[one.key] for one in self.final_tasks(candidate, found)]
        if not finals:
            raise LabError(f"{candidate.label}: no final run")
        spec = candidate.loaded().model_dump(mode="json")
        return Entry(candidate.label, spec, _values(self.axes[candidate.label], found.best), tuple(tried), tuple(finals), found.at_edge)


def _values(lines: Sequence[Axis], point: Point) -> dict[str, float]:
    return {axis.field: axis.value(power) for axis, power in zip(lines, point, strict=True)}
