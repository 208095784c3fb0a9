"""The commands `train` and `demo`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError

from ..engine.flags.watch import NonFiniteGradient
from ..lab import LabError, Result, TrainConfig
from ..spec import load_spec
from .options import AsJson, Overrides, Plugins, SpecName, parse_overrides, print_json
from .progress import RunProgress
from .tables import console, show_results

TITLE = "Python's standard library, byte by byte"
TRY_NEXT = """\
Try next:
  subspace-opt show cosmos                    shows the spec of the first run
  subspace-opt list                           lists all presets, selectors and rules
  subspace-opt plan cosmos --model 7b         shows the memory for a large model
  subspace-opt train cosmos --model mini --set matrix.complement=sign"""


class RunError(RuntimeError):
    """A run started and did not finish."""


def field_option(name: str, metavar: str | None = None) -> Any:
    """An option of `train` with the help and default of the config's field."""
    field = TrainConfig.model_fields[name]
    text = str(field.description)
    default = "" if field.default in (None, (), "") else f"  [default: {field.default}]"
    option, words = f"--{name.replace('_', '-')}", f"{text[:1].upper()}{text[1:]}.{default}"
    return typer.Option(option, metavar=metavar, help=words, show_default=False)


def train(
    context: typer.Context,
    spec: SpecName,
    model: Annotated[str | None, field_option("model", "NAME")] = None,
    data: Annotated[list[str] | None, field_option("data", "PATH")] = None,
    max_bytes: Annotated[int | None, field_option("max_bytes")] = None,
    steps: Annotated[int | None, field_option("steps")] = None,
    batch_size: Annotated[int | None, field_option("batch_size")] = None,
    length: Annotated[int | None, field_option("length")] = None,
    accumulate: Annotated[int | None, field_option("accumulate")] = None,
    lr: Annotated[float | None, field_option("lr")] = None,
    weight_decay: Annotated[float | None, field_option("weight_decay")] = None,
    warmup: Annotated[int | None, field_option("warmup")] = None,
    min_lr_ratio: Annotated[float | None, field_option("min_lr_ratio")] = None,
    clip: Annotated[float | None, field_option("clip")] = None,
    eval_every: Annotated[int | None, field_option("eval_every")] = None,
    eval_batches: Annotated[int | None, field_option("eval_batches")] = None,
    seed: Annotated[int | None, field_option("seed")] = None,
    device: Annotated[str | None, field_option("device", "auto|cpu|cuda|mps")] = None,
    out: Annotated[Path | None, field_option("out", "DIR")] = None,
    save_every: Annotated[int | None, field_option("save_every")] = None,
    name: Annotated[str | None, field_option("name")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --out, if there is one.")] = False,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Train a language model with a spec.

    The text comes from the files in --data, one token a byte; without --data, from Python's own source.

    Ctrl-C stops after the current update and, with --out, saves a checkpoint. The same command with --resume continues.
    """
    options = {key: value for key, value in context.params.items() if key in TrainConfig.model_fields}
    given = {key: value for key, value in options.items() if value not in (None, [])}
    _train(train_config({**given, "overrides": parse_overrides(set_)}), resume=resume, as_json=as_json)


def _train(config: TrainConfig, *, resume: bool, as_json: bool) -> None:
    from ..lab import to_json
    from ..lab import train as run

    load_spec(config.spec, config.overrides)  # before the text is read, so that errors in the spec appear at once
    with _running([config]) as progress:
        result = run(config, resume=resume, on_event=progress)
    if as_json:
        print_json(json.loads(to_json([result]))[0])
    else:
        show_results([result], console())
        if progress.saved:
            typer.echo(f"checkpoint: {progress.saved}")
    _check_finished([result], "to continue, run the same command with --resume" if progress.saved else "nothing was saved")


def demo(
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of each run.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the picture and the numbers.")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Compare four optimizers on one small problem.

    Each trains the same small LLaMA on the same text, Python's own source. This takes about two minutes on two CPU cores.
    """
    from ..lab import compare, to_json, write_picture
    from ..lab.demo import configs
    from ..lab.run.journal import make_folder

    runs = [config if steps is None else config.model_copy(update={"steps": steps}) for config in configs()]
    _check_picture()  # before the runs, so that a missing package raises at once
    folder = make_folder(out)
    with _running(runs) as progress:
        results = compare(runs, on_event=progress)
        numbers = folder / "comparison.json"
        numbers.write_text(to_json(results), encoding="utf-8")
        picture = write_picture(results, folder / "comparison.png", title=TITLE)
    if as_json:
        print_json(json.loads(to_json(results)))
    else:
        show_results(results, console())
        typer.echo(f"picture: {picture}\nnumbers: {numbers}\n\n{TRY_NEXT}")
    _check_finished(results, "later runs were not started")


def train_config(given: dict[str, Any]) -> TrainConfig:
    for key, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise LabError(f"--{key.replace('_', '-')}: should be a finite number, not {value}")
    try:
        return TrainConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        option, why = str(wrong["loc"][0]).replace("_", "-"), wrong["msg"].replace("Input should", "should")
        raise LabError(f"--{option}: {why}, not {wrong['input']!r}") from None


def _check_picture() -> None:
    if find_spec("matplotlib") is None:
        raise LabError("the picture needs matplotlib, which is not installed; run: pip install 'subspace-opt[lab]'")


@contextmanager
def _running(configs: Sequence[TrainConfig]) -> Iterator[RunProgress]:
    """Show live progress. An error after a run has started becomes a RunError; before, it is bad input."""
    with RunProgress(console(stderr=True), [(config.label, config.steps) for config in configs]) as progress:
        try:
            yield progress
        except (LabError, NonFiniteGradient, torch.linalg.LinAlgError) as error:
            if not progress.began:
                raise
            raise RunError(str(error)) from error


def _check_finished(results: Sequence[Result], consequence: str) -> None:
    last = results[-1]
    if last.status == "interrupted":
        raise RunError(f"{last.run} was interrupted after {last.step} updates; {consequence}")
