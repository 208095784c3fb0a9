"""Train small language models, compare optimizers, report the results, and certify that several ranks compute what one process does.

In: a `TrainConfig`, or a `Trial` for a certificate. Out: events, results, tables, pictures, certificates. The command line is a thin layer
over this package; `lab.demo` shows its use from Python. The names below are imported on first use, so `import subspace_opt.lab` imports
neither transformers nor matplotlib.

    config, corpus, model    the run, its text, its model
    run                      the training loop: checkpoints, events, measurements
    comparison, report       several runs on one problem; table, JSON, picture
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

_HOME = {
    "Corpus": "corpus",
    "Ended": "run.events",
    "Evaluated": "run.events",
    "Event": "run.events",
    "LabError": "errors",
    "Result": "run.events",
    "SIZES": "model",
    "Saved": "run.events",
    "Started": "run.events",
    "Stepped": "run.events",
    "TrainConfig": "config",
    "compare": "comparison",
    "make_model": "model",
    "meta_model": "model",
    "table": "report",
    "to_json": "report",
    "train": "run.training",
    "write_picture": "report",
}

__all__ = [
    "SIZES",
    "Corpus",
    "Ended",
    "Evaluated",
    "Event",
    "LabError",
    "Result",
    "Saved",
    "Started",
    "Stepped",
    "TrainConfig",
    "compare",
    "make_model",
    "meta_model",
    "table",
    "to_json",
    "train",
    "write_picture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
