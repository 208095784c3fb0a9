"""Compare optimizers on one problem: the same text, the same initial weights, the same batches in the same order."""

from __future__ import annotations

from collections.abc import Sequence

from .config import TrainConfig
from .corpus import Corpus
from .errors import LabError
from .run.events import OnEvent, Result
from .run.training import OptimizerFactory, train

# Fields that describe the optimizer, or do not affect the results. All other fields must agree.
_MAY_DIFFER = {"spec", "name", "lr", "weight_decay", "overrides", "out", "save_every"}


def compare(
    configs: Sequence[TrainConfig],
    *,
    resume: bool = False,
    on_event: OnEvent | None = None,
    corpus: Corpus | None = None,
    make_optimizer: OptimizerFactory | None = None,
) -> list[Result]:
    """Train the configs one after another and return their results. A signal ends the comparison after the current run.

    Raises:
        LabError: the configs do not pose the same problem, or two have the same name.
    """
    check(configs)
    corpus = corpus or Corpus.load(configs[0].data, max_bytes=configs[0].max_bytes)
    results: list[Result] = []
    for config in configs:
        results.append(train(config, resume=resume, on_event=on_event, corpus=corpus, make_optimizer=make_optimizer))
        if results[-1].status == "interrupted":
            break
    return results


def check(configs: Sequence[TrainConfig]) -> None:
    """Check that all configs pose the same problem and have different names and folders.

    Raises:
        LabError: a field differs that must not, or two runs have the same name or folder.
    """
    if not configs:
        raise LabError("compare: no runs were given. Give at least one spec")
    first, labels = configs[0], set()
    for config in configs:
        if config.label in labels:
            raise LabError(f"compare: two runs are called {config.label!r}. Give one of them another `name`")
        labels.add(config.label)
        for field in sorted(set(TrainConfig.model_fields) - _MAY_DIFFER):
            if (ours := getattr(config, field)) != (theirs := getattr(first, field)):
                raise LabError(
                    f"compare: {config.label} has {field} {ours!r}, but {first.label} has {theirs!r}. Only "
                    f"{', '.join(sorted(_MAY_DIFFER))} may differ, or the losses say nothing about the optimizers"
                )
        if config.out is not None and sum(other.out == config.out for other in configs) > 1:
            raise LabError(f"compare: {config.label} shares the folder {config.out} with another run. Give each run its own `out`")
