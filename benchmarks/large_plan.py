"""Measure the plan of a mixture of experts of 400 billion parameters: CPU time and resident memory, with stacked and with separate experts.

Example: python benchmarks/large_plan.py --presets cosmos,galore
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Annotated

import torch
import typer

from subspace_opt import Entry, load_spec, make_plan

LAYERS, EXPERTS, WIDTH, INNER, VOCABULARY = 60, 160, 5120, 2688, 128_000


def mixture(*, stacked: bool) -> list[Entry]:
    """The parameters: 9,600 experts of three matrices, stacked by layer as 3-D weights or each on its own."""
    shapes = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    sizes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        path = f"layers.{layer}"
        sizes |= {f"{path}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        sizes |= {f"{path}.{name}_norm.weight": (WIDTH,) for name in ("input", "post")} | {f"{path}.mlp.gate.weight": (EXPERTS, WIDTH)}
        for name, shape in shapes.items():
            if stacked:
                sizes[f"{path}.mlp.experts.{name}"] = (EXPERTS, *shape)
            else:
                sizes |= {f"{path}.mlp.experts.{number}.{name}.weight": shape for number in range(EXPERTS)}
    return [Entry(name, shape, torch.bfloat16) for name, shape in sizes.items()]


def measure(preset: str, *, stacked: bool) -> dict[str, float]:
    """CPU seconds of the plan with its sums, parameters, and the resident memory of this process at its peak."""
    spec = load_spec(preset)
    start = time.process_time()
    entries = mixture(stacked=stacked)
    plan = make_plan(spec, entries)
    state = plan.total_bytes
    seconds = time.process_time() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "rows": len(plan), "parameters": sum(e.numel for e in entries), "state": state, "resident": peak}


def main(
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "cosmos,galore,adamw",
    alone: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Plan each preset in a process of its own, so that its peak of memory is its own."""
    if alone:
        typer.echo(json.dumps(measure(presets, stacked=alone == "stacked")))
        return
    for preset in (name.strip() for name in presets.split(",")):
        for kind in ("stacked", "separate"):
            command = [sys.executable, __file__, "--presets", preset, "--alone", kind]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            size = f"{found['parameters'] / 1e9:.0f}B parameters in {found['rows']:,} tensors"
            typer.echo(f"{preset:<10} {kind:<9} {size}: {found['seconds']:.2f} s, {found['resident'] / 2**30:.2f} GiB resident")


if __name__ == "__main__":
    typer.run(main)
