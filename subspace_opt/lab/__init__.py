"""Train small language models, compare optimizers, report the results, and certify that several ranks compute what one process does.

In: a `TrainConfig`, or a `Trial` for a certificate. Out: events, results, tables, pictures, certificates. The command line is a thin layer
over this package; `lab.demo` shows its use from Python. The names below are imported on first use, so `import subspace_opt.lab` imports
neither transformers nor matplotlib.

    config, corpus, model    the run, its text, its model
    run                      the training loop: checkpoints, events, measurements
    comparison, report       several runs on one problem; table, JSON, picture
    study                    a fair comparison: sweeps, seeds, statistics, report
    searching                successive halving over the places of a pipeline
    verify                   the certificate
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import compare
    from .config import TrainConfig
    from .corpus import Corpus
    from .errors import LabError
    from .model import SIZES, make_model, meta_model
    from .report import table, to_json, write_picture
    from .run.events import Ended, Evaluated, Event, Result, Saved, Started, Stepped
    from .run.training import train
    from .searching.run import SearchConfig, search
    from .study.plan import Candidate, StudyConfig
    from .study.records import Study
    from .study.run import run_study

_HOME = {
    "Candidate": "study.plan",
    "Corpus": "corpus",
    "Ended": "run.events",
    "Evaluated": "run.events",
    "Event": "run.events",
    "LabError": "errors",
    "Result": "run.events",
    "SIZES": "model",
    "Saved": "run.events",
    "SearchConfig": "searching.run",
    "Started": "run.events",
    "Stepped": "run.events",
    "Study": "study.records",
    "StudyConfig": "study.plan",
    "TrainConfig": "config",
    "compare": "comparison",
    "make_model": "model",
    "meta_model": "model",
    "run_study": "study.run",
    "search": "searching.run",
    "table": "report",
    "to_json": "report",
    "train": "run.training",
    "write_picture": "report",
}

__all__ = [
    "SIZES",
    "Candidate",
    "Corpus",
    "Ended",
    "Evaluated",
    "Event",
    "LabError",
    "Result",
    "Saved",
    "SearchConfig",
    "Started",
    "Stepped",
    "Study",
    "StudyConfig",
    "TrainConfig",
    "compare",
    "make_model",
    "meta_model",
    "run_study",
    "search",
    "table",
    "to_json",
    "train",
    "write_picture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
