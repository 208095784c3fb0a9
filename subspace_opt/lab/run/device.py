"""The device of a run, and a clock that waits for its kernels."""

from __future__ import annotations

import time

import torch

from ..errors import LabError


def choose_device(asked: str) -> torch.device:
    """The device `asked`; for `auto` the first of cuda, mps and cpu that is available.

    Raises:
        LabError: this machine or this torch does not have the device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name, found in there.items() if found))
    if not there[asked]:
        raise LabError(f"device: torch {torch.__version__} finds no {asked} here. Use auto or cpu")
    return torch.device(asked)


def clock(device: torch.device) -> float:
    """Seconds of a monotonic clock, read after the device has finished: calls return when their kernels are queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
