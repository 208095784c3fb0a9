"""The command `search`: look for a pipeline that beats the presets within budgets."""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from ...lab import LabError, TrainConfig
from ...lab.run.events import finite
from ...lab.searching.run import Found, SearchConfig, Trial, next_size
from ...lab.searching.run import search as run_search
from ...lab.study.execute import InterruptedStudyError
from ...lab.study.words import difference
from ...spec import load_spec
from ..options import AsJson, Plugins, print_json
from ..tables import console, make_table
from ..training import RunError, field_option, train_config
from .compare import Shown, candidate, check_report, write_study

SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}
SHOWN = 12  # trials in the table


def search(
    context: typer.Context,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Time for everything: 90m, 2h.")] = "2h",
    bytes_: Annotated[str, typer.Option("--bytes", metavar="RATIO", help="Most state bytes, relative to AdamW's: 0.6x.")] = "1x",
    time: Annotated[str, typer.Option(metavar="RATIO", help="Longest update, relative to one with AdamW: 1.3x.")] = "2x",
    confirm_data: Annotated[list[str], typer.Option(metavar="PATH", help="Another text, for the confirmation.")] = [],  # noqa: B006
    confirm_model: Annotated[str | None, typer.Option(metavar="NAME", help="Model of the confirmation.  [default: the next size]")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]SPEC[,PATH=VALUE]...", help="What a winner must beat, with AdamW.  [default: cosmos, muon]"),
    ] = None,
    space: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Parts by place.  [default: 112 pipelines]")] = None,
    model: Annotated[str | None, field_option("model", "NAME")] = None,
    data: Annotated[list[str] | None, field_option("data", "PATH")] = None,
    first_steps: Annotated[int, typer.Option(min=2, help="Updates of the first rung.")] = 50,
    steps: Annotated[int, typer.Option(min=2, help="Most updates of a run.")] = 400,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of the confirmation.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for records and report.")] = Path("runs/search"),
    batch_size: Annotated[int | None, field_option("batch_size")] = None,
    length: Annotated[int | None, field_option("length")] = None,
    eval_batches: Annotated[int | None, field_option("eval_batches")] = None,
    weight_decay: Annotated[float | None, field_option("weight_decay")] = None,
    device: Annotated[str | None, field_option("device", "auto|cpu|cuda|mps")] = None,
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Search for a pipeline within budgets, and confirm it.

    Candidates take one part for each place of the pipeline. Those within the budgets run for a few updates; a quarter of them go on, with
    twice the updates and three learning rates each, until two are left.

    The best then meets the references on another text, a model of twice the size and new seeds, each with its own sweep. Only if it is
    below the best reference for every seed, in runs at least as long as those of the search, is it called a winner and written to
    winner.yaml.
    """
    given = {key: value for key, value in context.params.items() if key in TrainConfig.model_fields and value not in (None, [])}
    if not confirm_data:
        raise LabError("--confirm-data: give another text for the confirmation, or no winner can be confirmed")
    problem = train_config({**given, "out": None})
    config = _config(
        problem=problem,
        confirm_data=tuple(confirm_data),
        confirm_model=confirm_model or next_size(problem.model),
        references=tuple(map(candidate, ["cosmos,matrix.selector.rank=0.25", "muon"] if against is None else against)),
        space=space,
        budget=_seconds(budget),
        bytes=_ratio(bytes_, "--bytes"),
        time=_ratio(time, "--time"),
        first_steps=first_steps,
        seeds=seeds,
        jobs=jobs,
        out=out,
        command=shlex.join(["subspace-opt", *sys.argv[1:]]),
        plugins=tuple(plugin),
    )
    check_report()
    with Shown(console(stderr=True)) as shown:
        try:
            found = run_search(config, on_event=shown.event, on_progress=shown.progress)
        except InterruptedStudyError as error:
            raise RunError(str(error)) from error
    _show(found, config, as_json=as_json)


def _show(found: Found, config: SearchConfig, *, as_json: bool) -> None:
    """Print the trials and the verdict, and write the winner."""
    paths = {} if found.confirmation is None else write_study(found.confirmation, config.out / "confirmation")
    if found.winner is not None:
        paths["winner.yaml"] = config.out / "winner.yaml"
        paths["winner.yaml"].write_text(load_spec(found.winner.spec, found.winner.overrides).to_yaml(), encoding="utf-8")
    if as_json:
        print_json(_plain(found, paths))
        return
    out = console()
    table = make_table("", "candidate", "updates", "loss", "lr", "bytes", "time", right=("updates", "loss", "lr", "bytes", "time"))
    for trial in found.trials[:SHOWN]:
        steps = max(trial.losses)
        front = "front" if trial.candidate.label in found.front else ""
        numbers = f"{trial.losses[steps]:.4f}", f"{trial.lr:.3g}", f"{trial.bytes:.2f}x", f"{trial.time:.2f}x"
        table.add_row(front, trial.candidate.label, str(steps), *numbers)
    out.print(table)
    hidden = len(found.trials) - SHOWN
    notes = [f"{hidden} more ran and were dropped early"] if hidden > 0 else []
    notes += [f"{len(found.too_large)} need too many bytes"] if found.too_large else []
    notes += [f"{len(found.too_slow)} take too long"] if found.too_slow else []
    notes += [f"{found.not_tried} did not fit into --budget"] if found.not_tried else []
    if notes:
        out.print("; ".join(notes) + ". Bytes and times are relative to AdamW's.", soft_wrap=True)
    out.print(f"\n{verdict(found)}", soft_wrap=True)
    for name, path in paths.items():
        typer.echo(f"{name}: {path}")


def verdict(found: Found) -> str:
    """Say whether there is a winner, and why."""
    if found.finalist is None:
        return "No winner: no candidate met both budgets with a finite loss. Allow more bytes or more time."
    assert found.pairing is not None
    words = f"on another text, another model and other seeds: {difference(found.pairing)}"
    searched, confirmed = found.updates
    if confirmed < searched:
        return (
            f"No winner is claimed. {found.finalist.label} was best in the search. --budget left {confirmed} updates for each run of the "
            f"confirmation, fewer than the {searched} of the search, so it decides nothing; {words}. Give more time, or fewer --steps."
        )
    if found.winner is None:
        return f"No winner is claimed. {found.finalist.label} was best in the search, but {words}."
    return f"{found.finalist.label} wins: {words}."


def _plain(found: Found, paths: dict[str, Path]) -> dict[str, Any]:
    def trial(one: Trial) -> dict[str, Any]:
        losses = {str(steps): loss for steps, loss in one.losses.items()}
        known = {"candidate": one.candidate.label, "spec": one.candidate.spec, "lr": one.lr, "losses": losses}
        return {**known, "bytes": one.bytes, "time": one.time}

    plain: dict[str, Any] = finite(
        {
            "verdict": verdict(found),
            "winner": None if found.winner is None else found.winner.model_dump(mode="json"),
            "front": found.front,
            "trials": [trial(one) for one in found.trials],
            "too_large": found.too_large,
            "too_slow": found.too_slow,
            "not_tried": found.not_tried,
            "files": {name: str(path) for name, path in paths.items()},
        }
    )
    return plain


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)\s*", text)
    if match is None or not float(match[1]):
        raise LabError(f"--budget {text}: give a time with its unit, such as 45m or 2h")
    return float(match[1]) * SECONDS[match[2]]


def _ratio(text: str, option: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*x?\s*", text)
    value = float(match[1]) if match else math.nan
    if not value > 0:
        raise LabError(f"{option} {text}: give a ratio to AdamW's, such as 0.6x")
    return value


def _config(**fields: Any) -> SearchConfig:
    try:
        return SearchConfig(**fields)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise LabError(f"--{str(wrong['loc'][0]).replace('_', '-')}: {wrong['msg']}, not {wrong['input']!r}") from None
