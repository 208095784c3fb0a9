"""Where a run computes, and a clock that waits until it has."""

from __future__ import annotations

import time

import torch

from ..errors import LabError


def choose_device(asked: str) -> torch.device:
    """`auto` is the best there is. Raises LabError for a device that this machine or this torch lacks."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name, found in there.items() if found))
    if not there[asked]:
        raise LabError(f"device: torch {torch.__version__} finds no {asked} here. Use auto or cpu")
    return torch.device(asked)


def clock(device: torch.device) -> float:
    """Seconds, read once the device has done what it was told: kernels are only queued when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
