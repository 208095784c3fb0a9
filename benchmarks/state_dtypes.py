"""Measure the effect of low-bit state on a run: bytes of state, and the loss compared with float32 state.

Every run trains the same small LLaMA from the same weights on the same text, byte by byte. For a preset, only `state_dtype` differs.
Compare the difference of two losses with the column `seed`: the difference between the final losses of two seeds with float32 state.

Example: python benchmarks/state_dtypes.py --presets cosmos,adamw --steps 100
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from subspace_opt import build
from subspace_opt.algebra.storage import StateDtype
from subspace_opt.lab import TrainConfig, train
from subspace_opt.lab.corpus import Corpus
from subspace_opt.lab.report import readable_bytes

# A quarter of the width: the moments inside are smaller than the weights, and still large enough to be quantized.
OVERRIDES = {"cosmos": {"matrix.selector.rank": 0.25}, "galore": {"matrix.selector.rank": 0.25}}


@dataclass(frozen=True)
class Row:
    """The result of one run."""

    preset: str
    state_dtype: str
    state_bytes: int
    planned_bytes: int | None
    loss: float  # final validation loss, nats per byte
    difference: float  # to the loss with float32 state
    seed_gap: float  # difference between two seeds, with float32 state


def train_once(config: TrainConfig, state_dtype: StateDtype, corpus: Corpus) -> tuple[float, int, int | None]:
    """Train once; return the final validation loss, the measured bytes of state and the planned bytes."""

    def made(model: nn.Module, config: TrainConfig) -> Optimizer:
        return build(config.spec, model, overrides=config.overrides or None, state_dtype=state_dtype)

    result = train(config, corpus=corpus, make_optimizer=made)
    return result.validation[-1][1], result.measured_state_bytes, result.planned_state_bytes


def rows(presets: list[str], config: TrainConfig) -> list[Row]:
    corpus = Corpus.load(config.data, max_bytes=config.max_bytes)
    out = []
    for preset in track(presets, "training", console=Console(stderr=True)):
        own = config.model_copy(update={"spec": preset, "overrides": OVERRIDES.get(preset, {})})
        ends = {word: train_once(own, word, corpus) for word in get_args(StateDtype)}
        full = ends["fp32"][0]
        other, *_ = train_once(own.model_copy(update={"seed": own.seed + 1}), "fp32", corpus)
        out += [Row(preset, word, held, planned, loss, loss - full, abs(other - full)) for word, (loss, held, planned) in ends.items()]
    return out


def show(found: list[Row], out: Console) -> None:
    names = ("preset", "state_dtype", "state", "of fp32", "loss", "to fp32", "seed")
    table = Table(*names, box=None)
    full = {row.preset: row.state_bytes for row in found if row.state_dtype == "fp32"}
    for row in found:
        part = f"{row.state_bytes / full[row.preset]:.2f}"
        cells = (readable_bytes(row.state_bytes), part, f"{row.loss:.4f}", f"{row.difference:+.4f}", f"{row.seed_gap:.4f}")
        table.add_row(row.preset, row.state_dtype, *cells)
    out.print(table)


def main(
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "cosmos,muon,galore,adamw",
    model: Annotated[str, typer.Option(help="Size of the LLaMA.")] = "mini",
    steps: Annotated[int, typer.Option(min=1, help="Updates of each run.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in an update.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Bytes in a window.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compare state in float32, bfloat16, 8 and 4 bits: bytes and final loss."""
    torch.set_num_threads(threads)
    # Only the last validation is reported, so it uses much more text than a curve would need.
    config = TrainConfig(model=model, steps=steps, batch_size=batch_size, length=length, eval_every=0, eval_batches=64)
    found = rows(presets.split(","), config)
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=2))
    else:
        show(found, Console())


if __name__ == "__main__":
    typer.run(main)
