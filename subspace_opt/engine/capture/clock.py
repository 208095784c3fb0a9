"""The clock of a stack on the device. A captured step runs again and again without Python, so it counts by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..work import Options, Phase, Stack


def is_capturing() -> bool:
    """True if a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def has_device_clock(stack: Stack, options: Options) -> bool:
    """True if the stack's rules get counts on the device. A first update, and a refresh that waits anyway, get those of the host."""
    waits = stack.refresh and stack.frame.selector_traits.waits
    return options.capturable and stack.phase is Phase.BEGUN and not waits


def device_clock(stack: Stack) -> tuple[Tensor, Tensor]:
    """The number of this update, and the updates since the last refresh with this one, 0-d float64 on the device.

    All parameters of a stack have the same counts.
    """
    work, frame = stack.pieces[0].work, stack.frame
    t = work.state["step"].double() + (0 if frame.primes else 1)
    if stack.refresh:
        return t, torch.ones_like(t)
    if "refreshed" in work.state:
        return t, t - work.state["refreshed"] + 1
    every, offset = frame.pipeline.selector.every, frame.pipeline.selector.offset_of(work.row.turn)
    return t, t if every is None else torch.minimum((t - 1 + offset) % every, t - 1) + 1
