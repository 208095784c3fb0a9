"""Measure the memory that updates during `backward()` save: the peak of a training step, without weights, batch and optimizer state.

Example: python benchmarks/in_backward.py --model mini --presets cosmos,adamw
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspace_opt import SubspaceOptimizer, build, step_in_backward
from subspace_opt.lab import make_model
from subspace_opt.lab.report import readable_bytes
from subspace_opt.lab.run.measure import peak_temporaries

Make = Callable[..., SubspaceOptimizer]
WAYS: dict[str, Make] = {"ordinary": build, "in backward": step_in_backward}


def training_step(model: nn.Module, optimizer: SubspaceOptimizer, windows: Tensor) -> None:
    """Run forward, backward and step, and free the gradients."""
    logits = model(input_ids=windows[:, :-1]).logits
    cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def peak(make: Make, preset: str, name: str, windows: Tensor) -> int:
    """Peak bytes of the second step, when the state exists."""
    model = make_model(name)
    optimizer = make(preset, model) if make is build else make(model, preset)
    training_step(model, optimizer, windows)
    return peak_temporaries(lambda: training_step(model, optimizer, windows), torch.device("cpu"))


def main(
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "cosmos,muon,galore,adamw",
    model: Annotated[str, typer.Option(help="Size of the LLaMA.")] = "60m",
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a batch.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Bytes in a window.")] = 32,
) -> None:
    """Compare the peak memory of a training step: the ordinary optimizer and `step_in_backward`."""
    torch.set_num_threads(1)
    windows = torch.randint(256, (batch_size, length + 1), generator=torch.Generator().manual_seed(0))
    gradients = sum(p.numel() * p.itemsize for p in make_model(model).parameters())
    table = Table("preset", *WAYS, "saved", box=None, title=f"all gradients: {readable_bytes(gradients)}", title_justify="left")
    for preset in presets.split(","):
        held = [peak(make, preset, model, windows) for make in WAYS.values()]
        table.add_row(preset, *map(readable_bytes, held), readable_bytes(held[0] - held[1]))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
