"""What a study runs: candidates, the problem they share, seeds, and the config of every run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from ... import Spec, __version__, load_spec
from ..config import TrainConfig
from ..errors import LabError
from .records import Stage
from .sweep import Axis

SWEEP_SEED = 0  # the final runs have seeds 1, 2, ...: none of them decided a learning rate
DECAY = 0.1  # start of a sweep of weight decay if the spec has none

# Fields of a `TrainConfig` that do not affect the losses, or that are hashed in another form.
_NOT_IN_KEY = {"spec", "name", "overrides", "data", "max_bytes", "out", "save_every", "device"}


class Candidate(BaseModel):
    """One optimizer of a study."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = Field(min_length=1, description="name in tables and pictures")
    spec: str | dict[str, Any] = Field(description="preset name, path to a spec, or the spec itself")
    overrides: dict[str, Any] = Field(default={}, description="overrides of the spec, by dotted path")

    def loaded(self, more: Mapping[str, Any] | None = None) -> Spec:
        """The spec with its overrides, and with more of them."""
        return load_spec(self.spec, {**self.overrides, **(more or {})})


class StudyConfig(BaseModel):
    """A comparison: candidates on one problem, each tuned by the same sweep, then run over seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: tuple[Candidate, ...] = Field(min_length=1, description="the optimizers")
    problem: TrainConfig = Field(description="model, text, updates, batch; its spec, name, seed, lr and out are not used")
    seeds: PositiveInt = Field(default=3, description="final runs of each optimizer")
    first_seed: PositiveInt = Field(default=SWEEP_SEED + 1, description="seed of the first final run")
    tune: tuple[str, ...] = Field(
        default=("lr",), description="what the sweep varies: lr, weight_decay, rank, or a dotted path of the spec"
    )
    sweep_steps: PositiveInt = Field(description="updates of each run of the sweep")
    jobs: PositiveInt = Field(default=1, description="runs side by side, each in its own process")
    turns: NonNegativeInt = Field(default=40, description="updates of each optimizer that are timed by turns; 0: the times of the runs")
    out: Path = Field(description="folder for records and report")
    title: str = Field(default="", description="title of the report")
    command: str = Field(default="", description="the command that makes this study again, for the report")
    plugins: tuple[Path, ...] = Field(default=(), description="Python files that register kinds")

    def checked(self) -> StudyConfig:
        """This config, after checks that need its specs.

        Raises:
            LabError: two candidates share a label, or no candidate has a field that the sweep should vary.
            SpecError: a spec cannot be loaded.
        """
        labels = [candidate.label for candidate in self.candidates]
        for label in labels:
            if labels.count(label) > 1:
                raise LabError(f"compare: two optimizers are called {label!r}. Give one a name: {label}-64={label},matrix.selector.rank=64")
        found = {candidate.label: {axis.field for axis in axes(self, candidate)} for candidate in self.candidates}
        for field in self.tune:
            if not any(field in fields for fields in found.values()):
                raise LabError(
                    f"--tune {field}: none of {', '.join(labels)} has this field as a number above 0. Give lr, weight_decay, rank, or a "
                    "dotted path such as matrix.inside.eps"
                )
        return self


@dataclass(frozen=True)
class Task:
    """One run of a study."""

    key: str
    stage: Stage
    label: str
    values: dict[str, float]
    config: TrainConfig


def axes(study: StudyConfig, candidate: Candidate) -> list[Axis]:
    """The fields of a candidate that the sweep varies. A field that its spec does not have is left out."""
    spec, problem = candidate.loaded(), study.problem
    found = []
    for field in study.tune:
        if field == "lr":
            found.append(Axis("lr", problem.lr or spec.defaults.lr))
        elif field == "weight_decay":
            given = spec.defaults.weight_decay if problem.weight_decay is None else problem.weight_decay
            found.append(Axis("weight_decay", given or DECAY))
        else:
            paths = rank_paths(spec) if field == "rank" else [field]
            start = _number(spec, paths[0]) if paths else None
            if start is not None:
                whole = isinstance(start, int)
                found.append(Axis(field, start, most=_widest(problem.model) if field == "rank" else None, whole=whole))
    return found


def rank_paths(spec: Spec) -> list[str]:
    """Dotted paths of all ranks of a spec's selectors."""
    paths = (f"{name}.selector.rank" for name in spec.pipelines)
    return [path for path in paths if _number(spec, path) is not None]


def task(study: StudyConfig, candidate: Candidate, stage: Stage, seed: int, values: Mapping[str, float], fingerprint: str) -> Task:
    """One run with the values of the sweep in its config."""
    problem = study.problem
    overrides = dict(candidate.overrides)
    for field, value in values.items():
        if field not in ("lr", "weight_decay"):
            for path in rank_paths(candidate.loaded()) if field == "rank" else [field]:
                overrides[path] = value
    changes: dict[str, Any] = {
        "spec": candidate.spec,
        "name": candidate.label,
        "overrides": overrides,
        "lr": values.get("lr", problem.lr),
        "weight_decay": values.get("weight_decay", problem.weight_decay),
        "seed": seed,
        "out": None,
        "save_every": 0,
    }
    if stage == "sweep":
        changes |= {"steps": study.sweep_steps, "eval_every": 0}
    config = TrainConfig.model_validate({**problem.model_dump(), **changes})
    return Task(_key(config, stage, fingerprint), stage, candidate.label, dict(values), config)


def _key(config: TrainConfig, stage: Stage, fingerprint: str) -> str:
    """A hash of everything that determines the outcome of a run."""
    determined = {
        "config": config.model_dump(mode="json", exclude=_NOT_IN_KEY),
        "spec": load_spec(config.spec, config.overrides).model_dump(mode="json", exclude={"name", "source", "about", "notes", "published"}),
        "stage": stage,
        "label": config.name,
        "text": fingerprint,
        "version": __version__,
    }
    return blake2b(json.dumps(determined, sort_keys=True).encode(), digest_size=12).hexdigest()


def _number(spec: Spec, path: str) -> float | None:
    """The number above 0 at a dotted path of a spec; None if there is none."""
    pipeline, *parts = path.split(".")
    node: Any = spec.pipelines.get(pipeline)
    for part in parts:
        if isinstance(node, tuple):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else getattr(node[0], part, None) if len(node) == 1 else None
        else:
            node = getattr(node, part, None)
    return node if isinstance(node, int | float) and not isinstance(node, bool) and node > 0 else None


def _widest(model: str) -> float:
    """The longest of the shorter sides of a model's matrices: no rank above it has a meaning."""
    from ..model import meta_model

    return max(min(p.shape) for p in meta_model(model).parameters() if p.dim() == 2)
