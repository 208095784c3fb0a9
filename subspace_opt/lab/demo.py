"""The demo: four optimizers train the same model on the source of the Python standard library, in about two minutes on two CPU cores."""

from __future__ import annotations

from pathlib import Path

from .comparison import compare
from .config import TrainConfig
from .corpus import Corpus
from .report import to_json, write_picture
from .run.events import OnEvent, Result
from .run.journal import make_folder

PROBLEM = TrainConfig(model="mini", steps=400, batch_size=8, length=128, eval_every=50, eval_batches=8)

# Peak learning rates: the best of each optimizer on this problem, in a sweep of four to six rates by factors of two.
RATES = {"cosmos": 8e-3, "adamw": 2e-3, "galore": 2e-2, "muon": 2e-2}

# A quarter of the width, as in GaLore's 60m experiment; the ranks of the presets are for wider models.
RANK = {"matrix.selector.rank": 32}
OVERRIDES = {"cosmos": RANK, "galore": RANK}


def configs() -> list[TrainConfig]:
    """The configs of the four runs: one problem, each optimizer at its own best learning rate."""
    return [PROBLEM.model_copy(update={"spec": spec, "lr": lr, "overrides": OVERRIDES.get(spec, {})}) for spec, lr in RATES.items()]


def demo(out: str | Path, on_event: OnEvent | None = None, *, corpus: Corpus | None = None) -> list[Result]:
    """Train the four runs, write `comparison.png` and `comparison.json` into the folder `out`, and return the results.

    Raises:
        LabError: the folder cannot be made; no training has begun.
    """
    folder = make_folder(Path(out))
    results = compare(configs(), on_event=on_event, corpus=corpus)
    (folder / "comparison.json").write_text(to_json(results), encoding="utf-8")
    write_picture(results, folder / "comparison.png", title="Python's standard library, byte by byte")
    return results
