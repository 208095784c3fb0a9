"""The command `compare`: a fair comparison of several optimizers, and its report."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ...lab import LabError, TrainConfig
from ...lab.run.events import Event, Stepped
from ...lab.study.execute import InterruptedStudyError
from ...lab.study.plan import Candidate, StudyConfig
from ...lab.study.records import Record, Study
from ...lab.study.run import Progress as StudyProgress
from ...lab.study.run import run_study
from ..options import AsJson, Plugins, parse_override, print_json
from ..progress import clock
from ..tables import console
from ..training import RunError, field_option, train_config


def compare(
    context: typer.Context,
    specs: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]SPEC[,PATH=VALUE]...", help="Presets or files, each with a name and values of its own if wanted."),
    ],
    model: Annotated[str | None, field_option("model", "NAME")] = None,
    data: Annotated[list[str] | None, field_option("data", "PATH")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Updates of each final run.")] = 600,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of each optimizer. Runs are paired by seed.")] = 3,
    tune: Annotated[str, typer.Option(metavar="FIELDS", help="What the sweep varies: lr,weight_decay,rank or dotted paths.")] = "lr",
    sweep_steps: Annotated[int | None, typer.Option(min=1, help="Updates of each run of the sweep.  [default: half of --steps]")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each in its own process.")] = 1,
    turns: Annotated[int, typer.Option(min=0, help="Updates of each, timed by turns; 0: the times of the runs.")] = 40,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for records and report.")] = Path("runs/compare"),
    title: Annotated[str, typer.Option(help="Title of the report.")] = "",
    batch_size: Annotated[int | None, field_option("batch_size")] = None,
    length: Annotated[int | None, field_option("length")] = None,
    accumulate: Annotated[int | None, field_option("accumulate")] = None,
    weight_decay: Annotated[float | None, field_option("weight_decay")] = None,
    warmup: Annotated[int | None, field_option("warmup")] = None,
    min_lr_ratio: Annotated[float | None, field_option("min_lr_ratio")] = None,
    clip: Annotated[float | None, field_option("clip")] = None,
    eval_every: Annotated[int | None, field_option("eval_every")] = None,
    eval_batches: Annotated[int | None, field_option("eval_batches")] = None,
    device: Annotated[str | None, field_option("device", "auto|cpu|cuda|mps")] = None,
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Compare optimizers fairly: sweeps, then runs over seeds.

    All optimizers start from the same weights and see the same batches in the same order. Each gets its own learning rate from a sweep by
    factors of two, which widens until the best rate has a worse one on each side. Final runs are paired by seed.

    Every finished run is stored in --out. The same command continues an interrupted comparison, and adding an optimizer runs only that one.
    """
    given = {key: value for key, value in context.params.items() if key in TrainConfig.model_fields and value not in (None, [])}
    problem = train_config({**given, "out": None})
    study = _study(
        candidates=tuple(map(candidate, specs)),
        problem=problem,
        seeds=seeds,
        tune=tuple(word.strip() for word in tune.split(",") if word.strip()),
        sweep_steps=sweep_steps or max(1, steps // 2),
        jobs=jobs,
        turns=turns,
        out=out,
        title=title,
        command=shlex.join(["subspace-opt", *sys.argv[1:]]),
        plugins=tuple(plugin),
    )
    check_report()
    with Shown(console(stderr=True)) as shown:
        try:
            found = run_study(study, on_event=shown.event, on_progress=shown.progress)
        except InterruptedStudyError as error:
            raise RunError(str(error)) from error
    if shown.rank == 0:
        _show(found, out, as_json=as_json)


def _show(study: Study, folder: Path, *, as_json: bool) -> None:
    """Write the report, and print its table and verdict."""
    from ...lab.study.summary import summary

    paths = write_study(study, folder)
    if as_json:
        print_json(json.loads(paths["results.json"].read_text(encoding="utf-8")))
        return
    out = console()
    for part in summary(study):
        out.print(part)
    for name, path in paths.items():
        typer.echo(f"{name}: {path}")


def write_study(study: Study, folder: Path) -> dict[str, Path]:
    """Write the report of a study, and return its files by name."""
    from ...lab.study.report import write_report

    return write_report(study, folder)


def check_report() -> None:
    """Look for what the report needs before anything runs."""
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            raise LabError(f"the report needs {package}, which is not installed. Run: pip install 'subspace-opt[lab]'")


def candidate(given: str) -> Candidate:
    """Parse `NAME=SPEC,PATH=VALUE,...`. The name is optional; without it the spec's name or the file's stem names the optimizer."""
    head, *changes = given.split(",")
    name, equals, spec = head.partition("=")
    if not equals:
        name, spec = Path(head).stem, head
    if not name or not spec:
        raise LabError(f"compare: {given!r} is no optimizer. Give a preset or file, such as cosmos or big=cosmos,matrix.selector.rank=64")
    return Candidate(label=name, spec=spec, overrides=dict(map(parse_override, changes)))


def _study(**fields: Any) -> StudyConfig:
    try:
        return StudyConfig(**fields).checked()
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise LabError(f"--{str(wrong['loc'][0]).replace('_', '-')}: {wrong['msg']}, not {wrong['input']!r}") from None


class Shown:
    """Progress of a study: a bar over all known runs on a terminal, and one line for each finished run."""

    def __init__(self, out: Console) -> None:
        self.out, self.rank = out, int(os.environ.get("RANK", "0"))
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=out,
            expand=True,
            disable=not out.is_terminal or self.rank > 0,
        )
        self._task = self._bar.add_task("runs", total=None, text="")
        self._last: StudyProgress | None = None

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def event(self, event: Event) -> None:
        """Show one event of the current run."""
        if isinstance(event, Stepped):
            self._bar.update(self._task, text=f"{event.run}  update {event.step}/{event.steps}  loss {event.loss:.3f}{self._left()}")

    def progress(self, progress: StudyProgress) -> None:
        """Show how far the study is."""
        self._last = progress
        total = progress.done + progress.left
        self._bar.update(self._task, completed=progress.done, total=total, description=f"run {progress.done}/{total}")
        if progress.record is not None:
            self.out.print(f"[{progress.done}/{total}] {_line(progress.record)}{self._left()}", markup=False, soft_wrap=True)

    def _left(self) -> str:
        seconds = math.nan if self._last is None else self._last.seconds_left
        return "" if math.isnan(seconds) else f"  about {clock(seconds)} left"


def _line(record: Record) -> str:
    values = ", ".join(f"{field} {value:.3g}" for field, value in record.values.items())
    outcome = f"{record.loss:.4f} nats" if record.status == "finished" else "diverged"
    seconds = f" in {clock(record.seconds_at[-1])}" if record.seconds_at else ""
    return f"{record.stage} {record.label}, {values}, seed {record.seed}: {outcome}{seconds}"
