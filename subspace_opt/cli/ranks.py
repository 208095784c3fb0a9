"""Several ranks: the table that `plan` shows for them, and the command `verify`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from ..distributed.meshes import Mesh, MeshError, MeshKind, PlacedPlan, make_mesh
from ..lab.report import readable_bytes
from ..spec import load_spec
from .options import AsJson, Overrides, Plugins, SpecName, parse_overrides, print_json
from .tables import console, make_table, split_name
from .training import RunError

if TYPE_CHECKING:
    from ..lab.verify import Certificate, Trial

MeshName = Annotated[MeshKind, typer.Option("--mesh", help="How the ranks share the model.")]
MeshShape = Annotated[
    str | None, typer.Option("--shape", metavar="2x4", help="Shape of a mesh with two dimensions; tensor parallelism uses the last.")
]
SHOWN = 16  # rows in a table of ranks; with more ranks, those that disagree with the plan


def read_mesh(kind: str, ranks: int, shape: str | None) -> Mesh:
    """The mesh of the options --mesh, --ranks and --shape.

    Raises:
        MeshError: the shape is malformed, or does not fit the number of ranks.
    """
    if shape is None:
        return make_mesh(kind, ranks)
    numbers = shape.lower().split("x")
    if not all(number.isdecimal() for number in numbers):
        raise MeshError(f"--shape '{shape}': give whole numbers with x between them, such as 2x4")
    return make_mesh(kind, ranks, [int(number) for number in numbers])


# -------------------------------------------------------------------------------------------------------------- plan


def ranks_to_dict(placed: PlacedPlan) -> dict[str, Any]:
    """The bytes that each rank holds and sends, for JSON."""
    return {
        "mesh": placed.mesh.kind,
        "shape": list(placed.mesh.shape),
        "ranks": placed.mesh.ranks,
        "state_bytes": list(placed.bytes_held),
        "sent_bytes": list(placed.bytes_sent),
        "sent_bytes_at_refresh": list(placed.bytes_sent_at_refresh),
    }


def show_ranks(placed: PlacedPlan, out: Console) -> None:
    """The bytes that a rank holds and sends: smallest, mean and largest."""
    numbers = ("smallest", "mean", "largest", "total / ranks")
    lines = make_table(f"{placed.mesh}, each rank", *numbers, right=numbers)
    total = placed.plan.total_bytes / placed.mesh.ranks
    own = [("state", placed.bytes_held, readable_bytes(round(total))), ("sent in a step", placed.bytes_sent, "")]
    if placed.bytes_sent_at_refresh != placed.bytes_sent:
        own.append(("sent in a refresh step", placed.bytes_sent_at_refresh, ""))
    for name, each, even in own:
        mean = round(sum(each) / len(each))
        lines.add_row(name, readable_bytes(min(each)), readable_bytes(mean), readable_bytes(max(each)), even)
    out.print()
    out.print(lines)
    alone = [row for row, sharding in zip(placed.plan.rows, placed.shardings, strict=True) if sharding is None]
    if alone:
        size = readable_bytes(sum(row.state_bytes for row in alone))
        out.print(f"{len(alone)} parameters are not sharded by this mesh: every rank holds all of their state, {size}", soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------ verify


def verify(
    spec: SpecName,
    ranks: Annotated[int | None, typer.Option(min=1, help="Number of ranks. Default: 4, or the number that torchrun started.")] = None,
    mesh: MeshName = "fsdp",
    shape: MeshShape = None,
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="A size, or path of a Hugging Face config.")] = "tiny",
    vocab: Annotated[int | None, typer.Option(min=1, help="Size of the vocabulary. Default: 256, or that of the config.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of updates.")] = 20,
    dtype: Annotated[Literal["float64", "float32", "bfloat16"], typer.Option(help="Dtype of the parameters.")] = "float64",
    train: Annotated[bool, typer.Option("--train", help="Use the model's gradients on random tokens, not random ones.")] = False,
    time_limit: Annotated[float, typer.Option(min=1, help="Stop with an error after this number of seconds.")] = 600,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Check that several ranks give the weights of one process.

    Both run the same spec on the same gradients. Their weights must agree, and the bytes of state and the bytes sent must equal the plan.
    Exits with status 1 if anything differs.

    The ranks are processes on this machine. Under torchrun they are its processes, on their GPUs:
    torchrun --nproc-per-node 8 -m subspace_opt.cli verify cosmos
    """
    from ..lab.model import SIZES
    from ..lab.verify import Trial, torchrun_ranks  # late: imports torch.distributed

    changed = parse_overrides(set_)
    load_spec(spec, changed)  # before the ranks start, so that errors in the spec appear at once
    started = torchrun_ranks()
    if started is not None and ranks not in (None, started):
        raise MeshError(f"--ranks {ranks}: torchrun has started {started} ranks; leave --ranks out")
    number = started or ranks or 4
    sides = read_mesh(mesh, number, shape).shape
    words = vocab or (256 if model in SIZES else None)
    files = tuple(str(Path(path).resolve()) for path in plugin)
    trial = Trial(spec, mesh, number, sides, model, words, steps, dtype, train, overrides=changed, plugins=files)
    _verify(trial, time_limit, under_torchrun=started is not None, as_json=as_json)


def _verify(trial: Trial, time_limit: float, *, under_torchrun: bool, as_json: bool) -> None:
    """Run the trial; the first rank prints the certificate.

    Raises:
        RunError: a rank failed, or something differs.
    """
    from ..lab.verify import CertificateError, certify, certify_here

    try:
        certificate = certify_here(trial, time_limit=time_limit) if under_torchrun else certify([trial], time_limit=time_limit)[0]
    except CertificateError as error:
        raise RunError(str(error)) from error
    if not under_torchrun or _is_first():
        if as_json:
            print_json(certificate.to_dict())
        else:
            show_certificate(certificate, console())
    if not certificate.holds:
        raise RunError(verdict(certificate))


def _is_first() -> bool:
    return os.environ["RANK"] == "0"


def verdict(certificate: Certificate) -> str:
    """The result in one sentence: equal, or what differs."""
    worst, wrong = certificate.largest, [rank for rank in certificate.ranks if not rank.holds]
    reasons = []
    if not certificate.weights_hold:
        reasons.append(f"'{worst.name}' differs by {worst.part:.1e} of the distance that it moved (tolerance {certificate.tolerance:g})")
    if wrong:
        reasons.append(f"the bytes of rank {', '.join(str(rank.rank) for rank in wrong[:SHOWN])} differ from the plan")
    if not reasons:
        return f"equal: weights within {certificate.tolerance:g} of their distance moved, state and traffic as planned to the byte"
    return "; ".join(reasons)


def show_certificate(certificate: Certificate, out: Console) -> None:
    """Differences of weights by layer, bytes by rank, and the verdict."""
    trial = certificate.trial
    gradients = "its own gradients" if trial.train else "random gradients"
    size = f"{certificate.parameters:,} parameters in {trial.dtype}"
    out.print(
        f"{certificate.spec_name} on {trial.model}: {size}, {gradients}, {trial.steps} steps\n"
        f"one process and {trial.grid} on {certificate.device}",
        end="\n\n",
        markup=False,
        soft_wrap=True,
    )
    numbers = ("largest difference", "distance moved", "ratio")
    layers = make_table("layer", *numbers, right=numbers, fold="layer")
    for name, found in groupby(certificate.differences, key=lambda each: split_name(each.name)[0]):
        worst = max(found, key=lambda each: each.part)
        wrong = "red" if worst.part > certificate.tolerance else None
        layers.add_row(escape(name), f"{worst.largest:.1e}", f"{worst.way:.1e}", f"{worst.part:.1e}", style=wrong)
    out.print(layers)
    if certificate.full:
        message = f"the rank is at least the size of {len(certificate.full)} matrices, so their complement is empty: set a smaller rank"
        out.print(f"{message}, such as --set matrix.selector.rank=16", soft_wrap=True)
    out.print()
    columns = ("state held", "planned", "sent in step 1", "planned", "sent later", "planned")
    ranks = make_table("rank", *columns, right=columns)
    for rank in _shown(certificate):
        style = None if rank.holds else "red"
        later = f"{rank.sent_least:,}" + (f" to {rank.sent_most:,}" if rank.sent_most != rank.sent_least else "")
        sizes = (*(f"{size:,}" for size in (rank.held, rank.planned, rank.sent_first, rank.expected_first)), later, f"{rank.expected:,}")
        ranks.add_row(str(rank.rank), *sizes, style=style)
    out.print(ranks)
    if len(certificate.ranks) > SHOWN:
        agree = sum(rank.holds for rank in certificate.ranks)
        out.print(f"{agree} of {len(certificate.ranks)} ranks agree with the plan to the byte; --json has all of them", soft_wrap=True)
    out.print(f"one process holds {certificate.one_process_bytes:,} bytes of state", end="\n\n", soft_wrap=True)
    if certificate.holds:
        out.print(verdict(certificate), soft_wrap=True)


def _shown(certificate: Certificate) -> Sequence[Any]:
    if len(certificate.ranks) <= SHOWN:
        return certificate.ranks
    wrong = [rank for rank in certificate.ranks if not rank.holds]
    return (wrong or certificate.ranks)[:SHOWN]
