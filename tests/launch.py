"""Ranks that one test starts in order to kill them. They are forked from a server that has imported torch, so fifty of them start in
seconds. `pool.py` has ranks that serve many tests.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120.0  # seconds; normal work takes one. A rank that waits for a dead one must not delay the tests
context = mp.get_context("forkserver")
# torch._dynamo is what sharding imports at its first use.
context.set_forkserver_preload(["pytest", "subspace_opt.snapshots", "torch.distributed.fsdp", "torch._dynamo"])

Process = Any


def start(function: Callable[..., Any], size: int, *args: Any) -> tuple[list[Process], list[Any]]:
    """Start processes that run `function(rank, size, send, *args)` in a gloo group, and return them with their pipes. Size 0: one process
    without a group.
    """
    folder = tempfile.mkdtemp()
    processes, pipes = [], []
    for rank in range(max(size, 1)):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(function, rank, size, f"{folder}/store", sender, args), daemon=True)
        process.start()
        sender.close()  # otherwise the pipe would stay open after the process ends
        processes.append(process)
        pipes.append(receiver)
    weakref.finalize(processes[0], shutil.rmtree, folder, ignore_errors=True)
    return processes, pipes


def _run(function: Callable[..., Any], rank: int, size: int, store: str, pipe: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    function(rank, size, lambda message: pipe.send_bytes(packed(message)), *args)
    if size:
        dist.destroy_process_group()


def packed(message: Any) -> bytes:
    """Pickle tensors by value: torch's own pickling shares memory, which ends with the process."""
    file = io.BytesIO()
    torch.save(message, file)
    return file.getvalue()


def received(pipe: Any) -> Any:
    """The next message; None if the process has ended."""
    if not pipe.poll(TIMEOUT):
        raise TimeoutError("a rank says nothing")
    try:
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=True)
    except (EOFError, ConnectionResetError):
        return None


def end(processes: list[Process], kill: bool = False) -> list[int]:
    """Wait for the processes, or kill them with `kill`, and return their exit codes. A process that outlives the timeout is killed and
    fails the test.
    """
    if kill:
        for process in processes:
            process.kill()
    deadline = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    if late:
        raise TimeoutError(f"{len(late)} ranks did not end")
    return [process.exitcode for process in processes]
