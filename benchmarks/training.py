"""Train a LLaMA for some steps with several optimizers: tokens a second, and the optimizer's share of a training step.

The text is given by --data; without it, Python's own source. A token is a byte. Without --lr an optimizer of this package has the learning
rate of its preset, and torch's have 1e-3 (AdamW) and 0.02 (Muon, on the hidden matrices; AdamW on the rest).

Example: python benchmarks/training.py --device cuda --model 130m --steps 300
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from subspace_opt.lab import TrainConfig, train
from subspace_opt.lab.corpus import Corpus
from subspace_opt.lab.report import readable_bytes
from subspace_opt.lab.run.events import Result


class Together(Optimizer):
    """Muon for the hidden matrices and AdamW for all other parameters, as one optimizer."""

    def __init__(self, model: nn.Module, lr: float, rest: float) -> None:
        hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "head" not in name]
        taken = {id(p) for p in hidden}
        others = [p for p in model.parameters() if id(p) not in taken]
        super().__init__([{"params": hidden, "lr": lr}, {"params": others, "lr": rest}], {"lr": lr})
        self.parts = [torch.optim.Muon(hidden, lr=lr), torch.optim.AdamW(others, lr=rest, fused=True)]

    def step(self, closure: Any = None) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
        for part in self.parts:
            self.state.update(part.state)


def adamw(model: nn.Module, config: TrainConfig) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.lr or 1e-3, fused=True)


def muon(model: nn.Module, config: TrainConfig) -> Optimizer:
    return Together(model, config.lr or 0.02, 1e-3)


PEERS = {"torch AdamW fused": adamw, "torch Muon": muon}


def run(name: str, config: TrainConfig, corpus: Corpus) -> Result:
    """One run, of a preset or a peer."""
    peer = PEERS.get(name)
    given = config.model_copy(update={"name": name, "spec": "adamw" if peer else name})
    return train(given, corpus=corpus, make_optimizer=peer)


def show(results: Sequence[Result], title: str) -> None:
    """Print the table."""
    columns = ("tokens/s", "step ms", "optimizer ms", "mean", "share", "state", "bits per byte")
    table = Table("optimizer", *columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for r in results:
        times = (f"{r.tokens_per_second:,.0f}", f"{r.step_ms:.1f}", f"{r.optimizer_ms:.1f}", f"{r.mean_optimizer_ms:.1f}")
        share = f"{r.optimizer_ms / r.step_ms:.1%}"
        table.add_row(r.run, *times, share, readable_bytes(r.measured_state_bytes), f"{r.bits_per_byte:.3f}")
    out = Console(highlight=False, width=None if Console().is_terminal else 120)
    out.print(f"{title}\n")
    out.print(table)


def main(
    model: Annotated[str, typer.Option(help="Size name, or path to a Hugging Face config.")] = "130m",
    steps: Annotated[int, typer.Option(min=2, help="Updates of each run.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per update.")] = 32,
    length: Annotated[int, typer.Option(min=8, help="Bytes predicted per window.")] = 256,
    data: Annotated[list[Path] | None, typer.Option(help="Files and folders; none: the source of the Python standard library.")] = None,
    optimizers: Annotated[str, typer.Option(help="Presets and peers, separated by commas.")] = ",".join(
        [*PEERS, "muon", "cosmos", "galore"]
    ),
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of all; none: that of each.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Train a LLaMA with several optimizers; report tokens a second and the optimizer's share."""
    torch.set_num_threads(1)
    paths = tuple(map(str, data or ()))
    corpus = Corpus.load(paths)
    fields: dict[str, Any] = {"model": model, "steps": steps, "batch_size": batch_size, "length": length, "device": device, "lr": lr}
    config = TrainConfig(data=paths, eval_every=0, **fields)
    results = [run(name.strip(), config, corpus) for name in optimizers.split(",")]
    show(results, f"model {model}, {results[0].parameters:,} parameters, {steps} steps of {batch_size} x {length} bytes of {corpus.source}")


if __name__ == "__main__":
    typer.run(main)
