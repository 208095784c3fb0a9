"""What an optimizer will keep for a model, before there is one: explain, plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

import torch

from ..lab import meta_model
from ..optimizer import build
from ..plan import Plan
from ..spec import load_spec
from .options import AsJson, Dtype, ModelName, Overrides, Plugins, SpecName, Vocabulary, overrides, print_json
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
    """Say what happens to every parameter, and why.

    One row a parameter: shape, pipeline, rank, lr multiplier, weight decay, bytes of state, and the route that decided.
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
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Add up the optimizer's memory, layer by layer.

    To the byte what a run allocates, beside what AdamW would. The model's weights are never made: 70b takes seconds.
    """
    planned, title = _planned(spec, set_, model, vocab, dtype)
    if as_json:
        totals = {key: value for key, value in planned.to_dict().items() if key != "parameters"}
        print_json({"model": model, "dtype": dtype, **totals, "layers": [asdict(layer) for layer in layers(planned)]})
    else:
        show_plan(planned, title, console())


def _planned(spec: str, changed: Iterable[str], model: str, vocab: int | None, dtype: str) -> tuple[Plan, str]:
    """The plan for a model that has shapes and no memory, and a title for it."""
    loaded = load_spec(spec, overrides(changed))  # before the model: a mistake is told at once
    shapes = meta_model(model, vocab_size=vocab).to(getattr(torch, dtype))
    planned = build(loaded, shapes).plan
    return planned, f"{loaded.name} on {model}: {sum(row.entry.numel for row in planned):,} parameters in {dtype}"
