"""About two minutes on two CPU cores: four optimizers learn Python from Python's own source."""

from __future__ import annotations

from pathlib import Path

from .comparison import compare
from .config import TrainConfig
from .corpus import Corpus
from .report import to_json, write_picture
from .run.events import OnEvent, Result
from .run.journal import make_folder

PROBLEM = TrainConfig(model="mini", steps=400, batch_size=8, length=128, eval_every=50, eval_batches=8)

# Peak rates: each optimizer's best on this very problem, in a sweep by factors of two over four to six rates.
RATES = {"cosmos": 8e-3, "adamw": 2e-3, "galore": 2e-2, "muon": 2e-2}

# A quarter of the width, as GaLore's 60m has it; the presets' own ranks are for models wider than this one.
RANK = {"matrix.selector.rank": 32}
OVERRIDES = {"cosmos": RANK, "galore": RANK}


def configs() -> list[TrainConfig]:
    """The four runs: one problem, each optimizer at its own best rate."""
    return [PROBLEM.model_copy(update={"spec": spec, "lr": lr, "overrides": OVERRIDES.get(spec, {})}) for spec, lr in RATES.items()]


def demo(out: str | Path, on_event: OnEvent | None = None, *, corpus: Corpus | None = None) -> list[Result]:
    """Train the four, and leave `comparison.png` and `comparison.json` in `out`.

    Raises LabError where the folder cannot be written, before anything is trained.
    """
    folder = make_folder(Path(out))
    results = compare(configs(), on_event=on_event, corpus=corpus)
    (folder / "comparison.json").write_text(to_json(results), encoding="utf-8")
    write_picture(results, folder / "comparison.png", title="Python's standard library, byte by byte")
    return results
