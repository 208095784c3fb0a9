"""The commands `explain` and `plan`: the costs of an optimizer, computed before a model is built."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..distributed.meshes import MeshError, MeshKind, place
from ..forecast import Budget, BudgetError, Fitted, Parameters, costs_of, entries_of, find_parameters, fit
from ..lab import meta_model
from ..plan import Plan, make_plan
from ..spec import Spec, load_spec
from .costs import fitted_to_dict, show_costs, show_fitted
from .options import AsJson, ModelSource, Overrides, PlannedDtype, Plugins, SpecName, Vocabulary, parse_overrides, print_json
from .ranks import MeshShape, ranks_to_dict, read_mesh, show_ranks
from .tables import console, layers, show_explained, show_layers


def explain(
    spec: SpecName,
    model: ModelSource = "60m",
    vocab: Vocabulary = None,
    dtype: PlannedDtype = None,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show the pipeline of every parameter, and why.

    One row for each parameter: shape, pipeline, rank, lr multiplier, weight decay, bytes of state, and the route that decided.
    """
    loaded = load_spec(spec, parse_overrides(set_))  # before the model is built, so that errors in the spec appear at once
    found = _parameters(loaded, model, vocab, dtype)
    planned = make_plan(loaded, found.entries)
    if as_json:
        print_json({"model": model, "dtype": found.dtypes, **_remarks(found), **planned.to_dict()})
    else:
        show_explained(planned, _title(planned, model, found), console())
        _show_remarks(found, console())


def plan(
    spec: SpecName,
    model: ModelSource = "60m",
    vocab: Vocabulary = None,
    dtype: PlannedDtype = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Also show the bytes that each of this number of ranks holds and sends.")] = None,
    mesh: Annotated[MeshKind | None, typer.Option(help="How the ranks share the model; default: fsdp.")] = None,
    shape: MeshShape = None,
    fit_: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="Find the largest rank and the widest state that fit: 24GiB for weights, gradients, state and temporaries, without "
            "activations; or 0.4x for 0.4 of AdamW's state.",
        ),
    ] = None,
    fit_state: Annotated[str | None, typer.Option(metavar="SIZE", help="The same for a size of the state alone.")] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Rank from which --fit begins. Default: that of the spec.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the spec that fits. Default: print it.")] = None,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show state, temporaries and operations of an optimizer.

    The bytes of state equal those that a run allocates; the table shows AdamW's too. No weights are allocated, so 70b takes seconds.
    With --fit, find the spec that fits a budget.
    """
    if ranks is None and (mesh or shape):
        raise MeshError("--mesh and --shape need the number of ranks; add it, for example --ranks 8")
    budget = _budget(fit_, fit_state, ranks, max_rank, out)
    grid = None if ranks is None else read_mesh(mesh or "fsdp", ranks, shape)
    loaded = load_spec(spec, parse_overrides(set_))
    found = _parameters(loaded, model, vocab, dtype)
    fitted = None if budget is None else fit(loaded, found.entries, budget, max_rank=max_rank)
    planned = make_plan(loaded, found.entries) if fitted is None else fitted.plan
    placed = None if grid is None else place(planned, grid)
    costs = costs_of(planned, placed) if fitted is None else fitted.costs
    if fitted is not None and out is not None:
        _write(fitted, out)
    if as_json:
        totals = {key: value for key, value in planned.to_dict().items() if key != "parameters"}
        own: dict[str, Any] = {} if placed is None else {"on_ranks": ranks_to_dict(placed)}
        own |= {} if fitted is None else {"fit": fitted_to_dict(fitted)}
        each = [asdict(layer) for layer in layers(planned)]
        print_json({"model": model, "dtype": found.dtypes, **_remarks(found), **totals, **costs.to_dict(), **own, "layers": each})
        return
    to = console()
    if fitted is not None:
        show_fitted(fitted, to)
    to.print(_title(planned, model, found), end="\n\n", markup=False, soft_wrap=True)
    show_costs(costs, to)
    show_layers(planned, to)
    if placed is not None:
        show_ranks(placed, to)
    _show_remarks(found, to)
    if fitted is not None:
        typer.echo(f"\n{fitted.spec.to_yaml()}" if out is None else f"\nwrote {out}", nl=out is not None)


def _budget(training: str | None, state: str | None, ranks: int | None, max_rank: int | None, out: Path | None) -> Budget | None:
    """The budget of the options; None if the command only plans."""
    if training is None and state is None:
        if max_rank is not None or out is not None:
            raise BudgetError("--max-rank and --out belong to a search; add a budget, for example --fit 24GiB")
        return None
    if ranks is not None:
        raise BudgetError("--fit counts the memory of one process and does not take --ranks; fit the spec first, then plan it with --ranks")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise BudgetError(f"--out {out}: give a file in a folder that exists")
    return Budget.read(training, state)


def _write(fitted: Fitted, out: Path) -> None:
    try:
        out.write_text(fitted.spec.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise BudgetError(f"--out {out}: {error.strerror}") from error


def _parameters(spec: Spec, model: str, vocab: int | None, dtype: str | None) -> Parameters:
    """The parameters of a model, with the learning rate and weight decay of the spec."""
    chosen = None if dtype is None else getattr(torch, dtype)
    found = find_parameters(model, chosen)
    if found is None:
        found = Parameters(entries_of(meta_model(model, vocab_size=vocab), chosen or torch.float32))
    elif vocab is not None:
        raise BudgetError(f"--vocab {vocab}: the files or the function of --model decide the vocabulary; leave the option out")
    lr, weight_decay = spec.defaults.lr, spec.defaults.weight_decay
    return Parameters(tuple(replace(entry, lr=lr, weight_decay=weight_decay) for entry in found.entries), found.remarks)


def _title(plan: Plan, model: str, found: Parameters) -> str:
    return f"{plan.spec_name} on {model}: {sum(row.entry.numel for row in plan):,} parameters in {found.dtypes}"


def _remarks(found: Parameters) -> dict[str, Any]:
    return {"remarks": list(found.remarks)} if found.remarks else {}


def _show_remarks(found: Parameters, out: Console) -> None:
    for remark in found.remarks:
        out.print(f"note: {remark}", markup=False, soft_wrap=True)
