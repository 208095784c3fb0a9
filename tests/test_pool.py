"""Does the pool of ranks report an error of a rank, and does it go on with new processes afterwards?"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pool, run_ranks

pytestmark = pytest.mark.slow


def who() -> tuple[int, int, int, float]:
    """Rank, number of ranks, process, and a sum over all ranks."""
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), os.getpid(), total.item()


def fails(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ZeroDivisionError("on purpose")
    dist.all_reduce(torch.ones(1))


def dies(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def hangs(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def test_tasks_share_processes_and_a_failed_one_gets_new_processes_for_the_next() -> None:
    first, again = run_ranks(2, who), run_ranks(2, who)
    assert [answer[:2] for answer in first] == [(0, 2), (1, 2)]
    assert [answer[3] for answer in first] == [3.0, 3.0]
    assert again == first
    with pytest.raises(AssertionError, match=r"rank 1: Traceback [\s\S]*in fails\n[\s\S]*ZeroDivisionError: on purpose"):
        run_ranks(2, fails, 1)
    after = run_ranks(2, who)
    assert [answer[3] for answer in after] == [3.0, 3.0]
    assert not {answer[2] for answer in after} & {answer[2] for answer in first}


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(AssertionError, match="rank 0: ended with exit code -9"):
        run_ranks(2, dies, 0)


def test_a_rank_that_hangs_is_named_with_its_stack() -> None:
    pool = Pool(2)
    try:
        with pytest.raises(AssertionError, match=r"^rank 1: no answer after 3 seconds\n[\s\S]*in hangs") as caught:
            pool.run(hangs, 1, limit=3.0)
    finally:
        pool.kill()
    assert "rank 0" not in str(caught.value)
