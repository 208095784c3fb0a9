"""What a run is: everything that decides its weights, and the schedule as a pure function of the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .corpus import MAX_BYTES
from .errors import LabError

# Where, how often and on what a run is carried out may change when it goes on; what it computes may not.
# The data may lie elsewhere as well: the checkpoint knows the text itself.
_FREE = {"name", "data", "max_bytes", "device", "out", "save_every", "steps", "warmup"}


class TrainConfig(BaseModel):
    """One training run. Without a spec's own `lr` or `weight_decay` given here, the spec's defaults hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str | dict[str, Any] = Field(default="cosmos", description="preset name, path to a spec, or the spec itself")
    name: str = Field(default="", description="what to call the run; empty: after the spec")
    model: str = Field(default="tiny", description="size name, or path to a Hugging Face config")
    data: tuple[str, ...] = Field(default=(), description="files and folders; none: the Python standard library's source")
    max_bytes: PositiveInt = Field(default=MAX_BYTES, description="how much text to keep in memory")
    steps: PositiveInt = Field(default=200, description="updates to make")
    batch_size: PositiveInt = Field(default=8, description="windows per forward pass")
    length: PositiveInt = Field(default=128, description="bytes predicted per window")
    accumulate: PositiveInt = Field(default=1, description="forward passes per update")
    lr: PositiveFloat | None = Field(default=None, description="peak learning rate; none: the spec's")
    weight_decay: NonNegativeFloat | None = Field(default=None, description="none: the spec's")
    overrides: dict[str, Any] = Field(default={}, description="dotted paths into the spec, as `build` takes them")
    warmup: NonNegativeInt | None = Field(default=None, description="updates of linear warm-up; none: a tenth of `steps`")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="where the cosine ends, as a part of the peak; 1 is a constant rate"
    )
    clip: NonNegativeFloat = Field(default=1.0, description="largest gradient norm; 0: as it comes")
    eval_every: NonNegativeInt = Field(default=50, description="updates between validations; 0: only at the end")
    eval_batches: PositiveInt = Field(default=8, description="validation windows, in batches of `batch_size`")
    seed: NonNegativeInt = Field(default=0, description="of the weights and of the batches")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="auto: cuda, else mps, else cpu")
    out: Path | None = Field(default=None, description="folder for checkpoints and log.jsonl; none: keep nothing")
    save_every: NonNegativeInt = Field(default=0, description="updates between checkpoints; 0: only at the end")

    @property
    def label(self) -> str:
        """What the run is called in events, tables and pictures."""
        spec = self.spec.get("name", "spec") if isinstance(self.spec, dict) else Path(self.spec).stem
        return self.name or str(spec)

    @property
    def tokens_per_step(self) -> int:
        """Bytes predicted for one update."""
        return self.batch_size * self.accumulate * self.length

    def lr_factor(self, step: int) -> float:
        """The part of the peak rate at update `step` (0-based): linear warm-up, then a cosine to `min_lr_ratio`."""
        warmup = self.steps // 10 if self.warmup is None else self.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def continues(self, saved: dict[str, Any], done: int, where: Path) -> None:
        """Check that this run is the same as the saved one, or a longer one with the same past.

        Raises LabError that names the fields that differ.
        """
        before = TrainConfig.model_validate(saved)
        old, new = before.model_dump(mode="json"), self.model_dump(mode="json")
        differ = [f"{key}: {old[key]!r} there, {new[key]!r} here" for key in old if old[key] != new[key]]
        differ = [words for words in differ if words.partition(":")[0] not in _FREE]
        if differ:
            raise LabError(
                f"{where} belongs to another run ({'; '.join(differ)}). Give the same values to go on with it, or "
                f"another `out` for a new run"
            )
        if self.steps < done:
            raise LabError(f"steps: {where} has {done} updates already, more than the {self.steps} asked for")
        if any(self.lr_factor(step) != before.lr_factor(step) for step in range(done)):
            raise LabError(
                f"steps, warmup: {where} made {done} of {before.steps} updates on a schedule that a run of "
                f"{self.steps} steps would not have followed. Resume with steps {before.steps}, or start anew with "
                f"steps {self.steps}; only a constant rate (min_lr_ratio 1, warmup given) can be extended"
            )
