"""Check properties of a step that a time does not show: no host waits, the peak of temporaries, and a step captured in a CUDA graph.

For each preset on the hidden matrices of a LLaMA: `waits` runs steps under `torch.cuda.set_sync_debug_mode("error")`, `peak` is the peak
of memory allocated during a step, `replayed` the time of a captured step. On a CPU only `peak` is measured.

Example: python benchmarks/gpu_steps.py --device cuda --width 2048 --layers 24
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Literal

import torch
import typer
from peers import LR
from rich.console import Console
from rich.table import Table
from step_time import device_name, hidden_matrices, make_gradients, now, settle_allocator
from torch import nn

from subspace_opt import SubspaceOptimizer, build
from subspace_opt.lab.report import readable_bytes
from subspace_opt.lab.run.device import choose_device
from subspace_opt.lab.run.measure import peak_temporaries

WARM = 4  # steps before anything is checked: first bases, allocation, compilation of kernels


@dataclass(frozen=True)
class Row:
    """The result of one preset; words where a number is missing."""

    preset: str
    waits: str
    peak: int
    step_ms: float
    replayed: str


def warmed(preset: str, model: nn.Module, **options: bool) -> SubspaceOptimizer:
    """An optimizer that has made a few steps, and whose next step refreshes no basis."""
    optimizer = build(preset, model, lr=LR, **options)
    for _ in range(WARM):
        optimizer.step()
    return optimizer


def waits(step: Callable[[], object], device: torch.device) -> str:
    """`no`, or the message of the operation that made the host wait for the device."""
    if device.type != "cuda":
        return "not measured"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    except RuntimeError as error:
        return f"yes: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def replayed(preset: str, model: nn.Module, device: torch.device, steps: int) -> str:
    """The median time of a captured step in milliseconds, or the reason why there is none."""
    if device.type != "cuda":
        return "not measured"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            optimizer = warmed(preset, model, capturable=True)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
    except TypeError as error:
        return f"no option `capturable`: {str(error).splitlines()[0]}"
    except RuntimeError as error:
        return f"capture failed: {str(error).splitlines()[0]}"
    return f"{median(timed(graph.replay, device, steps)):.2f} ms"


def timed(step: Callable[[], object], device: torch.device, steps: int) -> list[float]:
    """Milliseconds of each step."""
    taken = []
    for _ in range(steps):
        start = now(device)
        step()
        taken.append(1e3 * (now(device) - start))
    return taken


def checked(preset: str, model: nn.Module, device: torch.device, steps: int) -> Row:
    """All properties of one preset."""
    optimizer = warmed(preset, model)
    peak = peak_temporaries(optimizer.step, device)
    taken = median(timed(optimizer.step, device, steps))
    return Row(preset, waits(optimizer.step, device), peak, taken, replayed(preset, model, device, steps))


def show(rows: Sequence[Row], title: str) -> None:
    """Print the table."""
    table = Table("preset", "peak of a step", "step ms", "waits", "captured step", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(row.preset, readable_bytes(row.peak), f"{row.step_ms:.2f}", row.waits, row.replayed)
    out = Console(highlight=False, width=None if Console().is_terminal else 140)
    out.print(f"{title}\n")
    out.print(table)


def main(
    width: Annotated[int, typer.Option(min=16, help="Hidden width of the LLaMA whose shapes are used.")] = 768,
    layers: Annotated[int, typer.Option(min=1, help="Hidden layers, seven matrices each.")] = 12,
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "adamw,muon,cosmos,galore,soap,normuon,dion2",
    steps: Annotated[int, typer.Option(min=2, help="Timed steps.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Dtype of weights and gradients.")] = "float32",
) -> None:
    """Check that no step waits, measure its peak of temporaries, and time a captured step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settle_allocator()
    where = choose_device(device)
    model = hidden_matrices(width, layers, where).to(getattr(torch, dtype))
    parameters = list(model.parameters())
    for p, gradient in zip(parameters, make_gradients(parameters), strict=True):
        p.grad = gradient
    rows = [checked(name.strip(), model, where, steps) for name in presets.split(",")]
    weights = readable_bytes(sum(p.numel() * p.element_size() for p in parameters))
    show(rows, f"width {width}, layers {layers}, {dtype}, weights {weights}, device {device_name(where)}, torch {torch.__version__}")


if __name__ == "__main__":
    typer.run(main)
