"""The host's part in replays of a captured step: which graph comes next, and how far the counters are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...plan import Row
from ..flags.gate import listed
from ..gradients import number_of, updates_so_far
from ..homes import Memory
from ..work import Work

Place = tuple[dict[str, Any], Tensor, Row]


def is_due(row: Row, count: int) -> bool:
    """True if the schedule takes a new basis of a parameter at its next update, after `count` updates."""
    frames = [frame for _, frame in row.splits if frame.opens]
    return any(frame.pipeline.selector.refreshes(count if frame.primes else count + 1, row.turn) for frame in frames)


def refreshes_next(places: Iterable[Place], state: Any, memory: Memory, failures: dict[str, int]) -> bool:
    """True if the next step takes a basis, or a parameter with a gradient has not begun."""
    for group, p, row in places:
        name, own = row.entry.name, state.get(p)
        if not own:
            if p.grad is not None and p.numel():
                return True
            continue
        count = updates_so_far(name, own, memory)
        asked = group["refresh"] or name in failures or name in memory.watch.again
        if count < 1 or is_due(row, count) or (asked and any(frame.opens for _, frame in row.splits)):
            return True
    return False


def count_replay(places: Iterable[Place], state: Any, memory: Memory) -> None:
    """Advance the counts that the host knows by one replay of the last captured step.

    Raises:
        RuntimeError: No step has been captured.
    """
    if not memory.captured:
        raise RuntimeError("count_replay() was called, and no step of this optimizer has been captured; call it after graph.replay()")
    updated = set(memory.captured)
    for _, p, row in places:
        name = row.entry.name
        if name not in updated:
            continue
        own = state[p]
        count = updates_so_far(name, own, memory)
        memory.counts[name] = (own["step"], own["step"]._version, count + 1)
        if "refreshed" in own and is_due(row, count):
            number_of(name, own["refreshed"], memory.marks)
            memory.marks[name] = (own["refreshed"], own["refreshed"]._version, count + 1)


def check_capture(work: Iterable[Work], *, capturable: bool, sharded: bool) -> None:
    """Refuse to be captured in a state that a graph cannot hold.

    Raises:
        RuntimeError: The message says what to do before the capture.
    """
    if not capturable:
        raise RuntimeError("this step is being captured in a CUDA graph; build the optimizer with capturable=True")
    if sharded:
        raise RuntimeError(
            "this step is being captured in a CUDA graph, and its parameters are divided over ranks; run such steps without one"
        )
    items = list(work)
    new = [item.name for item in items if item.count < 1]
    if new:
        raise RuntimeError(f"this step is being captured, and {listed(new)} had no update yet; run a few steps before the capture")
    for item in items:
        if isinstance(item.lr, torch.Tensor) and item.lr.device != item.param.device:
            raise RuntimeError(
                f"this step is being captured: the learning rate is a tensor on {item.lr.device} and '{item.name}' is on "
                f"{item.param.device}, so the graph would keep its present value; put the learning rate there"
            )
