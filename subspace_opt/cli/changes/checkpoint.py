"""The command `convert`: a checkpoint of one optimizer becomes one of another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import Tensor, nn

from ...checkpoint.files import flush_names
from ...conversion import ConversionError, Report
from ...conversion import convert as convert_state
from ...lab import meta_model
from ...spec import load_spec
from ..options import AsJson, Overrides, Plugins, Vocabulary, parse_overrides, print_json
from ..tables import console, make_table

OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim")  # the keys under which checkpoints hold the optimizer's state
MODELS = ("model", "model_state_dict", "state_dict")

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A file that torch.save wrote: an optimizer's state, or a mapping with one.")
]
To = Annotated[str, typer.Option("--to", metavar="SPEC", help="The new spec: name of a preset, or path of a .yaml or .json file.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="The new checkpoint. An existing file is not overwritten.")]
ModelSize = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="A size from tiny to 70b, or path of a Hugging Face config. Default: the checkpoint's."),
]


def convert(
    checkpoint: Checkpoint,
    to: To,
    out: Out,
    model: ModelSize = None,
    vocab: Vocabulary = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the new optimizer. Default: the saved one, or that of the spec.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option("--wd", help="Weight decay of the new optimizer.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Updates made so far, if the state has no counter.")] = None,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint of one optimizer into one of another spec.

    Reads states of subspace_opt and of torch's AdamW, Adam and SGD, and prints which slots are exact, approximate, rebuilt or reset. All
    else in the checkpoint is copied. A checkpoint of `train` is resumed by `train NEW --resume` with the same options as before.
    """
    overrides = parse_overrides(set_)
    spec = load_spec(to, overrides)  # before the file is read, so that errors in the spec appear at once
    if out.exists():
        raise ConversionError(f"--out {out} exists; give another name")
    content = _read(checkpoint)
    place = next((key for key in OPTIMIZERS if isinstance(content.get(key), Mapping)), None)
    saved = content if place is None else content[place]
    made = convert_state(saved, spec, model=_model(content, saved, model, vocab), lr=lr, weight_decay=weight_decay, step=step)
    _write(out, made.state_dict if place is None else _with_config({**content, place: made.state_dict}, to, overrides, lr, weight_decay))
    if as_json:
        print_json({"out": str(out), **made.report.to_dict()})
    else:
        _show(made.report, out)


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, with its tensors on the CPU."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # depending on the damage, torch.load raises any exception
        why = "does not exist" if not path.exists() else f"cannot be read: {str(error).splitlines()[0]}"
        raise ConversionError(
            f"{path} {why}; give a file that torch.save wrote, with tensors, numbers, text, lists and mappings only"
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not an optimizer's state or a mapping with one")
    if not {"state", "param_groups"} <= set(content) and not any(key in content for key in OPTIMIZERS):
        raise ConversionError(f"{path} has no optimizer's state: neither `state` and `param_groups` nor one of {', '.join(OPTIMIZERS)}")
    return content


def _model(
    content: Mapping[str, Any], saved: Mapping[str, Any], name: str | None, vocab: int | None
) -> nn.Module | list[tuple[str, Tensor]]:
    """The model of a size, of the checkpoint's own configuration, or the parameters in the checkpoint."""
    weights = next((content[key] for key in MODELS if isinstance(content.get(key), Mapping)), None)
    config = content.get("config")
    if name is None and isinstance(config, Mapping) and "model" in config:
        name, vocab = str(config["model"]), 256 if vocab is None else vocab
    if name is not None:
        made = meta_model(name, vocab_size=vocab)
        if weights is not None:
            made.load_state_dict(weights, assign=True)
        return made
    if weights is None:
        raise ConversionError("the checkpoint does not tell the shapes and roles of the parameters; give --model NAME")
    names = [n for group in saved.get("param_groups", ()) for n in group.get("param_names") or ()]
    if not names:
        raise ConversionError(
            "the optimizer's state has no names of parameters, so the weights beside it cannot be matched; give --model NAME"
        )
    return [(n, nn.Parameter(weights[n], requires_grad=weights[n].is_floating_point())) for n in names if n in weights]


def _with_config(
    content: dict[str, Any], to: str, overrides: Mapping[str, Any], lr: float | None, weight_decay: float | None
) -> dict[str, Any]:
    """A checkpoint of `train` with the configuration under which the run goes on."""
    if isinstance(content.get("config"), Mapping) and "spec" in content["config"]:
        changed = {"spec": to, "overrides": dict(overrides), "lr": lr, "weight_decay": weight_decay}
        content["config"] = {**content["config"], **changed}
    return content


def _write(out: Path, content: dict[str, Any]) -> None:
    """Write beside the final name, flush, and rename, so that the file is complete or absent."""
    fresh = out.with_name(f"{out.name}.tmp")
    try:
        with fresh.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, out)
        flush_names(out.parent)
    except (OSError, RuntimeError) as error:
        fresh.unlink(missing_ok=True)
        raise ConversionError(f"--out {out} could not be written: {error}") from error


def _show(report: Report, out: Path) -> None:
    """A block of lines for every pipeline, and one line for all parameters whose slot fared alike."""
    screen = console()
    table = make_table("slot", "status", "params", "why", right=("params",), fold="why")
    before = ""
    for pipeline, slot, status, count, origin, why in report.table():
        if pipeline != before:
            table.add_row(escape(pipeline), style="bold")
            before = pipeline
        table.add_row(*map(escape, (f"  {slot}", status, count, why if origin in ("-", slot) else f"{why} (from {origin})")))
    screen.print(table)
    screen.print(f"\n{report.summary()}", markup=False, soft_wrap=True)
    for remark in report.groups:
        screen.print(remark, markup=False, soft_wrap=True)
    screen.print(f"written to {out}", markup=False, soft_wrap=True)
