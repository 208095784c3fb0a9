"""Processes for a trial: `certify` starts gloo ranks on this machine, `certify_here` uses the ranks that torchrun has started."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .certificate import Certificate, CertificateError
from .examine import examine
from .trial import Trial


def certify(trials: Sequence[Trial], *, time_limit: float = 600.0, prepare: Callable[[int], None] | None = None) -> list[Certificate]:
    """Start gloo ranks on this machine, one thread each, and run the trials one after the other.

    Args:
        trials: All with the same number of ranks.
        time_limit: Seconds for all trials together.
        prepare: A function at the top of a module; every rank calls it first, with its number.

    Raises:
        CertificateError: a rank failed (with its traceback), was killed, or was not done in time (with the place where it was).
    """
    (number,) = {trial.ranks for trial in trials}
    with tempfile.TemporaryDirectory() as folder:
        port, context = _free_port(), _processes()
        arguments = (tuple(trials), port, time_limit, folder, prepare)
        ranks = [context.Process(target=_run_rank, args=(rank, *arguments), daemon=True) for rank in range(number)]
        for process in ranks:
            process.start()
        try:
            late = _wait(ranks, time.monotonic() + time_limit)
            codes = [process.exitcode for process in ranks]  # read before any rank is killed here
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        _check_ended(codes, late, Path(folder), time_limit)
        return [Certificate.from_dict(each) for each in json.loads((Path(folder) / "certificates.json").read_text(encoding="utf-8"))]


def _processes() -> Any:
    """How ranks are started: forked from a server that has imported everything once, or from scratch where there is no such server."""
    if "forkserver" not in torch.multiprocessing.get_all_start_methods():
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["subspace_opt.lab.verify.examine", "torch.distributed.fsdp", "torch._dynamo"])
    return context


def _wait(ranks: Sequence[Any], deadline: float) -> list[int]:
    """Wait until all ranks have ended, one has failed, or the deadline has passed. Returns the ranks that were late.

    After a failure the other ranks get half a second to report theirs.
    """
    while any(process.is_alive() for process in ranks):
        if time.monotonic() > deadline:
            late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            for rank in late:
                if hasattr(signal, "SIGUSR1"):
                    os.kill(ranks[rank].pid, signal.SIGUSR1)  # makes the rank write its traceback
            time.sleep(0.5)
            return late
        if any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(0.5)
            return []
        ranks[0].join(0.05)
        time.sleep(0.02)
    return []


def _check_ended(codes: Sequence[int | None], late: Sequence[int], folder: Path, time_limit: float) -> None:
    """Raise CertificateError unless every rank succeeded. The message names the rank that failed first."""
    found = {rank: file.read_text(encoding="utf-8") for rank in range(len(codes)) if (file := folder / f"{rank}.error").exists()}
    killed = [] if late else [(rank, -code) for rank, code in enumerate(codes) if code is not None and code < 0]
    first = min(found, key=lambda rank: (folder / f"{rank}.error").stat().st_mtime_ns, default=None)
    if killed:  # before the errors: ranks that lost the killed one as a peer have failed as well
        raise CertificateError(f"rank {killed[0][0]} was killed by signal {killed[0][1]}; the kernel sends 9 when memory runs out")
    if first is not None:
        raise CertificateError(f"rank {first} failed\n{found[first].rstrip()}")
    if late:
        places = "\n".join(f"rank {rank} {_place_of(folder / f'{rank}.trace')}" for rank in late)
        raise CertificateError(f"not done after {time_limit:g} seconds (--time-limit): ranks {', '.join(map(str, late))}\n{places}")
    if bad := [(rank, code) for rank, code in enumerate(codes) if code]:
        raise CertificateError(f"rank {bad[0][0]} exited with status {bad[0][1]} without an error message")


def _place_of(trace: Path) -> str:
    text = trace.read_text(encoding="utf-8").rstrip() if trace.exists() else ""
    return f"was at\n{text}" if text else "had not started"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def _run_rank(rank: int, trials: Sequence[Trial], port: int, time_limit: float, folder: str, prepare: Callable[[int], None] | None) -> None:
    """The main function of a rank: run the trials; rank 0 writes the certificates, a rank that fails writes its traceback."""
    with (Path(folder) / f"{rank}.trace").open("w") as trace:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=trace, all_threads=False)
        torch.set_num_threads(1)
        with Path(os.devnull).open("w") as devnull:
            os.dup2(devnull.fileno(), 1)  # libraries print to stdout, which is for the answer
            os.dup2(devnull.fileno(), 2)
        try:
            if prepare is not None:
                prepare(rank)
            _run_trials(rank, trials, port, time_limit, Path(folder))
        except BaseException:
            file = Path(folder) / f"{rank}.error"
            file.with_suffix(".part").write_text(traceback.format_exc(), encoding="utf-8")
            file.with_suffix(".part").rename(file)
            os._exit(1)  # without waiting for peers, which may be gone


def _run_trials(rank: int, trials: Sequence[Trial], port: int, time_limit: float, folder: Path) -> None:
    import torch.distributed as dist

    late = timedelta(seconds=time_limit + 60)  # longer than the limit of `certify`, which reports where all ranks are
    store = dist.TCPStore("127.0.0.1", port, trials[0].ranks, rank == 0, late)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=trials[0].ranks, timeout=late)
    certificates = [examine(trial, torch.device("cpu")).to_dict() for trial in trials]
    if rank == 0:
        (folder / "certificates.json").write_text(json.dumps(certificates), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def torchrun_ranks() -> int | None:
    """The number of ranks that torchrun has started; None outside torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None


def certify_here(trial: Trial, *, time_limit: float = 600.0) -> Certificate:
    """Run a trial on the ranks that torchrun has started, including this process, on CUDA devices if there are any."""
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    late, on_cuda = timedelta(seconds=time_limit), device.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=late, device_id=device if on_cuda else None)
    try:
        return examine(trial, device)
    except Exception:
        print(f"rank {dist.get_rank()} failed", file=sys.stderr)
        raise
    finally:
        with suppress(Exception):  # a broken group cannot be destroyed; the error above is the one to report
            dist.destroy_process_group()
