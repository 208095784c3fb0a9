"""Measure the start: the import of the package beyond torch, and the build of an optimizer for a 7B LLaMA on the meta device.

Each import runs in a new interpreter and is repeated; the table shows the median of the CPU time and its quartiles. Bytecode is written
before, because pip writes it when it installs a package, even with PYTHONDONTWRITEBYTECODE.

Example: python benchmarks/start_up.py --presets cosmos,muon,adamw
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from step_time import hidden_matrices, quartiles
from torch import nn

from subspace_opt import build

WIDTH, LAYERS, VOCABULARY = 4096, 32, 32000  # LLaMA-7B
IMPORT = "import time, torch; start = time.process_time(); import subspace_opt; print(time.process_time() - start)"


def time_import() -> float:
    """Seconds for the import of the package after torch, in a new interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, env=env).stdout)


def large_model() -> nn.Module:
    """The shapes of LLaMA-7B, without storage."""
    meta = torch.device("meta")
    norms = {f"norm{i}": nn.RMSNorm(WIDTH, device=meta) for i in range(2 * LAYERS + 1)}
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(VOCABULARY, WIDTH, device=meta),
            "hidden": hidden_matrices(WIDTH, LAYERS, meta),
            "norms": nn.ModuleDict(norms),
            "lm_head": nn.Linear(WIDTH, VOCABULARY, bias=False, device=meta),
        }
    )


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main(
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "cosmos,muon,soap,galore,adamw",
    repeats: Annotated[int, typer.Option(min=2, help="Measurements of each.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure the import of the package and the build of an optimizer for a large model."""
    model = large_model()
    time_import()  # writes the bytecode
    found = {"import beyond torch": quartiles([time_import() for _ in range(repeats)])}
    for preset in (name.strip() for name in presets.split(",")):
        found[f"build {preset}, 7B on meta"] = quartiles([seconds(lambda name=preset: build(name, model)) for _ in range(repeats)])  # type: ignore[misc]
    if as_json:
        typer.echo(json.dumps({"torch": torch.__version__, "seconds": found}, indent=2))
        return
    for name, (low, middle, high) in found.items():
        typer.echo(f"{name:<28} {middle:.3f} s ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    typer.run(main)
