"""Run the tasks of a study: one after another, side by side in processes, or divided over the ranks that torchrun has started."""

from __future__ import annotations

import logging
import os
import platform
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
import torch.multiprocessing

from ... import __version__, load_plugin, load_spec
from ..corpus import Corpus
from ..errors import DivergedError, LabError
from ..report import smooth
from ..run.events import OnEvent, Result
from ..run.training import train
from .plan import Task
from .records import Points, Record

TRAIN_POINTS = 200


class Executor(Protocol):
    """Runs tasks and yields their records in the order in which they end."""

    def __call__(self, tasks: Sequence[Task]) -> Iterator[Record]: ...


class InterruptedStudyError(LabError):
    """A signal has stopped the study; finished runs are stored."""


def one_by_one(corpus: Corpus, on_event: OnEvent | None) -> Executor:
    """An executor in this process."""

    def execute(tasks: Sequence[Task]) -> Iterator[Record]:
        for task in tasks:
            yield run_task(task, corpus, on_event)

    return execute


def side_by_side(jobs: int, plugins: Sequence[Path]) -> Executor:
    """An executor with `jobs` processes, which share the cores between them and live as long as this process."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = torch.multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin, (threads, tuple(plugins)))  # starts a process when there is a task for it

    def execute(tasks: Sequence[Task]) -> Iterator[Record]:
        try:
            for future in as_completed([pool.submit(_run_here, task) for task in tasks]):
                yield future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise InterruptedStudyError("the comparison was interrupted") from None

    return execute


def run_task(task: Task, corpus: Corpus, on_event: OnEvent | None = None) -> Record:
    """Train once and return the record. A run that diverges has a record too: its loss is infinite.

    Raises:
        InterruptedStudyError: a signal arrived during the run.
    """
    try:
        result, reason = train(task.config, on_event=on_event, corpus=corpus), ""
    except DivergedError as error:
        result, reason = error.result, str(error)
    except torch.linalg.LinAlgError as error:
        raise LabError(f"{task.label} with {task.values}: {error}") from error
    if result.status == "interrupted":
        raise InterruptedStudyError(f"{task.label} was interrupted after {result.step} updates")
    return _record(task, result, reason)


def _record(task: Task, result: Result, reason: str) -> Record:
    config = task.config
    return Record(
        key=task.key,
        stage=task.stage,
        label=task.label,
        seed=config.seed,
        values={"lr": result.lr, **task.values},
        steps=config.steps,
        status="diverged" if reason else "finished",
        reason=reason,
        validation=result.validation,
        train=_thinned(smooth(result.train)),
        seconds_at=tuple(seconds for _, seconds in result.seconds),
        tokens_per_step=config.tokens_per_step,
        parameters=result.parameters,
        planned_state_bytes=result.planned_state_bytes,
        measured_state_bytes=result.measured_state_bytes,
        optimizer_ms=result.optimizer_times,
        step_ms=result.step_times,
        captured_energy=result.captured_energy,
        spec=load_spec(config.spec, config.overrides).model_dump(mode="json"),
        config=config.model_dump(mode="json"),
        machine=machine(),
        versions=versions(),
    )


def _thinned(curve: Points) -> Points:
    """At most `TRAIN_POINTS` points, the last one among them."""
    every = -(-len(curve) // TRAIN_POINTS) or 1
    return tuple(curve[::-every][::-1])


def machine() -> dict[str, str]:
    """What the times depend on."""
    found = {"system": f"{platform.system()} {platform.machine()}", "cpu": _cpu_name(), "cores": str(os.cpu_count() or 1)}
    found["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """The versions that the results depend on."""
    return {"subspace-opt": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


# ------------------------------------------------------------------------------------------------------------- processes of a pool


def _begin(threads: int, plugins: Sequence[Path]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    for package in ("torchao", "torch.utils._pytree"):  # imported by transformers; logs warnings about unused kernels
        logging.getLogger(package).setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    for plugin in plugins:
        load_plugin(plugin)


def _run_here(task: Task) -> Record:
    return run_task(task, _corpus(task.config.data, task.config.max_bytes))


@lru_cache(maxsize=1)
def _corpus(data: tuple[str, ...], max_bytes: int) -> Corpus:
    return Corpus.load(data, max_bytes=max_bytes)


# --------------------------------------------------------------------------------------------------------------------- torchrun


class Ranks:
    """The processes that torchrun has started, those of a process group that exists already, or this process alone.

    Ranks share the folder of the study. They exchange nothing but barriers.
    """

    def __init__(self) -> None:
        there = torch.distributed.is_initialized()
        self.own_group = not there and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self.own_group:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        joined = there or self.own_group
        self.world = torch.distributed.get_world_size() if joined else 1
        self.rank = torch.distributed.get_rank() if joined else 0

    def own(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The tasks of this rank."""
        return tasks[self.rank :: self.world]

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """End the process group, if it was begun here."""
        if self.own_group:
            torch.distributed.destroy_process_group()
