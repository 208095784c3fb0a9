"""Step times by turns: all optimizers of a study make one update each, in a new order every round.

Runs of a study may be hours apart, and other load on the machine then decides which optimizer looks fast. By turns, load slows all alike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

from ..corpus import Corpus
from ..run.events import Times, finite
from ..run.training import Run
from .plan import Task
from .records import Record

TURNS = "turns.json"

Timed = tuple[Times, Times]  # of the whole update, and of the optimizer in it


def by_turns(tasks: Sequence[Task], corpus: Corpus, rounds: int, folder: Path) -> dict[str, Timed]:
    """The times of every task's optimizer by its label, measured in this process or read from the folder.

    Args:
        tasks: One for each optimizer. All models are in memory at once.
        rounds: Updates of each. The first one is the warm-up: it counts as `first` alone.
    """
    name = blake2b(json.dumps([rounds, *(task.key for task in tasks)]).encode(), digest_size=12).hexdigest()
    path = folder / TURNS
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if name not in stored:
        stored[name] = finite({label: [asdict(times) for times in pair] for label, pair in _measured(tasks, corpus, rounds).items()})
        path.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    return {label: (Times(**whole), Times(**own)) for label, (whole, own) in stored[name].items()}


def _measured(tasks: Sequence[Task], corpus: Corpus, rounds: int) -> dict[str, Timed]:
    runs = {task.label: Run(task.config.model_copy(update={"eval_every": 0}), corpus, None, None) for task in tasks}
    order = list(runs.values())
    shuffled = random.Random(0)
    for _ in range(min([rounds, *(task.config.steps for task in tasks)])):
        shuffled.shuffle(order)
        for run in order:
            run.update()
    return {label: (Times.of(run.times.whole), Times.of(run.times.optimizer)) for label, run in runs.items()}


def timed(record: Record, times: Timed) -> Record:
    """The record with other times: every update takes the mean of the turns."""
    whole, own = times
    seconds = tuple(step * whole.mean / 1e3 for step, _ in record.validation)
    return replace(record, step_ms=whole, optimizer_ms=own, seconds_at=seconds)
