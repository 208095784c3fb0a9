"""Estimate optimizers on many GPUs with the planner's formulas: the bytes that a rank holds and sends, and the optimizer's share of a step.

    python benchmarks/on_paper.py                                        # everything, in minutes
    python benchmarks/on_paper.py --models 7b --gpus 8,256               # a part
    python benchmarks/on_paper.py --write docs/distributed.md            # writes the table into the page

It needs no GPU and no process group. `subspace_opt.distributed.meshes` lays out the ranks as the optimizer does, and the bytes are exact.
Times are computed from bytes and operations with the rates below, and assume no overlap.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from subspace_opt import Entry, Plan, build, load_spec, make_plan
from subspace_opt.distributed.meshes import Mesh, PlacedPlan, make_mesh, place
from subspace_opt.distributed.parts import is_elementwise
from subspace_opt.lab import meta_model
from subspace_opt.lab.report import readable_bytes
from subspace_opt.plan import Row
from subspace_opt.plan.costs import flops
from subspace_opt.rules.orthogonal import Orthogonalize

# Rates that a large GPU reaches in practice; its data sheet gives higher ones.
QUICK = 400e12  # operations a second in bfloat16 products: training, Newton-Schulz
PLAIN = 40e12  # operations a second in float32: all other products, QR
MEMORY = 2.5e12  # bytes a second of the GPU's own memory
WITHIN, BETWEEN = 400e9, 50e9  # bytes a second that a GPU sends: within a machine of 8 GPUs, between machines
TOKENS = 16_384  # tokens of a GPU in a step

GROUP = {"7b": 256, "70b": 256, "moe-400b": 128}  # ranks in a shard group of HSDP; each gets at least one expert
SPECS = {"adamw": {}, "muon": {}, "soap": {}, "cosmos": {}, "galore": {"matrix.selector.rank": 1024}}


def mixture() -> list[Entry]:
    """A mixture of experts with 397B parameters: 80 layers of width 6144, stacked experts, 8 of 128 experts active for a token."""
    width, inner, experts, layers, vocabulary = 6144, 2048, 128, 80, 128_000
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{name}.weight": (width, width) for name in ("q_proj", "o_proj")}
        shapes |= {f"{at}.self_attn.{name}.weight": (1024, width) for name in ("k_proj", "v_proj")}
        shapes |= {f"{at}.mlp.router.weight": (experts, width)}
        shapes |= {f"{at}.mlp.experts.{name}": (experts, inner, width) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.experts.down": (experts, width, inner)}
        shapes |= {f"{at}.{name}.weight": (width,) for name in ("input_norm", "post_attention_norm")}
    kinds = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    ends = [Entry(name, (vocabulary, width), torch.bfloat16, frozenset({kind})) for name, kind in kinds.items()]
    return [*ends, *(Entry(name, shape, torch.bfloat16) for name, shape in shapes.items())]


def plan_of(model: str, spec: str) -> Plan:
    if model == "moe-400b":
        return make_plan(load_spec(spec, SPECS[spec]), mixture())
    return build(spec, meta_model(model).to(torch.bfloat16), overrides=SPECS[spec]).plan


def mesh_of(model: str, gpus: int) -> Mesh:
    group = GROUP[model]
    return make_mesh("fsdp", gpus) if gpus <= group else make_mesh("hsdp", gpus, (gpus // group, group))


def active(plan: Plan) -> float:
    """The number of parameters that are active for a token: 8 of 128 experts."""
    return sum(row.entry.numel * (8 / 128 if ".experts." in row.entry.name else 1) for row in plan)


@dataclass(frozen=True)
class Line:
    """The result for one optimizer, model and number of GPUs."""

    model: str
    mesh: Mesh
    spec: str
    held: tuple[int, int]  # bytes of a rank: mean and maximum
    sent: tuple[int, int]
    idle: int  # number of ranks that own no matrix
    step: float  # seconds for forward and backward
    compute: float  # seconds of the optimizer on the busiest rank
    traffic: float

    @property
    def part(self) -> float:
        """The optimizer's share of a step."""
        return (self.compute + self.traffic) / (self.step + self.compute + self.traffic)

    def __str__(self) -> str:
        sizes = [" / ".join(map(readable_bytes, pair)) for pair in (self.held, self.sent)]
        times = [f"{self.step:.2f}", f"{1e3 * self.compute:.0f}", f"{1e3 * self.traffic:.0f}", f"{self.part:.1%}"]
        return "| " + " | ".join([self.model, str(self.mesh), self.spec, *sizes, str(self.idle), *times]) + " |"


HEAD = """\
| model | mesh | optimizer | state of a rank, mean / most | sent a step, mean / most | idle | step s | compute ms | traffic ms | part |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def line(model: str, gpus: int, spec: str) -> Line:
    plan, mesh = plan_of(model, spec), mesh_of(model, gpus)
    found = place(plan, mesh)
    seconds = seconds_of_ranks(found)
    most = max(found.bytes_sent)
    return Line(
        model,
        mesh,
        spec,
        (sum(found.bytes_held) // gpus, max(found.bytes_held)),
        (sum(found.bytes_sent) // gpus, most),
        sum(second == 0 for second in seconds) if any(seconds) else 0,
        6 * active(plan) * TOKENS / QUICK,
        max(second + 2 * held / MEMORY for second, held in zip(seconds, found.bytes_held, strict=True)),
        most / (WITHIN if gpus <= 8 else BETWEEN),
    )


def seconds_of_ranks(found: PlacedPlan) -> list[float]:
    """Seconds of products and decompositions on each rank, averaged over steps."""
    out = [0.0] * found.mesh.ranks
    for sharding in found.shardings:
        if sharding is not None and not is_elementwise(sharding.row):
            for part in sharding.parts:
                own = seconds_of(part.row)
                for owner in part.owners:
                    out[owner] += own
    return out


def seconds_of(row: Row) -> float:
    total = 0.0
    for block, frame in row.splits:
        quick = sum(
            rule.flops(rows, cols) for _, rule, rows, cols in frame.places() if isinstance(rule, Orthogonalize) and rule.method != "svd"
        )
        between, refresh = flops(frame)
        every = frame.pipeline.selector.every if frame.opens else 1
        total += block.count * (quick / QUICK + (between - quick + refresh / every) / PLAIN)
    return total


def lines(models: Sequence[str], gpus: Sequence[int], specs: Sequence[str]) -> Iterator[Line]:
    for model in models:
        for number in gpus:
            for spec in specs:
                yield line(model, number, spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(GROUP), help="7b, 70b, moe-400b")
    parser.add_argument("--gpus", default="8,256,4096", help="numbers of GPUs")
    parser.add_argument("--specs", default=",".join(SPECS), help="presets")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    own = parser.parse_args()
    table = [HEAD]
    print(HEAD)
    for one in lines(own.models.split(","), [int(number) for number in own.gpus.split(",")], own.specs.split(",")):
        table.append(str(one))
        print(one, flush=True)
    if own.write:
        text = own.write.read_text(encoding="utf-8")
        marked = r"(<!-- on paper -->\n).*?(<!-- end -->)"
        own.write.write_text(re.sub(marked, lambda m: m[1] + "\n".join(table) + "\n" + m[2], text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
