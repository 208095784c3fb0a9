"""The commands `explain` and `plan`: the memory of an optimizer, computed before a model is built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

import torch
import typer

from ..distributed.meshes import MeshError, MeshKind, place
from ..lab import meta_model
from ..optimizer import build
from ..plan import Plan
from ..spec import load_spec
from .options import AsJson, Dtype, ModelName, Overrides, Plugins, SpecName, Vocabulary, parse_overrides, print_json
from .ranks import MeshShape, ranks_to_dict, read_mesh, show_ranks
from .tables import console, layers, show_explained, show_plan


def explain(
    spec: SpecName,
    model: ModelName = "60m",
    vocab: Vocabulary = None,
    dtype: Dtype = "float32",
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show the pipeline of every parameter, and why.

    One row for each parameter: shape, pipeline, rank, lr multiplier, weight decay, bytes of state, and the route that decided.
    """
    planned, title = _planned(spec, set_, model, vocab, dtype)
    if as_json:
        print_json({"model": model, "dtype": dtype, **planned.to_dict()})
    else:
        show_explained(planned, title, console())


def plan(
    spec: SpecName,
    model: ModelName = "60m",
    vocab: Vocabulary = None,
    dtype: Dtype = "float32",
    ranks: Annotated[int | None, typer.Option(min=1, help="Also show the bytes that each of this number of ranks holds and sends.")] = None,
    mesh: Annotated[MeshKind | None, typer.Option(help="How the ranks share the model; default: fsdp.")] = None,
    shape: MeshShape = None,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Add up the optimizer's memory, layer by layer.

    The bytes equal those that a run allocates. The table shows AdamW's bytes too. No weights are allocated, so 70b takes seconds.
    """
    if ranks is None and (mesh or shape):
        raise MeshError("--mesh and --shape need the number of ranks; add it, for example --ranks 8")
    grid = None if ranks is None else read_mesh(mesh or "fsdp", ranks, shape)
    planned, title = _planned(spec, set_, model, vocab, dtype)
    placed = None if grid is None else place(planned, grid)
    if as_json:
        totals = {key: value for key, value in planned.to_dict().items() if key != "parameters"}
        own = {} if placed is None else {"on_ranks": ranks_to_dict(placed)}
        print_json({"model": model, "dtype": dtype, **totals, **own, "layers": [asdict(layer) for layer in layers(planned)]})
    else:
        show_plan(planned, title, console())
        if placed is not None:
            show_ranks(placed, console())


def _planned(spec: str, changed: Iterable[str], model: str, vocab: int | None, dtype: str) -> tuple[Plan, str]:
    """The plan for a model on the meta device, and a title for it."""
    loaded = load_spec(spec, parse_overrides(changed))  # before the model is built, so that errors in the spec appear at once
    shapes = meta_model(model, vocab_size=vocab).to(getattr(torch, dtype))
    planned = build(loaded, shapes).plan
    return planned, f"{loaded.name} on {model}: {sum(row.entry.numel for row in planned):,} parameters in {dtype}"
