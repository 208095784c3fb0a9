"""One run: train a model with one optimizer, report events, and resume after a stop at any moment.

A step is a pure function of (weights, optimizer state, step number): batches, learning rate and random numbers depend only on the seed and
the step. So a checkpoint needs no iterator or generator state, and on a CPU a resumed float32 run ends with the same bits as an
uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from ...diagnostics.energy import mean_captured_energy
from ..config import TrainConfig
from ..corpus import Corpus
from ..errors import DivergedError, LabError
from ..model import make_model, private_rng
from . import checkpoint
from .device import choose_device, clock
from .events import Ended, Evaluated, OnEvent, Result, Saved, Started, Status, Stepped, Times
from .interrupt import interruptible
from .journal import Journal
from .measure import measured_bytes, planned_bytes

__all__ = ["OptimizerFactory", "Run", "TrainConfig", "spec_optimizer", "train"]

OptimizerFactory = Callable[[nn.Module, TrainConfig], Optimizer]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    on_event: OnEvent | None = None,
    corpus: Corpus | None = None,
    make_optimizer: OptimizerFactory | None = None,
) -> Result:
    """Train until `config.steps` updates have been made or SIGINT or SIGTERM arrives, and return the result.

    Args:
        resume: Continue from the checkpoint in `config.out`, if there is one.
        on_event: Called with every event.
        corpus: The text, if it has been read already.
        make_optimizer: Makes the optimizer; by default it is built from `config.spec`.

    Raises:
        LabError: data, model, device or checkpoint cannot be used.
        DivergedError: a loss or a gradient norm is not finite.
    """
    run = Run(config, corpus or Corpus.load(config.data, max_bytes=config.max_bytes), on_event, make_optimizer)
    run.begin(resume)
    return run.go()


def spec_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of the config's spec."""
    from subspace_opt import build

    return build(config.spec, model, lr=config.lr, weight_decay=config.weight_decay, overrides=dict(config.overrides) or None)


@dataclass
class _Clocks:
    """The seconds of each update in this process."""

    whole: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)


class Run:
    """The state of a run, and the moves of its loop."""

    def __init__(self, config: TrainConfig, corpus: Corpus, on_event: OnEvent | None, make_optimizer: OptimizerFactory | None) -> None:
        self.config, self.corpus = config, corpus
        self.emit = Journal(config.out, on_event)
        self.device = choose_device(config.device)
        # First, so that the error about too short a text comes before anything slow.
        self.windows = corpus.validation_windows(config.eval_batches * config.batch_size, config.length)
        corpus.batch(0, 1, config.length, config.seed)
        self.model = make_model(config.model, max_length=config.length, device=str(self.device), seed=config.seed)
        self.optimizer = (make_optimizer or spec_optimizer)(self.model, config)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step = 0
        self.train: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.times = _Clocks()
        self.seconds: list[tuple[int, float]] = []
        self.energy: list[tuple[int, float]] = []

    def begin(self, resume: bool) -> None:
        """Restore the folder's checkpoint if `resume` is set, and emit `Started`."""
        found = checkpoint.newest(self.config.out) if self.config.out else None
        if found and not resume:
            raise LabError(f"out: {found} belongs to an earlier run. Resume that run, or choose another folder for a new one")
        if found:
            self.restore(found)
        self.emit.rewind(self.step)
        self.emit(
            Started(
                run=self.config.label,
                step=self.step,
                steps=self.config.steps,
                parameters=self.parameters,
                state_bytes=planned_bytes(self.optimizer),
                device=str(self.device),
                corpus=self.corpus.describe(),
            )
        )

    def go(self) -> Result:
        """Run the training loop."""
        config, began = self.config, time.perf_counter()
        status: Status = "finished"
        with interruptible() as asked:
            if self.step == 0 and config.eval_every:
                self.evaluate()
            while self.step < config.steps:
                self.update()
                last = self.step == config.steps
                if self.is_evaluated(self.step):
                    self.evaluate()
                if asked() and not last:
                    status = "interrupted"
                if last or status == "interrupted" or (config.save_every and self.step % config.save_every == 0):
                    self.save()
                if status == "interrupted":
                    break
        self.emit(Ended(config.label, self.step, status, time.perf_counter() - began))
        return self.result(status)

    def is_evaluated(self, step: int) -> bool:
        """True if there is a validation after update `step`."""
        return step == self.config.steps or (bool(self.config.eval_every) and step % self.config.eval_every == 0)

    def update(self) -> None:
        """Make one update of the weights, and measure its time and that of the optimizer."""
        config = self.config
        factor = config.lr_factor(self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        start = clock(self.device)
        loss = self.gradients()
        self.check("loss", loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)  # inf multiplies by one
        self.check("gradient norm", float(norm))
        ready = clock(self.device)
        self.optimizer.step()
        end = clock(self.device)
        if self.is_evaluated(self.step + 1) and planned_bytes(self.optimizer) is not None:
            share = mean_captured_energy(self.optimizer)  # after the clock was read
            self.energy += [] if share is None else [(self.step + 1, share)]
        self.optimizer.zero_grad()
        self.step += 1
        self.times.whole.append(end - start)
        self.times.optimizer.append(end - ready)
        self.train.append((self.step, loss))
        seconds = mean(self.times.whole[-20:])
        self.emit(
            Stepped(
                run=config.label,
                step=self.step,
                steps=config.steps,
                loss=loss,
                lr=self.peaks[0] * factor,
                tokens_per_second=config.tokens_per_step / seconds,
                eta_seconds=(config.steps - self.step) * seconds,
            )
        )

    def gradients(self) -> float:
        """Accumulate the gradients of the step's batch over `accumulate` forward passes. Returns the mean loss."""
        config = self.config
        batch = self.corpus.batch(self.step, config.batch_size * config.accumulate, config.length, config.seed)
        total = 0.0
        with private_rng(config.seed * 2**32 + self.step, self.device):  # for models with dropout
            self.model.train()
            for part in torch.split(batch, config.batch_size):
                loss = self.loss(part) / config.accumulate
                torch.autograd.backward(loss)
                total += loss.item()
        return total

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte."""
        windows = windows.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(input_ids=windows[:, :-1]).logits
        return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self) -> None:
        """Compute the validation loss, and emit `Evaluated`."""
        self.model.eval()
        parts = torch.split(self.windows, self.config.batch_size)
        loss = sum(self.loss(part).item() * len(part) for part in parts) / len(self.windows)
        self.check("validation loss", loss)
        self.validation.append((self.step, loss))
        self.seconds.append((self.step, sum(self.times.whole)))
        self.emit(Evaluated(self.config.label, self.step, loss))

    def check(self, what: str, value: float) -> None:
        """Stop the run if `value` is not finite, before it reaches the weights or a checkpoint."""
        if not math.isfinite(value):
            message = f"{self.config.label}: the {what} is {value} after {self.step} updates. {self.advice()}"
            raise DivergedError(message, self.result("diverged"))

    def advice(self) -> str:
        """A sentence that says which checkpoint is left and how to continue after a value that is not finite."""
        kept = self.config.out and checkpoint.newest(self.config.out)
        left = f"The last good checkpoint, {kept}, is unchanged" if kept else "Nothing was saved"
        return f"{left}; try a smaller lr (it was {self.optimizer.param_groups[0]['lr']:.3g}) or a longer warmup"

    def save(self) -> None:
        """Write a checkpoint with everything that the next step depends on, and emit `Saved`."""
        if self.config.out is None:
            return
        self.check("sum of the weights", float(sum(p.detach().float().sum() for p in self.model.parameters())))
        path = checkpoint.write(
            self.config.out,
            {
                "step": self.step,
                "config": self.config.model_dump(mode="json"),
                "corpus": self.corpus.fingerprint,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "train": _pack(self.train),
                "validation": _pack(self.validation),
            },
        )
        self.emit(Saved(self.config.label, self.step, str(path)))

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint, after checking that it belongs to this run."""
        saved = checkpoint.read(path)
        self.config.continues(saved["config"], saved["step"], path)
        if saved["corpus"] != self.corpus.fingerprint:
            raise LabError(f"data: {path} was trained on another text than {self.corpus.source}. Give the same text")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.train, self.validation = _unpack(saved["train"]), _unpack(saved["validation"])

    def result(self, status: Status) -> Result:
        """The outcome of the run."""
        whole, optimizer = self.times.whole or [math.nan], self.times.optimizer or [math.nan]
        return Result(
            run=self.config.label,
            status=status,
            step=self.step,
            parameters=self.parameters,
            lr=self.peaks[0],
            train=tuple(self.train),
            validation=tuple(self.validation),
            planned_state_bytes=planned_bytes(self.optimizer),
            measured_state_bytes=measured_bytes(self.optimizer),
            optimizer_ms=1e3 * median(optimizer),
            mean_optimizer_ms=1e3 * mean(optimizer),
            step_ms=1e3 * median(whole),
            tokens_per_second=self.config.tokens_per_step / median(whole),
            optimizer_times=Times.of(self.times.optimizer),
            step_times=Times.of(self.times.whole),
            seconds=tuple(self.seconds),
            captured_energy=tuple(self.energy),
        )

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def _pack(curve: list[tuple[int, float]]) -> Tensor:
    return torch.tensor(curve, dtype=torch.float64).reshape(-1, 2)


def _unpack(curve: Tensor) -> list[tuple[int, float]]:
    return [(int(step), loss) for step, loss in curve.tolist()]
