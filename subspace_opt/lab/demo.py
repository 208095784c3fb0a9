"""Two minutes on two CPU cores: four optimizers learn Python from Python's own source."""

from __future__ import annotations

from pathlib import Path

from .comparison import compare
from .config import TrainConfig
from .corpus import Corpus
from .events import OnEvent, Result
from .report import to_json, write_picture

PROBLEM = TrainConfig(model="mini", steps=300, batch_size=8, length=128, eval_every=50, eval_batches=8)

# The best of a sweep in factors of two or so on this very problem, each optimizer its own.
RATES = {"cosmos": 2e-3, "adamw": 3e-3, "galore": 1e-2, "muon": 2e-2}


def configs() -> list[TrainConfig]:
    """The four runs: the same problem, each at its own best rate."""
    return [PROBLEM.model_copy(update={"spec": spec, "lr": lr}) for spec, lr in RATES.items()]


def demo(out: str | Path, on_event: OnEvent | None = None, *, corpus: Corpus | None = None) -> list[Result]:
    """Train the four, and leave `comparison.png` and `comparison.json` in `out`."""
    results = compare(configs(), on_event=on_event, corpus=corpus)
    folder = Path(out)
    write_picture(results, folder / "comparison.png")
    (folder / "comparison.json").write_text(to_json(results), encoding="utf-8")
    return results
