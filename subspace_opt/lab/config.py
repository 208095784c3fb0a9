"""The configuration of a run, and its learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .corpus import MAX_BYTES
from .errors import LabError

# Fields that may change when a run is resumed, because they do not change the updates that were made. `data` is among them: the checkpoint
# has a fingerprint of the text itself, so files may have moved.
_FREE = {"name", "data", "max_bytes", "device", "out", "save_every", "steps", "warmup"}


class TrainConfig(BaseModel):
    """One training run. `lr` and `weight_decay` default to those of the spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str | dict[str, Any] = Field(default="cosmos", description="preset name, path to a spec, or the spec itself")
    name: str = Field(default="", description="name of the run; empty: the name of the spec")
    model: str = Field(default="tiny", description="size name, or path to a Hugging Face config")
    data: tuple[str, ...] = Field(default=(), description="files and folders; none: the source of the Python standard library")
    max_bytes: PositiveInt = Field(default=MAX_BYTES, description="most bytes of text to keep in memory")
    steps: PositiveInt = Field(default=200, description="updates to make")
    batch_size: PositiveInt = Field(default=8, description="windows per forward pass")
    length: PositiveInt = Field(default=128, description="bytes predicted per window")
    accumulate: PositiveInt = Field(default=1, description="forward passes per update")
    lr: PositiveFloat | None = Field(default=None, description="peak learning rate; none: that of the spec")
    weight_decay: NonNegativeFloat | None = Field(default=None, description="weight decay; none: that of the spec")
    overrides: dict[str, Any] = Field(default={}, description="overrides of the spec, by dotted path")
    warmup: NonNegativeInt | None = Field(default=None, description="updates of linear warm-up; none: a tenth of `steps`")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="learning rate at the end of the cosine, relative to the peak; 1: constant"
    )
    clip: NonNegativeFloat = Field(default=1.0, description="largest gradient norm; 0: no clipping")
    eval_every: NonNegativeInt = Field(default=50, description="updates between validations; 0: one at the end")
    eval_batches: PositiveInt = Field(default=8, description="validation windows, in batches of `batch_size`")
    seed: NonNegativeInt = Field(default=0, description="seed of the initial weights and of the batches")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="auto: cuda, else mps, else cpu")
    out: Path | None = Field(default=None, description="folder for checkpoints and log.jsonl; none: write nothing")
    save_every: NonNegativeInt = Field(default=0, description="updates between checkpoints; 0: one at the end")

    @property
    def label(self) -> str:
        """The name of the run in events, tables and pictures."""
        spec = self.spec.get("name", "spec") if isinstance(self.spec, dict) else Path(self.spec).stem
        return self.name or str(spec)

    @property
    def tokens_per_step(self) -> int:
        """The number of bytes that the model predicts for one update."""
        return self.batch_size * self.accumulate * self.length

    def lr_factor(self, step: int) -> float:
        """The learning rate of update `step` (counted from 0) relative to the peak: linear warm-up, then a cosine to `min_lr_ratio`."""
        warmup = self.steps // 10 if self.warmup is None else self.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def continues(self, saved: dict[str, Any], done: int, where: Path) -> None:
        """Check that this run can resume after `done` updates of the saved one. Both must make these updates in the same way.

        Raises:
            LabError: these updates would differ; the message names the fields that differ.
        """
        before = TrainConfig.model_validate(saved)
        old, new = before.model_dump(mode="json"), self.model_dump(mode="json")
        differ = [f"{key}: {old[key]!r} there, {new[key]!r} here" for key in old if old[key] != new[key]]
        differ = [words for words in differ if words.partition(":")[0] not in _FREE]
        if differ:
            raise LabError(
                f"{where} belongs to another run ({'; '.join(differ)}). Give the same values to resume it, or another `out` for a new run"
            )
        if self.steps < done:
            raise LabError(f"steps: {where} already has {done} updates, more than the {self.steps} of this run")
        if any(self.lr_factor(step) != before.lr_factor(step) for step in range(done)):
            raise LabError(
                f"steps, warmup: {where} made {done} of {before.steps} updates on a schedule that a run of "
                f"{self.steps} steps would not have followed. Resume with steps {before.steps}, or start a new run with "
                f"steps {self.steps}; only a run with a constant rate (min_lr_ratio 1, warmup given) can be extended"
            )
