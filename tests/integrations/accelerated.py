"""Accelerate on the ranks of `pool.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType


@contextmanager
def one_of_several() -> Iterator[int]:
    """Tell Accelerate of the process group that there is, as a launcher does, and forget it afterwards. Gives the rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "OMP_NUM_THREADS": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }
    with mock.patch.dict(os.environ, {name: str(value) for name, value in launched.items()}):
        try:
            yield rank
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


def allow_fsdp() -> None:
    """Let Accelerate shard on a CPU. It chooses FSDP only if the ranks have accelerators; all that follows is the same code."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
