"""The environment variables of a launcher, for libraries that run on the ranks of `pool.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist


@contextmanager
def launched() -> Iterator[int]:
    """Set the variables that torchrun sets, and remove them afterwards. Gives the rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "OMP_NUM_THREADS": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
    }
    with mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}):
        yield rank
