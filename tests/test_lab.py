"""The lab: is text split and drawn the same on every machine, does a run survive every interruption, is a comparison fair?

Models and texts are as small as possible. Tests that do not depend on the optimizer use torch's AdamW, so that they fail for the lab's own
faults only.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from subspace_opt.lab import comparison, corpus, report
from subspace_opt.lab import demo as demos
from subspace_opt.lab import model as models
from subspace_opt.lab.config import TrainConfig
from subspace_opt.lab.corpus import Corpus
from subspace_opt.lab.errors import LabError
from subspace_opt.lab.run import checkpoint, device, training
from subspace_opt.lab.run.events import Ended, Evaluated, Event, Result, Saved, Started, Stepped, Times
from subspace_opt.lab.run.measure import measured_bytes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty small files."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for number in range(40):
        lines = (" ".join(words.choices(("loss", "rank", "basis", "step"), k=8)) for _ in range(40))
        (folder / f"{number:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def small(text: Path) -> Corpus:
    return Corpus.load([text])


@pytest.fixture
def config(text: Path) -> TrainConfig:
    return TrainConfig(spec="stand-in", data=(str(text),), steps=6, batch_size=2, length=16, lr=1e-2, eval_every=3, device="cpu")


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.lr or 1e-3)


def with_(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), **changes})


def train(config: TrainConfig, **options: Any) -> Result:
    return training.train(config, **{"make_optimizer": adamw, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.read(folder / "last.pt")["model"]
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(step: int, act: Callable[[], None]) -> Callable[[Event], None]:
    return lambda event: act() if isinstance(event, Stepped) and event.step == step else None


# ---------------------------------------------------------------- text


def test_the_default_text_is_the_standard_library() -> None:
    found = Corpus.load(max_bytes=2**20)
    assert found.train.numel() + found.validation.numel() == pytest.approx(2**20, rel=0.01)
    assert 0.01 < found.validation.numel() / 2**20 < 0.25
    assert "standard library" in found.describe()


def test_the_split_depends_on_relative_names_alone(text: Path, small: Corpus, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in sorted(text.iterdir(), reverse=True):
        (elsewhere / file.name).write_bytes(file.read_bytes())
    moved = Corpus.load([elsewhere])
    assert moved.fingerprint == small.fingerprint
    assert torch.equal(moved.validation, small.validation)


def test_whole_files_are_either_trained_or_validated_on(text: Path, small: Corpus) -> None:
    sides = [bytes(small.train.tolist()).split(b"\0"), bytes(small.validation.tolist()).split(b"\0")]
    assert sorted(file for side in sides for file in side if file) == sorted(f.read_bytes() for f in text.iterdir())


def test_a_single_file_is_validated_on_its_end(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abcdefghij" * 100)
    found = Corpus.load([tmp_path / "one.txt"])
    assert (found.train.numel(), found.validation.numel()) == (951, 51)  # each with its end-of-file byte


def test_a_cap_keeps_the_same_files_every_time(text: Path) -> None:
    capped = [Corpus.load([text], max_bytes=20_000) for _ in range(2)]
    assert capped[0].fingerprint == capped[1].fingerprint
    assert capped[0].train.numel() + capped[0].validation.numel() <= 20_000 + capped[0].files
    assert capped[0].files > 5


def test_what_is_not_text_is_left_out_with_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain words " * 50)
    (tmp_path / "b.bin").write_bytes(b"\0\1\2" * 50)
    (tmp_path / "c.txt").write_bytes("Wörter ".encode("latin-1") * 50)
    found = Corpus.load([tmp_path])
    assert found.files == 1
    assert found.skipped == ("b.bin: binary", "c.txt: not UTF-8")
    assert "2 left out (b.bin: binary)" in found.describe()


def test_a_cap_may_cut_through_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("€" * 1000)
    assert Corpus.load([tmp_path / "a.txt"], max_bytes=1000).files == 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nowhere", "is neither a file nor a folder"),
        (lambda folder: folder, "no text in .* Give a text file"),
        (lambda folder: (folder / "x.bin", (folder / "x.bin").write_bytes(b"\0"))[0], "left out: x.bin: binary"),
    ],
)
def test_text_that_is_not_there_is_said(make: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=says):
        Corpus.load([make(tmp_path)])


def test_too_little_text_says_how_much_is_needed(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(LabError, match=r"needs at least 17.*340 bytes in all are enough"):
        train(with_(config, data=(str(tmp_path / "short.txt"),)))


@given(step=st.integers(0, 10**9), seed=st.integers(0, 10**9))
def test_a_batch_is_a_pure_function_of_seed_and_step(small: Corpus, step: int, seed: int) -> None:
    before = torch.get_rng_state()
    first, second = (small.batch(step, 3, 16, seed) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.shape, first.dtype) == ((3, 17), torch.int64)
    assert not torch.equal(first, small.batch(step + 1, 3, 16, seed))
    assert not torch.equal(first, small.batch(step, 3, 16, seed + 1))


def test_validation_windows_are_spread_and_fixed(small: Corpus) -> None:
    windows = small.validation_windows(8, 16)
    assert torch.equal(windows, small.validation_windows(8, 16))
    assert windows[0].tolist() == small.validation[:17].tolist()
    assert windows[-1].tolist() == small.validation[-17:].tolist()
    assert len(small.validation_windows(10**6, 16)) <= small.validation.numel() // 17


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(("name", "millions"), [("60m", 58), ("130m", 134), ("350m", 368), ("1b", 1339), ("7b", 6738), ("70b", 68977)])
def test_paper_sizes_have_the_papers_parameters_and_no_memory(name: str, millions: int) -> None:
    model = models.meta_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert all(p.is_meta for p in model.parameters())


def test_weights_depend_on_the_seed_and_disturb_nothing() -> None:
    before = torch.get_rng_state()
    first, second, other = (models.make_model("tiny", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, second)
    assert not equal(first, other)


def test_a_hugging_face_config_is_a_model_too(tmp_path: Path) -> None:
    config: Any = models.make_model("tiny").config
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert models.meta_model(str(path), vocab_size=None).get_parameter("lm_head.weight").shape == (256, 64)


def test_unknown_models_are_said(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"'minni' is neither .* Did you mean 'mini'\? Known sizes: tiny, mini"):
        models.make_model("minni")
    with pytest.raises(LabError, match="has no Hugging Face config"):
        models.make_model(str(tmp_path))


def test_without_transformers_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LabError, match=r"pip install 'subspace-opt\[lab\]'"):
        models.make_model("tiny")


@pytest.mark.slow
def test_importing_the_lab_imports_neither_transformers_nor_matplotlib() -> None:
    code = "import sys, subspace_opt.lab as l; l.TrainConfig; print({'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_device_that_is_not_there_is_said() -> None:
    assert device.choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(LabError, match="finds no cuda here"):
            device.choose_device("cuda")


# ---------------------------------------------------------------- a run


@given(steps=st.integers(1, 300), warmup=st.integers(0, 50), floor=st.floats(0, 1))
def test_the_schedule_rises_then_falls_to_its_floor(steps: int, warmup: int, floor: float) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, min_lr_ratio=floor)
    factors = [config.lr_factor(step) for step in range(steps)]
    assert all(a < b for a, b in pairwise(factors[:warmup]))
    assert all(a >= b for a, b in pairwise(factors[warmup:]))
    assert all(min(floor, 1 / (warmup + 1)) <= f <= 1 for f in factors)
    assert config.lr_factor(max(steps, warmup)) == pytest.approx(1.0 if warmup >= steps else floor)


def test_a_run_tells_its_story_and_logs_it(config: TrainConfig, tmp_path: Path) -> None:
    told: list[Event] = []
    result = train(with_(config, out=tmp_path / "run", save_every=4), on_event=told.append)
    kinds = [type(event).__name__ for event in told]
    halves = ["Stepped"] * 3 + ["Evaluated"], ["Stepped", "Saved", "Stepped", "Stepped", "Evaluated"]
    assert kinds == ["Started", "Evaluated", *halves[0], *halves[1], "Saved", "Ended"]
    steps = [event for event in told if isinstance(event, Stepped)]
    assert [event.lr for event in steps] == [1e-2 * config.lr_factor(at) for at in range(6)]
    assert all(event.tokens_per_second > 0 and event.eta_seconds >= 0 for event in steps)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in logged] == [kind.lower() for kind in kinds]
    assert (result.status, result.step, len(result.train), len(result.validation)) == ("finished", 6, 6, 3)
    last = told[-3]
    assert isinstance(last, Evaluated)
    assert result.validation_loss == last.loss == pytest.approx(last.bits_per_byte * math.log(2))
    assert 0 < result.optimizer_ms < result.step_ms


def test_a_run_learns(config: TrainConfig) -> None:
    result = train(with_(config, steps=60, batch_size=8, warmup=5, eval_every=0))
    assert result.train[0][1] == pytest.approx(math.log(256), abs=0.5)
    assert result.validation_loss < 3


def test_a_resumed_run_ends_with_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    train(with_(config, out=tmp_path / "whole"))
    halted = with_(config, out=tmp_path / "halted")
    stop = at_step(4, lambda: signal.raise_signal(signal.SIGTERM))
    assert train(halted, on_event=stop).status == "interrupted"
    torch.manual_seed(123)  # a resumed process has other random numbers
    resumed = train(halted, resume=True)
    assert (resumed.status, resumed.step) == ("finished", 6)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "halted"))
    stories = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "halted")]
    losses = [[(e["step"], e["loss"]) for e in map(json.loads, story) if e["event"] == "stepped"] for story in stories]
    assert losses[0] == losses[1] == list(resumed.train)


def test_going_on_after_a_kill_forgets_the_steps_after_the_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    config = with_(config, out=tmp_path, save_every=2)

    def die() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        train(config, on_event=at_step(5, die))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"event": "step')
    told: list[Event] = []
    train(config, resume=True, on_event=told.append)
    assert isinstance(told[0], Started)
    assert told[0].step == 4
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["event"] == "stepped"] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_resumes_to_the_same_result(config: TrainConfig, tmp_path: Path) -> None:
    config = with_(config, out=tmp_path)
    first, again = train(config), train(config, resume=True)
    assert (again.train, again.validation, again.step) == (first.train, first.validation, 6)
    json.loads(report.to_json([again]), parse_constant=pytest.fail)  # missing times are null, not NaN


def test_accumulated_parts_make_the_same_step_as_one_batch(config: TrainConfig, tmp_path: Path) -> None:
    for name, size, parts in (("one", 8, 1), ("four", 2, 4)):
        changes = {"batch_size": size, "accumulate": parts, "eval_batches": parts, "steps": 3}
        sgd = {"make_optimizer": lambda model, config: torch.optim.SGD(model.parameters(), lr=config.lr)}
        train(with_(config, out=tmp_path / name, **changes), **sgd)
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-5, atol=1e-7)


def test_dropout_does_not_break_resuming_nor_the_callers_random_numbers(config: TrainConfig, tmp_path: Path) -> None:
    settings: Any = models.make_model("tiny").config
    settings.attention_dropout = 0.5
    settings.save_pretrained(tmp_path / "model")
    config = with_(config, model=str(tmp_path / "model"))
    before = torch.get_rng_state()
    whole = train(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert train(config).train == whole.train


@pytest.mark.parametrize("spec", ["cosmos", "galore"])
def test_a_preset_resumes_to_the_same_bits_in_the_bytes_it_planned(spec: str, config: TrainConfig, tmp_path: Path) -> None:
    config = with_(config, spec=spec, overrides={"matrix.selector.rank": 8}, steps=5)
    whole = training.train(with_(config, out=tmp_path / "whole"))
    halted = with_(config, out=tmp_path / "halted")
    training.train(halted, on_event=at_step(3, lambda: signal.raise_signal(signal.SIGTERM)))
    resumed = training.train(halted, resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "halted"))
    assert resumed.train == whole.train
    assert whole.measured_state_bytes == resumed.measured_state_bytes == whole.planned_state_bytes


# ---------------------------------------------------------------- being stopped


def test_a_signal_ends_the_step_saves_and_gives_the_handlers_back(config: TrainConfig, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, asked in enumerate((signal.SIGINT, signal.SIGTERM)):
        told: list[Event] = []

        def stop(event: Event, asked: int = asked, told: list[Event] = told) -> None:
            told.append(event)
            if isinstance(event, Stepped) and event.step == 2:
                signal.raise_signal(asked)

        result = train(with_(config, out=tmp_path / str(number)), on_event=stop)
        assert (result.status, result.step) == ("interrupted", 2)
        assert isinstance(told[-2], Saved)
        assert isinstance(told[-1], Ended)
        assert checkpoint.read(tmp_path / str(number) / "last.pt")["step"] == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_sigint_aborts_at_once(config: TrainConfig, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(with_(config, out=tmp_path), on_event=at_step(2, twice))
    assert signal.getsignal(signal.SIGINT) == before
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.slow
def test_killed_at_a_random_moment_a_loadable_checkpoint_is_left(config: TrainConfig, tmp_path: Path) -> None:
    endless = with_(config, out=tmp_path, steps=10**6, warmup=0, min_lr_ratio=1.0, save_every=1, eval_every=0)
    code = """
import sys, torch
from subspace_opt.lab import TrainConfig, train

config = TrainConfig.model_validate_json(sys.argv[1])
train(config, make_optimizer=lambda model, config: torch.optim.AdamW(model.parameters(), lr=config.lr))
"""
    process = subprocess.Popen([sys.executable, "-c", code, endless.model_dump_json()], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while checkpoint.newest(tmp_path) is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.random() / 2)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    found = checkpoint.newest(tmp_path)
    assert found is not None
    done = checkpoint.read(found)["step"]
    resumed = train(with_(endless, steps=done + 2), resume=True)
    assert (resumed.status, resumed.step) == ("finished", done + 2)


@pytest.mark.parametrize("call", range(6))
def test_dying_between_any_two_file_operations_loses_nothing(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, {"step": 1})
    checkpoint.write(tmp_path, {"step": 2})
    left = iter(range(call, -1, -1))

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any) -> Any:
            if next(left, 0) == 0:
                raise SystemExit  # like a kill: nothing runs after this, and no handler in `write` catches it
            return real(*args)

        return act

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "open"):
            patch.setattr(os, name, dying(getattr(os, name)))
        with suppress(SystemExit):
            checkpoint.write(tmp_path, {"step": 3})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert checkpoint.read(found)["step"] in (2, 3)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, {"step": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LabError, match=r"No space left on device.*last\.pt is unchanged"):
        checkpoint.write(tmp_path, {"step": 2})
    assert checkpoint.read(tmp_path / "last.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["short", "empty", "flipped", "other"])
def test_a_damaged_checkpoint_names_itself_and_the_one_before(damage: str, config: TrainConfig, tmp_path: Path) -> None:
    config = with_(config, out=tmp_path, save_every=3)
    train(config)
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    last.write_bytes({"short": whole[:middle], "empty": b"", "flipped": flipped, "other": b""}[damage])
    if damage == "other":
        torch.save({"weights": torch.ones(1)}, last)
    with pytest.raises(LabError, match=r"last\.pt .*Move it away and resume again.*last\.prev\.pt"):
        train(config, resume=True)
    last.rename(tmp_path / "damaged.pt")
    assert train(config, resume=True).step == 6
    assert equal(weights(tmp_path), weights_of(whole, tmp_path))


def weights_of(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "whole.pt"
    path.write_bytes(content)
    found: dict[str, torch.Tensor] = checkpoint.read(path)["model"]
    return found


def test_a_new_run_does_not_write_over_an_old_one(config: TrainConfig, tmp_path: Path) -> None:
    config = with_(config, out=tmp_path)
    train(config)
    with pytest.raises(LabError, match=r"belongs to an earlier run\. Resume that run, or choose another folder"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 0.5, "seed": 7}, r"seed: 0 there, 7 here; .*|lr: 0.01 there, 0.5 here; seed"),
        ({"steps": 2}, "already has 3 updates, more than the 2 of this run"),
        ({"steps": 12}, "Resume with steps 6, or start a new run with steps 12"),
    ],
)
def test_another_runs_checkpoint_is_refused(changes: dict[str, Any], says: str, config: TrainConfig, tmp_path: Path) -> None:
    config = with_(config, out=tmp_path)
    train(config, on_event=at_step(3, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(LabError, match=says):
        train(with_(config, **changes), resume=True)


def test_a_constant_rate_can_be_extended_and_the_data_may_move(config: TrainConfig, text: Path, tmp_path: Path) -> None:
    config = with_(config, min_lr_ratio=1.0, warmup=2)
    train(with_(config, out=tmp_path / "whole", steps=9))
    train(with_(config, out=tmp_path / "run"))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in text.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    train(with_(config, out=tmp_path / "run", steps=9, data=(str(moved),)), resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    (moved / "00.txt").write_text("other words " * 50)
    with pytest.raises(LabError, match="was trained on another text"):
        train(with_(config, out=tmp_path / "run", steps=9, data=(str(moved),)), resume=True)


def test_a_loss_that_is_no_number_stops_and_keeps_the_good_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    config = with_(config, out=tmp_path, save_every=1)

    def spoiling(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer, steps = adamw(model, config), iter(range(100))

        def spoil(*_: Any) -> None:
            if next(steps) == 2:
                next(model.parameters()).grad = None  # so that the damage comes from the third update alone
                next(model.parameters()).data.fill_(math.nan)

        optimizer.register_step_post_hook(spoil)
        return optimizer

    with pytest.raises(LabError, match=r"is nan after 3 updates\. The last good checkpoint, .*last\.pt, is unchanged; try"):
        train(config, make_optimizer=spoiling)
    assert checkpoint.read(tmp_path / "last.pt")["step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path).values())


@pytest.mark.parametrize("spoilt", ["loss", "gradient norm"])
def test_a_step_that_could_only_spoil_is_not_made(spoilt: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    if spoilt == "loss":
        monkeypatch.setattr(training, "cross_entropy", lambda *_: torch.tensor(math.inf, requires_grad=True))
    else:
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    steps: list[Event] = []
    with pytest.raises(LabError, match=rf"the {spoilt} is (inf|nan) after 0 updates\. Nothing was saved; try a smaller lr"):
        train(with_(config, eval_every=0), on_event=steps.append)
    assert [type(event) for event in steps] == [Started]


# ---------------------------------------------------------------- comparisons


def test_a_comparison_starts_from_equal_weights_and_sees_equal_batches(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: dict[str, dict[str, torch.Tensor]] = {}
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    real, current = Corpus.batch, "a"

    def spy(self: Corpus, step: int, batch_size: int, length: int, seed: int) -> torch.Tensor:
        batch = real(self, step, batch_size, length, seed)
        seen[current].append(batch)
        return batch

    def factory(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        starts[config.label] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return adamw(model, config)

    def follow(event: Event) -> None:
        nonlocal current
        if isinstance(event, Ended):
            current = "b"

    monkeypatch.setattr(Corpus, "batch", spy)
    configs = [with_(config, name="a"), with_(config, name="b", lr=1e-3)]
    results = comparison.compare(configs, on_event=follow, make_optimizer=factory)
    assert equal(starts["a"], starts["b"])
    assert all(torch.equal(x, y) for x, y in zip(seen["a"], seen["b"], strict=True))
    assert results[0].train[0] == results[1].train[0]
    assert results[0].train[-1] != results[1].train[-1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "stand-in"}, "two runs are called 'stand-in'"),
        ({"seed": 1}, r"other has seed 1, but stand-in has 0\. Only lr, name"),
        ({"out": "x"}, "stand-in shares the folder x with another run"),
    ],
)
def test_an_unfair_comparison_is_refused(changes: dict[str, Any], says: str, config: TrainConfig) -> None:
    first = with_(config, out="x") if "out" in changes else config
    with pytest.raises(LabError, match=says):
        comparison.compare([first, with_(config, **{"name": "other", **changes})])


def test_a_signal_ends_the_comparison(config: TrainConfig) -> None:
    configs = [with_(config, name=name) for name in "ab"]
    stop = at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    results = comparison.compare(configs, on_event=stop, make_optimizer=adamw)
    assert [(r.run, r.status) for r in results] == [("a", "interrupted")]


def test_state_is_counted_by_storage() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    shared = torch.zeros(10)
    optimizer.state[weight] = {
        "a": shared[:5],
        "b": [shared[5:], {"c": torch.zeros(3, dtype=torch.float64)}],
        "step": 3,
    }
    assert measured_bytes(optimizer) == 40 + 24


# ---------------------------------------------------------------- reports


def result(name: str, **changes: Any) -> Result:
    curve = tuple((step, 5 / step) for step in range(1, 101))
    fields: dict[str, Any] = {
        "run": name, "status": "finished", "step": 100, "parameters": 10, "lr": 1e-3, "train": curve,
        "validation": curve[9::10], "planned_state_bytes": 2048, "measured_state_bytes": 2048, "optimizer_ms": 1.5,
        "mean_optimizer_ms": 1.6, "step_ms": 9.0, "tokens_per_second": 1e4, "optimizer_times": Times.of([0.003, 0.002]),
        "step_times": Times.of([0.009]), "seconds": curve[9::10],
    }  # fmt: skip
    return Result(**{**fields, **changes})


def test_the_picture_is_a_png_and_touches_no_backend(tmp_path: Path) -> None:
    untried = result("untried", train=(), validation=(), optimizer_ms=math.nan)
    path = report.write_picture([result("cosmos"), result("adamw"), untried], tmp_path / "new" / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot be written"):
        report.write_picture([result("cosmos")], tmp_path / "file" / "p.png")


def test_the_table_has_a_row_a_run() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table([result("cosmos"), result("adamw", planned_state_bytes=None, status="interrupted")]))
    shown = console.export_text()
    assert "cosmos" in shown
    assert "2.0 KiB" in shown
    assert "adamw (interrupted at 100)" in shown
    assert "0.0500" in shown


def test_the_demo_poses_one_problem_to_four_presets() -> None:
    configs = demos.configs()
    comparison.check(configs)
    assert [c.label for c in configs] == ["cosmos", "adamw", "galore", "muon"]


def test_sizes_are_readable() -> None:
    assert [report.readable_bytes(n) for n in (512, 3565158, 2**40)] == ["512 B", "3.4 MiB", "1.0 TiB"]
    assert corpus.VOCAB_SIZE == 256
