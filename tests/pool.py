"""A pool of ranks: processes with a gloo process group that serve many tests, so that a test does not pay for starting them.

`run_ranks(4, function, *arguments)` calls `function(*arguments)` on four ranks and returns the four results. Every pytest worker
keeps one pool per number of ranks for its whole run. A task that raises, dies or hangs fails the test with the tracebacks of its ranks. Its
pool is killed then, and the next task of that size starts a new one. Tests that kill ranks on purpose start their own (`launch.py`).
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import context

LIMIT = 240.0  # seconds until the ranks of a task count as hung
GRACE = 2.0  # seconds that the other ranks have for their own error once one has failed


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on each of `size` ranks of a process group and return their answers in the order of ranks.

    The function and its arguments are pickled, so the function must be at the top level of a module.

    Raises:
        AssertionError: a rank raised, died or did not answer in time; with the tracebacks.
    """
    if size not in _pools:
        _pools[size] = Pool(size)
    try:
        return _pools[size].run(function, *arguments)
    except BaseException:
        _pools.pop(size).kill()
        raise


class Pool:
    """Processes of one process group that wait for tasks."""

    def __init__(self, size: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self.folder, theirs), daemon=True)
            process.start()
            theirs.close()  # otherwise the pipe would stay open after the process ends
            self.pipes.append(own)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
        """The answer of every rank."""
        task = pickle.dumps((function, arguments))
        for pipe in self.pipes:
            pipe.send_bytes(task)
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        ends = time.monotonic() + limit
        while len(answers) + len(errors) < len(self.pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers and rank not in errors}
            ready = wait(waiting, max(0.0, ends - time.monotonic()))
            for pipe in ready:
                self._take(waiting[pipe], answers, errors)
            if errors and ends > time.monotonic() + GRACE:
                ends = time.monotonic() + GRACE
            if not ready:
                errors |= {rank: f"no answer after {limit:.0f} seconds\n{self._stack(rank)}" for rank in waiting.values() if not errors}
                break
        assert not errors, "\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items()))
        return [answers[rank] for rank in range(len(self.pipes))]

    def _take(self, rank: int, answers: dict[int, Any], errors: dict[int, str]) -> None:
        """Read a rank's message: its answer, its traceback, or the end of its pipe."""
        try:
            failed, answer = pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(GRACE)
            errors[rank] = f"ended with exit code {self.processes[rank].exitcode}"
            return
        (errors if failed else answers)[rank] = answer

    def _stack(self, rank: int) -> str:
        """The stack of a rank that does not answer."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)
        file = _stack_file(self.folder, rank)
        return file.read_text() if file.exists() else ""

    def kill(self) -> None:
        """End all processes at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


_pools: dict[int, Pool] = {}


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.stack"


def _serve(rank: int, size: int, folder: Path, pipe: Connection) -> None:
    """Answer tasks until the pipe ends."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with _stack_file(folder, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        while True:
            try:
                task = pipe.recv_bytes()
            except EOFError:
                return
            pipe.send_bytes(_answer(rank, task))


def _answer(rank: int, task: bytes) -> bytes:
    """Run a task; return True if it failed, and its result or traceback."""
    torch.manual_seed(1000 + rank)  # each rank has a seed of its own, so a task that depends on the global generator fails
    try:
        function, arguments = pickle.loads(task)
        if not gc.get_freeze_count():
            gc.freeze()  # the collector need not visit torch and the modules of the tests, which live to the end
        with warnings.catch_warnings():
            return pickle.dumps((False, function(*arguments)))  # tensors by value: multiprocessing would open a file for each
    except BaseException:
        return pickle.dumps((True, traceback.format_exc()))
