"""A search: are its rungs affordable, are budgets kept, is a winner claimed only after a confirmation?

Training is replaced by a formula, so these tests test the search alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_opt.cli import main
from subspace_opt.cli.studies.search import verdict
from subspace_opt.lab import LabError, TrainConfig
from subspace_opt.lab.run.events import Times
from subspace_opt.lab.searching.halving import FINALISTS, affordable, rungs, survivors, updates
from subspace_opt.lab.searching.run import CONFIRM_SEED, SearchConfig, next_size, search
from subspace_opt.lab.searching.space import Space
from subspace_opt.lab.study.plan import Candidate, Task
from subspace_opt.lab.study.records import Record
from subspace_opt.lab.study.statistics import pareto_front

SPACE = """
selector: [none, {kind: fft, rank: 4}, {kind: fft, rank: 0.5}]
inside: [sign, {kind: adam, beta1: 0.9}]
complement: [muon, {kind: adam, beta1: 0.9}]
finish: [{kind: rms_normalize, scale: 0.2}]
"""


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} loss rank basis step " * 100)
    (tmp_path / "space.yaml").write_text(SPACE)
    problem = TrainConfig(model="tiny", data=(str(tmp_path / "one.txt"),), steps=40, batch_size=1, length=8, device="cpu")
    return SearchConfig(
        problem=problem,
        confirm_data=(str(tmp_path / "two.txt"),),
        confirm_model="mini",
        references=(Candidate(label="lion", spec="lion"),),
        space=tmp_path / "space.yaml",
        budget=3600.0,
        bytes=2.0,
        time=1.5,
        first_steps=10,
        out=tmp_path / "out",
    )


def with_(config: SearchConfig, **changes: Any) -> SearchConfig:
    return config.model_copy(update=changes)


Loss = Callable[[Task], float]


class Formula:
    """An executor that computes losses and times instead of training."""

    def __init__(self, loss: Loss, times: Mapping[str, float] | None = None) -> None:
        self.loss, self.times, self.ran = loss, times or {}, list[Task]()

    def __call__(self, tasks: Sequence[Task]) -> Iterator[Record]:
        for task in tasks:
            self.ran.append(task)
            loss = self.loss(task)
            times = Times.of([1e-3, 1e-3 * self.times.get(task.label, 1.0)])
            curve = ((0, 5.0), (task.config.steps, loss))
            yield Record(
                key=task.key, stage=task.stage, label=task.label, seed=task.config.seed, values=task.values, steps=task.config.steps,
                status="finished" if math.isfinite(loss) else "diverged", reason="", validation=curve, train=curve, seconds_at=(0.0, 1.0),
                tokens_per_step=8, parameters=10, planned_state_bytes=8, measured_state_bytes=8, optimizer_ms=times, step_ms=times,
            )  # fmt: skip


def good(label: str, *, everywhere: bool) -> Loss:
    """`label` is best; in the confirmation only if `everywhere`."""

    def loss(task: Task) -> float:
        lead = 0.5 if task.label == label and (everywhere or task.config.seed < CONFIRM_SEED) else 0.0
        return 2.0 - lead + 0.01 * abs(math.log2(task.values["lr"] / 0.004)) + 0.001 * task.config.seed

    return loss


# ----------------------------------------------------------------------------------------------------------- rungs and survivors


@given(count=st.integers(1, 500), first=st.integers(1, 100), times=st.integers(1, 64))
def test_rungs_get_fewer_and_longer(count: int, first: int, times: int) -> None:
    plan = rungs(count, first, first * times)
    assert (plan[0].count, plan[0].steps) == (count, first)
    for shorter, longer in pairwise(plan):
        assert longer.steps == 2 * shorter.steps <= first * times
        assert FINALISTS <= longer.count < shorter.count


@given(budget=st.floats(0, 1e5), most=st.integers(1, 200))
def test_as_many_candidates_as_the_budget_holds(budget: float, most: int) -> None:
    count = affordable(most, 20, 160, budget)
    assert not count or updates(rungs(count, 20, 160)) <= budget
    assert count == most or updates(rungs(count + 1, 20, 160)) > budget


def test_survivors_are_finite_and_the_front_is_not_beaten() -> None:
    assert survivors({"a": 2.0, "b": math.inf, "c": 1.0, "d": 2.0}, 3) == ["c", "a", "d"]
    assert pareto_front([(2.0, 2.0, 1.0), (1.0, 3.0, 1.0), (2.0, 4.0, 1.0), (1.0, 3.0, 1.0), (2.0, 4.0, 0.5)]) == [1, 0, 4]


# ------------------------------------------------------------------------------------------------------------------------ space


def test_every_candidate_is_a_spec_with_a_name_of_its_own(config: SearchConfig) -> None:
    candidates = Space.load(config.space).candidates()
    names = [one.label for one in candidates]
    assert names == [
        "whole-muon", "whole-adam", "fft4-sign-muon", "fft4-sign-adam", "fft4-adam-muon", "fft4-adam-adam", "fft50-sign-muon",
        "fft50-sign-adam", "fft50-adam-muon", "fft50-adam-adam",
    ]  # fmt: skip
    assert len({one.loaded().to_json() for one in candidates}) == len(candidates)
    assert len(Space.load().candidates()) > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selektor: [none]", "selektor is no place. Places: momentum, selector"),
        ("selector: none", "give a mapping of places to lists of parts"),
        ("complement: [maoun]", r"no combination of the space is a valid spec. The first reason: .*maoun"),
        ("a: [", "this file cannot be read"),
    ],
)
def test_errors_of_a_space_name_the_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(LabError, match=message):
        Space.load(tmp_path / "space.yaml").candidates()


# -------------------------------------------------------------------------------------------------------------------- the search


def test_a_confirmed_candidate_wins_with_its_tuned_rate(config: SearchConfig) -> None:
    ran = Formula(good("fft4-adam-muon", everywhere=True))
    found = search(config, execute=ran)
    assert found.winner is not None
    assert found.winner.label == "fft4-adam-muon"
    assert found.winner.loaded().defaults.lr == 0.004
    assert found.pairing is not None
    assert (found.pairing.below, found.pairing.above) == (3, 0)
    assert "wins" in verdict(found)
    confirming = [task for task in ran.ran if task.config.model == "mini"]
    assert {task.config.seed for task in confirming if task.stage == "final"} == {101, 102, 103}
    assert {task.config.data for task in confirming} == {config.confirm_data}
    assert {task.label for task in confirming} == {"fft4-adam-muon", "adamw", "lion"}


def test_without_a_confirmation_no_winner_is_claimed(config: SearchConfig) -> None:
    found = search(config, execute=Formula(good("fft4-adam-muon", everywhere=False)))
    assert found.finalist is not None
    assert found.finalist.label == "fft4-adam-muon"
    assert found.winner is None
    assert verdict(found).startswith("No winner is claimed. fft4-adam-muon was best in the search, but")


def test_a_confirmation_that_is_shorter_than_the_search_decides_nothing(config: SearchConfig) -> None:
    found = search(with_(config, budget=1.0), execute=Formula(good("whole-muon", everywhere=True)))
    assert found.pairing is not None
    assert found.pairing.below == 3
    assert found.updates[1] < found.updates[0]
    assert found.winner is None
    assert "so it decides nothing" in verdict(found)


def test_the_same_search_again_runs_nothing(config: SearchConfig) -> None:
    first, again = Formula(good("whole-adam", everywhere=True)), Formula(good("whole-adam", everywhere=True))
    assert search(config, execute=first) == search(config, execute=again)
    assert again.ran == []


def test_budgets_of_bytes_and_time_are_kept(config: SearchConfig) -> None:
    slow = Formula(good("fft50-sign-muon", everywhere=True), {"fft50-sign-muon": 3.0})
    found = search(with_(config, bytes=0.9), execute=slow)
    assert found.too_slow == ("fft50-sign-muon",)
    assert "whole-adam" in found.too_large
    assert not {task.label for task in slow.ran} & set(found.too_large)
    assert found.finalist is not None
    assert found.finalist.label != "fft50-sign-muon"
    assert all(trial.bytes <= 0.9 for trial in found.trials if trial.candidate.label not in ("adamw", "lion"))
    assert max(task.config.steps for task in slow.ran if task.label == "fft50-sign-muon") == config.first_steps


def test_a_small_budget_tries_fewer_and_says_how_many_not(config: SearchConfig) -> None:
    found = search(with_(config, budget=0.6), execute=Formula(good("whole-muon", everywhere=True)))
    tried = {trial.candidate.label for trial in found.trials} - {"adamw", "lion"}
    assert 2 <= len(tried) < 10
    assert found.not_tried == 10 - len(tried)


def test_errors_name_the_option_and_the_remedy(config: SearchConfig) -> None:
    ran = Formula(good("whole-muon", everywhere=True))
    with pytest.raises(LabError, match=r"--bytes: no candidate has so little state; the smallest takes 0\.\d\d of AdamW's"):
        search(with_(config, bytes=0.01), execute=ran)
    with pytest.raises(LabError, match="--budget: 0 s allow fewer than two candidates"):
        search(with_(config, budget=0.01), execute=ran)
    with pytest.raises(LabError, match="--confirm-data: this is the text of the search"):
        search(with_(config, confirm_data=config.problem.data), execute=ran)
    with pytest.raises(LabError, match="whole-muon is also the name of a candidate"):
        search(with_(config, references=(Candidate(label="whole-muon", spec="muon"),)), execute=ran)
    with pytest.raises(LabError, match="--confirm-model: give a model of about twice the size of 70b"):
        next_size("70b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--confirm-data: give another text"),
        (["--confirm-data", "x", "--budget", "2"], "--budget 2: give a time with its unit"),
        (["--confirm-data", "x", "--bytes", "-1"], "--bytes -1: give a ratio to AdamW's"),
        (["--confirm-data", "/nowhere/x"], "/nowhere/x"),
    ],
)
def test_bad_input_of_the_command(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["search", *arguments, "--model", "tiny", "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
