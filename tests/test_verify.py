"""The certificate passes ranks that agree with one process, fails ranks that differ, and reports ranks that die.

Ranks are started once for many trials, because starting them takes longer than the trials.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from subspace_opt.cli.ranks import verdict
from subspace_opt.lab.verify import Certificate, CertificateError, Difference, RankBytes, Trial, certify

pytestmark = pytest.mark.slow  # ranks

SMALL = {"matrix.selector.rank": 16}  # less than the model's width, so there is a complement
TRIALS = [
    Trial("cosmos", "fsdp", 2, steps=4, overrides=SMALL),
    Trial("cosmos", "tp", 2, steps=4, overrides=SMALL),
    Trial("cosmos", "hsdp", 2, (2, 1), steps=2, overrides=SMALL),
    Trial("galore", "ddp", 2, steps=3, dtype="float32", overrides=SMALL),
    Trial("galore", "fsdp", 2, steps=3, overrides=SMALL),  # some of its matrices send only coordinates
    Trial("soap", "fsdp+tp", 2, (2, 1), steps=2),
    Trial("muon", "fsdp+tp", 2, (1, 2), steps=2, dtype="bfloat16"),
    Trial("adamw", "fsdp", 2, steps=2, vocab=257),  # rows that two ranks do not divide
    Trial("muon", "fsdp", 2, steps=3, train=True),
    Trial("adamw", "ddp", 2, steps=2, train=True),
    Trial("muon", "tp", 2, steps=2, train=True),
]


@pytest.fixture(scope="module")
def certificates() -> list[Certificate]:
    return certify(TRIALS, time_limit=400)


@pytest.mark.parametrize("number", range(len(TRIALS)), ids=lambda i: f"{TRIALS[i].spec}-{TRIALS[i].mesh}{'-train' * TRIALS[i].train}")
def test_ranks_do_what_one_process_does(number: int, certificates: list[Certificate]) -> None:
    """Weights on every rank agree, and the measured bytes of state and traffic are those of a plan made without a process group."""
    certificate = certificates[number]
    assert certificate.trial == TRIALS[number]
    assert certificate.weights_hold, certificate.largest
    moved = [each.way > 0 or (certificate.trial.dtype == "bfloat16" and "norm" in each.name) for each in certificate.differences]
    assert all(moved)  # a small update does not change a norm's weight of 1 in bfloat16
    for rank in certificate.ranks:
        assert (rank.held, rank.sent_first) == (rank.planned, rank.expected_first), rank
        assert rank.sent_least == rank.expected, rank  # every trial has later steps without a refresh
        assert rank.sent_most in (rank.expected, rank.expected_first), rank
    assert certificate.holds
    assert verdict(certificate).startswith("equal: ")
    assert Certificate.from_dict(certificate.to_dict()) == certificate


def test_state_is_divided(certificates: list[Certificate]) -> None:
    for certificate in certificates:
        held = sum(rank.held for rank in certificate.ranks)
        if certificate.trial.mesh in ("fsdp", "hsdp", "ddp") and certificate.trial.shape is None:
            counters = len(certificate.differences) * 8  # a counter or two of every parameter on every rank
            assert certificate.one_process_bytes <= held <= certificate.one_process_bytes + counters
            assert max(rank.held for rank in certificate.ranks) < 0.6 * held


def test_a_full_basis_is_told(certificates: list[Certificate]) -> None:
    assert certificates[0].full == ()


# --- ranks that differ


def go_astray(rank: int) -> None:
    """Break the optimizer on rank 1 alone: it changes a weight a little and sends one message more."""
    from subspace_opt.distributed import step as distributed

    step = distributed.take_step

    def wrong(params: list[distributed.ShardedParam], *rest: object) -> None:
        step(params, *rest)  # type: ignore[arg-type]
        if rank == 1:
            params[-1].weight.add_(1e-4)
        both = torch.zeros(2, dtype=torch.uint8)
        dist.all_to_all_single(torch.empty_like(both), both)

    distributed.take_step = wrong


def test_a_wrong_optimizer_is_caught() -> None:
    (certificate,) = certify([Trial("muon", "fsdp", 2, steps=2)], time_limit=200, prepare=go_astray)
    assert not certificate.weights_hold
    wrong = [each.name for each in certificate.differences if each.part > certificate.tolerance]
    assert wrong == ["lm_head.weight"]
    assert certificate.largest.largest == pytest.approx(2e-4)
    assert [rank.sent_first - rank.expected_first for rank in certificate.ranks] == [1, 1]
    assert [rank.held - rank.planned for rank in certificate.ranks] == [0, 0]
    assert not certificate.holds
    assert verdict(certificate).startswith("'lm_head.weight' differs by ")
    assert verdict(certificate).endswith("; the bytes of rank 0, 1 differ from the plan")


@pytest.mark.parametrize("gap", [float("inf"), 1.0])
def test_a_layer_far_off_does_not_hold(gap: float) -> None:
    ranks = (RankBytes(0, 8, 8, 4, 4, 4, 4, 4, 0),)
    certificate = Certificate(Trial("muon", "fsdp", 1), "muon", "cpu", 1, (), 8, 1e-6, (Difference("w", gap, 0.5),), ranks)
    assert certificate.bytes_hold
    assert not certificate.weights_hold
    assert not certificate.holds


@pytest.mark.parametrize(("number", "by"), [(1, 1), (3, 1), (3, -1), (4, -1), (5, 1)])
def test_a_byte_more_or_less_does_not_hold(number: int, by: int) -> None:
    good = [0, 8, 8, 6, 4, 6, 6, 4, 0]
    assert RankBytes(*good).holds
    good[number] += by
    assert not RankBytes(*good).holds


# --- ranks that do not finish


def fail(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("on purpose")


def die(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def sleep(rank: int) -> None:
    if rank == 1:
        time.sleep(1000)


def test_a_rank_that_fails_is_told_with_its_traceback() -> None:
    with pytest.raises(CertificateError, match=r"rank 1 failed\nTraceback [\s\S]*in fail\n[\s\S]*ZeroDivisionError: on purpose"):
        certify([Trial("muon", "fsdp", 2)], prepare=fail)


def test_a_rank_that_is_killed_is_told() -> None:
    with pytest.raises(CertificateError, match="rank 1 was killed by signal 9"):
        certify([Trial("muon", "fsdp", 2)], prepare=die)


def test_ranks_that_hang_are_ended_and_told() -> None:
    began = time.monotonic()
    with pytest.raises(CertificateError, match=r"not done after 12 seconds \(--time-limit\): ranks [\s\S]*rank 1 was at[\s\S]*in sleep"):
        certify([Trial("muon", "fsdp", 2)], time_limit=12, prepare=sleep)
    assert time.monotonic() - began < 60
