"""A study: does every optimizer get the same sweep, is every finished run kept, do ranks and processes give the study of one process?

Most tests replace training by a formula for the loss, so they test the study alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pool import run_ranks

from subspace_opt.cli import main
from subspace_opt.lab import LabError, TrainConfig
from subspace_opt.lab.corpus import Corpus
from subspace_opt.lab.run.events import Times
from subspace_opt.lab.study import run
from subspace_opt.lab.study.execute import Executor, InterruptedStudyError, one_by_one
from subspace_opt.lab.study.plan import Candidate, StudyConfig, Task, axes
from subspace_opt.lab.study.records import Record, Study, from_line, to_line
from subspace_opt.lab.study.run import Progress, run_study
from subspace_opt.lab.study.store import Store
from subspace_opt.lab.study.sweep import MOST_VALUES, Axis, Point, Search, search


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("loss rank basis step gradient momentum " * 200)
    return path


@pytest.fixture
def config(text: Path, tmp_path: Path) -> StudyConfig:
    problem = TrainConfig(model="tiny", data=(str(text),), steps=4, batch_size=2, length=16, eval_every=2, eval_batches=1, device="cpu")
    candidates = Candidate(label="adamw", spec="adamw"), Candidate(label="galore", spec="galore", overrides={"matrix.selector.rank": 8})
    return StudyConfig(candidates=candidates, problem=problem, seeds=2, sweep_steps=2, out=tmp_path / "study")


def with_(config: StudyConfig, **changes: Any) -> StudyConfig:
    return config.model_copy(update=changes)


class Formula:
    """An executor that computes losses instead of training: the distance of the values from `best` on a logarithmic scale."""

    def __init__(self, best: dict[str, dict[str, float]], *, dies_at: float = math.inf) -> None:
        self.best, self.dies_at, self.ran = best, dies_at, list[Task]()

    def __call__(self, tasks: Sequence[Task]) -> Iterator[Record]:
        for task in tasks:
            self.ran.append(task)
            yield self.record(task)

    def record(self, task: Task) -> Record:
        lr = task.values.get("lr", 1e-3)
        away = sum(abs(math.log2(task.values[field] / value)) for field, value in self.best[task.label].items() if field in task.values)
        diverged = lr >= self.dies_at
        curve = () if diverged else ((0, 5.0), (task.config.steps, 1 + 0.1 * away + 0.01 * task.config.seed))
        times = Times.of([0.1, 0.2])
        return Record(
            key=task.key, stage=task.stage, label=task.label, seed=task.config.seed, values=dict(task.values), steps=task.config.steps,
            status="diverged" if diverged else "finished", reason="too fast" if diverged else "", validation=curve, train=curve,
            seconds_at=tuple(float(step) for step, _ in curve), tokens_per_step=32, parameters=10, planned_state_bytes=8,
            measured_state_bytes=8, optimizer_ms=times, step_ms=times,
        )  # fmt: skip


def formula(**changes: Any) -> Formula:
    return Formula({"adamw": {"lr": 0.004}, "galore": {"lr": 0.005 / 4}}, **changes)


# --------------------------------------------------------------------------------------------------------------------- sweeps


def swept(lines: list[Axis], losses: Any) -> tuple[Search, dict[Point, float]]:
    tried: dict[Point, float] = {}
    while (found := search(lines, tried)).wanted:
        tried.update({point: losses(*(line.value(power) for line, power in zip(lines, point, strict=True))) for point in found.wanted})
    return found, tried


@pytest.mark.parametrize("power", [-5, 0, 1, 4])
def test_a_sweep_widens_until_the_best_value_has_a_worse_neighbour_on_each_side(power: int) -> None:
    best = 1e-3 * 2.0**power
    found, tried = swept([Axis("lr", 1e-3)], lambda lr: abs(math.log2(lr / best)))
    assert found == Search((), (power,), ())
    assert {(power - 1,), (power,), (power + 1,)} <= tried.keys()
    assert len(tried) == abs(power) + 3  # no more than needed


def test_runs_that_diverge_send_a_sweep_to_smaller_values() -> None:
    found, _ = swept([Axis("lr", 1.0)], lambda lr: math.inf if lr > 0.01 else abs(math.log2(lr / 2**-8)))
    assert found.best == (-8,)


def test_a_sweep_without_an_end_stops_and_says_that_its_best_is_at_the_edge() -> None:
    found, tried = swept([Axis("lr", 1.0)], lambda lr: -lr)
    assert (found.at_edge, len(tried)) == (("lr",), MOST_VALUES)


def test_a_rank_stays_whole_and_below_the_width() -> None:
    found, tried = swept([Axis("rank", 12, most=64, whole=True)], lambda rank: -rank)
    assert sorted(Axis("rank", 12, whole=True).value(power) for (power,) in tried) == [6, 12, 24, 48]
    assert found.at_edge == ("rank",)
    found, tried = swept([Axis("rank", 2, most=64, whole=True)], lambda rank: rank)
    assert sorted(tried) == [(-1,), (0,), (1,)]  # not half of 1


def test_a_second_field_is_swept_at_the_best_of_the_first_and_the_first_again() -> None:
    def loss(lr: float, decay: float) -> float:
        return (math.log2(lr) + math.log2(decay) / 2) ** 2 + (math.log2(decay) - 2) ** 2  # the best lr depends on the decay

    found, _ = swept([Axis("lr", 1.0), Axis("weight_decay", 1.0)], loss)
    assert found.best == (-1, 2)


# --------------------------------------------------------------------------------------------------------------------- studies


def test_every_optimizer_is_tuned_then_run_on_seeds_that_the_sweep_never_saw(config: StudyConfig) -> None:
    ran = formula()
    study = run_study(config, execute=ran)
    best = {entry.label: entry.best["lr"] for entry in study.entries}
    assert best == {"adamw": 0.004, "galore": 0.00125}
    for entry in study.entries:
        assert {record.steps for record in entry.tried} == {2}
        assert {record.seed for record in entry.tried} == {0}
        assert [record.seed for record in entry.finals] == [1, 2] == list(study.seeds)
        assert all(record.values == entry.best for record in entry.finals)
    assert {task.config.overrides.get("matrix.selector.rank") for task in ran.ran if task.label == "galore"} == {8}


def test_the_same_study_again_runs_nothing_and_gives_the_same(config: StudyConfig) -> None:
    first, again = formula(), formula()
    study = run_study(config, execute=first)
    assert run_study(config, execute=again) == study
    assert again.ran == []
    assert len(first.ran) == len({task.key for task in first.ran})


def test_another_optimizer_or_seed_runs_only_what_is_new(config: StudyConfig) -> None:
    run_study(config, execute=formula())
    more = with_(config, seeds=3, candidates=(*config.candidates, Candidate(label="muon", spec="muon")))
    new = Formula({"adamw": {"lr": 0.004}, "galore": {"lr": 0.005 / 4}, "muon": {"lr": 0.02}})
    run_study(more, execute=new)
    assert {(task.label, task.stage, task.config.seed) for task in new.ran if task.label != "muon"} == {
        ("adamw", "final", 3),
        ("galore", "final", 3),
    }


@pytest.mark.parametrize(
    "change", [{"length": 8}, {"batch_size": 4}, {"clip": 0.5}, {"warmup": 0}, {"model": "mini"}, {"weight_decay": 0.5}]
)
def test_another_problem_runs_everything_again(config: StudyConfig, change: dict[str, Any]) -> None:
    run_study(config, execute=formula())
    other = formula()
    run_study(with_(config, problem=config.problem.model_copy(update=change)), execute=other)
    assert len(other.ran) == 2 * 2 + (2 + 3) + (3 + 3)  # two final runs each, and both sweeps


def test_an_interrupted_study_keeps_what_is_finished(config: StudyConfig) -> None:
    class Stopped(Formula):
        def __call__(self, tasks: Sequence[Task]) -> Iterator[Record]:
            yield from super().__call__(tasks[:2])
            raise InterruptedStudyError("stopped")

    with pytest.raises(InterruptedStudyError, match=r"2 finished runs are stored in .*; the same command continues"):
        run_study(config, execute=Stopped(formula().best))
    rest, whole = formula(), formula()
    study = run_study(config, execute=rest)
    assert run_study(with_(config, out=config.out / "other"), execute=whole) == study
    assert len(rest.ran) == len(whole.ran) - 2


def test_rates_that_diverge_are_kept_and_not_chosen(config: StudyConfig) -> None:
    study = run_study(config, execute=formula(dies_at=0.004))
    adamw = study.entries[0]
    assert adamw.best["lr"] == 0.002
    assert [record.loss for record in adamw.tried if record.values["lr"] >= 0.004] == [math.inf]


def test_progress_counts_every_known_run_and_estimates_the_time(config: StudyConfig) -> None:
    told: list[Progress] = []
    run_study(config, execute=formula(), on_progress=told.append)
    done = [progress.done for progress in told if progress.record is not None]
    assert done == sorted(done)
    assert math.isnan(told[0].seconds_left)
    assert (told[-1].left, told[-1].seconds_left) == (0, 0.0)
    assert told[-2].seconds_left == pytest.approx(4.0)  # one final run of four updates, one second each


def test_what_a_spec_does_not_have_is_not_swept_for_it(config: StudyConfig) -> None:
    config = with_(config, tune=("lr", "rank", "weight_decay"))
    assert [axis.field for axis in axes(config, config.candidates[0])] == ["lr", "weight_decay"]
    (rank,) = (axis for axis in axes(config, config.candidates[1]) if axis.field == "rank")
    assert (rank.start, rank.most, rank.whole) == (8, 64, True)
    study = run_study(config, execute=Formula({"adamw": {"lr": 0.001}, "galore": {"lr": 0.005, "rank": 16}}))
    assert study.entries[1].best["rank"] == 16
    assert study.entries[1].finals[0].values["rank"] == 16


# -------------------------------------------------------------------------------------------------------------- records on disk


def test_a_record_survives_its_line(config: StudyConfig) -> None:
    study = run_study(config, execute=formula())
    for record in (*study.entries[0].tried, *study.entries[1].finals):
        line = to_line(record)
        json.loads(line, parse_constant=pytest.fail)
        assert from_line(line) == record


def test_a_line_cut_by_a_kill_is_run_again(config: StudyConfig) -> None:
    study = run_study(config, execute=formula())
    path = config.out / "runs.jsonl"
    path.write_text(path.read_text()[:-20])
    again = formula()
    assert run_study(config, execute=again) == study
    assert len(again.ran) == 1
    assert run_study(config, execute=again) == study
    assert len(again.ran) == 1


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\nnot json\n{}\n')
    with pytest.raises(LabError, match=r"runs\.jsonl:1: this line is no record .* Remove the line"):
        Store(tmp_path).read()


# ------------------------------------------------------------------------------------------------------------- ranks, processes


def study_on_rank(config: StudyConfig) -> tuple[list[str], Study]:
    ran = formula()
    return [task.key for task in run_and_list(config, ran)], run_study(config, execute=ran)


def run_and_list(config: StudyConfig, ran: Formula) -> list[Task]:
    run_study(config, execute=ran)
    return list(ran.ran)


@pytest.mark.slow
def test_ranks_divide_the_runs_and_end_with_the_same_study(config: StudyConfig) -> None:
    alone = formula()
    study = run_study(with_(config, out=config.out / "alone"), execute=alone)
    (one, first), (two, second) = run_ranks(2, study_on_rank, config)
    assert first == second == study
    assert not set(one) & set(two)
    assert sorted(one + two) == sorted(task.key for task in alone.ran)
    assert min(len(one), len(two)) >= len(alone.ran) // 2 - 2


def test_a_real_run_gives_a_record_with_everything(config: StudyConfig) -> None:
    corpus = Corpus.load(config.problem.data)
    real: Executor = one_by_one(corpus, None)
    kept: list[Task] = []

    def first_only(tasks: Sequence[Task]) -> Iterator[Record]:
        kept.extend(tasks)
        yield from real([task for task in tasks if task.label == "galore"][:1])
        raise InterruptedStudyError("enough")

    with pytest.raises(InterruptedStudyError):
        run_study(config, execute=first_only)
    (record,) = Store(config.out).read().records.values()
    assert record.loss < 6
    assert record.measured_state_bytes == record.planned_state_bytes
    assert record.optimizer_ms.worst >= record.optimizer_ms.p95 >= record.optimizer_ms.median > 0
    assert record.step_ms.median > record.optimizer_ms.median
    assert record.spec["pipelines"]["matrix"]["selector"]["rank"] == 8
    assert [step for step, _ in record.captured_energy] == [2]
    assert 0 < record.captured_energy[0][1] < 1
    assert record.machine["cores"]
    assert record.versions.keys() == {"subspace-opt", "torch", "python"}
    assert from_line(to_line(record)) == record


# -------------------------------------------------------------------------------------------------------------------- bad input


def test_errors_name_the_option_and_the_remedy(config: StudyConfig) -> None:
    with pytest.raises(LabError, match=r"--tune rnak: none of adamw, galore has this field .* Give lr, weight_decay, rank"):
        with_(config, tune=("rnak",)).checked()
    with pytest.raises(LabError, match=r"two optimizers are called .adamw.\. Give one a name"):
        with_(config, candidates=(config.candidates[0],) * 2).checked()


# ------------------------------------------------------------------------------------------------------------------- the command


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["compare", *map(str, arguments)])
    code = left.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.slow
def test_the_command_compares_reports_and_runs_nothing_twice(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = ["--model", "tiny", "--data", text, "--steps", 2, "--seeds", 1, "--batch-size", 1, "--length", 8, "--eval-batches", 1]
    arguments = ["adamw", "low=galore,matrix.selector.rank=4", *problem, "--sweep-steps", 1, "--device", "cpu", "--out", tmp_path / "out"]
    monkeypatch.setattr(run, "search", lambda axes, tried: search(axes, tried) if len(tried) < 3 else Search((), (0,), ()))
    assert call(*arguments) == 0
    said = capsys.readouterr()
    assert "[8/8] final low, lr 0.01, seed 1" in said.err
    assert "has the lowest final validation loss" in said.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "runs.jsonl", "turns.json", "report.html", "results.csv", "results.json"
    }  # fmt: skip
    timed = (tmp_path / "out" / "turns.json").read_bytes()
    assert call(*arguments, "--json") == 0
    again = capsys.readouterr()
    assert "[" not in again.err
    assert (tmp_path / "out" / "turns.json").read_bytes() == timed
    (turns,) = json.loads(timed).values()
    assert {one["label"]: one["costs"]["step_median"] for one in json.loads(again.out)["optimizers"]} == {
        label: whole["median"] for label, (whole, _) in turns.items()
    }
    assert {one["label"] for one in json.loads(again.out)["optimizers"]} == {"adamw", "low"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cosmos", "cosmos"], "two optimizers are called 'cosmos'. Give one a name"),
        (["a=,x=1"], "compare: 'a=,x=1' is no optimizer. Give a preset or file"),
        (["cosmos,matrix.selector.rnak=3"], "rnak"),
        (["cosmos,matrix.selector.rank"], "give PATH=VALUE"),
        (["cosmo"], "cosmos"),
        (["cosmos", "--length", "0"], "--length"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
