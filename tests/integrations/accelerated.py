"""Accelerate on the ranks of `pool.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from launched import launched


@contextmanager
def one_of_several() -> Iterator[int]:
    """Tell Accelerate of the process group that there is, as a launcher does, and forget it afterwards. Gives the rank."""
    with launched() as rank:
        try:
            yield rank
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


def allow_fsdp() -> None:
    """Let Accelerate shard on a CPU. It chooses FSDP only if the ranks have accelerators; all that follows is the same code."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
