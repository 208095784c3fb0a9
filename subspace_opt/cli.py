"""The command `subspace-opt`: look at specs, plan their memory, train with them.

Exit status: 0 done; 1 a run began and failed or was interrupted; 2 the input is bad. An error of the user's is one message on stderr;
a bug keeps its traceback. Results go to stdout and progress to stderr, so `--json` can be piped.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import typer
from pydantic import ValidationError

from . import __version__
from .checkpoint import CheckpointError
from .console import RunProgress, console, layers, show_catalogue, show_explained, show_plan, show_results
from .document import DocumentError, parse_document
from .engine import NonFiniteGradient
from .lab import LabError, Result, TrainConfig
from .optimizer import build
from .plan import Plan
from .registry import Component, RegistryError, failures, kinds, load_plugin, plugin_entry_points
from .spec import Spec, SpecError, json_schema, load_spec, preset_names

BAD_INPUT = (SpecError, DocumentError, RegistryError, CheckpointError, LabError)

app = typer.Typer(
    name="subspace-opt",
    help="Subspace optimizers for PyTorch from a declarative spec.",
    epilog="Example: subspace-opt plan cosmos --model 7b --set matrix.selector.rank=256",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain messages: a box would break file:line:column in the middle
    pretty_exceptions_enable=False,
)


class RunFailed(RuntimeError):
    """A run began and did not get to its end."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit status."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(None if arguments is None else list(arguments), prog_name="subspace-opt")
        except RunFailed as error:
            _leave(error, 1)
        except BAD_INPUT as error:
            _leave(error, 2)
    raise SystemExit(0)


def _leave(error: Exception, status: int) -> NoReturn:
    print(f"Error: {error}", file=sys.stderr)
    raise SystemExit(status)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"Warning: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ shared options


def _parse_override(given: str) -> tuple[str, Any]:
    """`matrix.selector.rank=128` -> a dotted path and a plain value."""
    path, equals, text = given.partition("=")
    if not equals or not path.strip():
        raise SpecError(f"--set '{given}': give PATH=VALUE, such as matrix.selector.rank=128")
    try:
        data = parse_document(f"value: {text}").data
    except DocumentError as error:
        raise SpecError(f"--set '{given}': the value cannot be read: {str(error).partition(': ')[2]}") from None
    if list(data) != ["value"]:
        raise SpecError(f"--set '{given}': the value takes one line of YAML, such as 128 or {{kind: svd, rank: 8}}")
    return path.strip(), data["value"]


def _load_plugins(paths: list[Path]) -> list[Path]:
    for path in paths:
        load_plugin(path)
    return paths


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"subspace-opt {__version__}, torch {torch.__version__}")
        raise typer.Exit


SpecArgument = Annotated[str, typer.Argument(help="A preset's name, or the path of a .yaml or .json file.", metavar="SPEC")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="PATH=VALUE", help="Set a value of the spec by its dotted path; can be repeated."),
]
Plugins = Annotated[
    list[Path],
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        callback=_load_plugins,
        help="Run a Python file that registers kinds; can be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ModelName = Annotated[
    str, typer.Option("--model", metavar="NAME", help="Size (tiny ... 70b), or path to a Hugging Face config. Needs no memory.")
]
Vocabulary = Annotated[
    int | None, typer.Option("--vocab", min=1, help="Vocabulary; a size has 32000 (`train` uses 256 bytes), a config its own.")
]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Dtype of the parameters.")]


def _overrides(given: Iterable[str]) -> dict[str, Any]:
    return dict(map(_parse_override, given))


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


# -------------------------------------------------------------------------------------------------------- looking at specs


@app.command("list", epilog="Example: subspace-opt list --plugin top_norm.py")
def list_(plugin: Plugins = [], as_json: AsJson = False) -> None:  # noqa: B006  typer reads the default, nothing writes to it
    """What there is: presets, selectors, rules, plugins."""
    catalogue = _catalogue(plugin)
    if as_json:
        _print_json(catalogue)
    else:
        show_catalogue(catalogue, console())


def _catalogue(files: Sequence[Path]) -> dict[str, Any]:
    origin: dict[type[Component], str] = {}
    both = {family: kinds(family) for family in ("selector", "rule")}
    plugins = []
    sources = [(point.name, point.dist, point.module, None) for point in plugin_entry_points()]
    for name, dist, module, file in [*sources, *((str(file), None, None, file.resolve()) for file in files)]:
        own: list[str] = []
        for family in both.values():
            for kind, cls in family.items():
                if cls.__module__ == module or (file is not None and inspect.getfile(cls) == str(file)):
                    own.append(kind)
                    origin[cls] = name
        package = f"{dist.name} {dist.version}" if dist else "--plugin"
        plugins.append({"name": name, "package": package, "kinds": own, "error": failures().get(name)})
    return {
        "presets": [_preset(name) for name in preset_names()],
        "selectors": _described(both["selector"], origin),
        "rules": _described(both["rule"], origin),
        "plugins": plugins,
    }


def _preset(name: str) -> dict[str, Any]:
    spec = load_spec(name)
    return {"name": name, "source": spec.source, "notes": spec.notes, "defaults": spec.defaults.model_dump()}


def _described(family: dict[str, type[Component]], origin: dict[type[Component], str]) -> list[dict[str, Any]]:
    names: dict[type[Component], list[str]] = {}
    for name, cls in family.items():
        names.setdefault(cls, []).append(name)
    return [
        {"names": own, "doc": _first_paragraph(cls), "plugin": origin.get(cls)} for cls, own in names.items()
    ]


def _first_paragraph(cls: type) -> str:
    """The mathematics in one line, which is how the docstring of a kind begins."""
    paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(":")


@app.command(epilog="Example: subspace-opt show cosmos --set matrix.selector.rank=128 > mine.yaml")
def show(
    spec: SpecArgument,
    full: Annotated[bool, typer.Option("--full", help="Also what has its default value.")] = False,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Print a spec as YAML.

    What has its default value is left out; --full and --json have every value.
    """
    loaded = load_spec(spec, _overrides(set_))
    if as_json:
        _print_json(loaded.model_dump(mode="json"))
    else:
        typer.echo(loaded.to_yaml(full=full), nl=False)


@app.command(epilog="Example: subspace-opt validate *.yaml")
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, or names of presets.")],
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Check specs, and say what is wrong with them.

    Leaves with status 2 if anything is.
    """
    overrides = _overrides(set_)
    found: list[dict[str, Any]] = []
    for file in files:
        try:
            spec = load_spec(file, overrides)
        except SpecError as error:
            found.append({"file": file, "valid": False, "error": str(error)})
            if not as_json:
                print(f"Error: {error}", file=sys.stderr)
            continue
        found.append({"file": file, "valid": True, "error": None})
        if not as_json:
            typer.echo(f"{file}: ok ({spec.name}: {_counted(spec)})")
    if as_json:
        _print_json(found)
    if not all(result["valid"] for result in found):
        raise typer.Exit(2)


def _counted(spec: Spec) -> str:
    return f"pipelines {', '.join(spec.pipelines)}; {len(spec.routes)} route{'s' if len(spec.routes) != 1 else ''}"


@app.command(epilog="Example: subspace-opt schema > spec.schema.json")
def schema(plugin: Plugins = []) -> None:  # noqa: B006
    """Print the JSON schema of a spec file, for editors.

    It knows every kind that is installed.
    """
    _print_json(json_schema())


# --------------------------------------------------------------------------------------------------------- planning memory


def _planned(spec: str, overrides: Iterable[str], model: str, vocab: int | None, dtype: str) -> tuple[Plan, str]:
    """The plan for a model without memory, and a title for it."""
    from .lab import meta_model

    loaded = load_spec(spec, _overrides(overrides))  # before the model: a mistake is told at once
    shapes = meta_model(model, vocab_size=vocab).to(getattr(torch, dtype))
    plan = build(loaded, shapes).plan
    return plan, f"{loaded.name} on {model}: {sum(row.entry.numel for row in plan):,} parameters in {dtype}"


@app.command(epilog="Example: subspace-opt explain galore --model 130m --set matrix.selector.rank=0.25")
def explain(
    spec: SpecArgument,
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
    plan, title = _planned(spec, set_, model, vocab, dtype)
    if as_json:
        _print_json({"model": model, "dtype": dtype, **plan.to_dict()})
    else:
        show_explained(plan, title, console())


@app.command("plan", epilog="Example: subspace-opt plan cosmos --model 70b --dtype bfloat16")
def plan_(
    spec: SpecArgument,
    model: ModelName = "60m",
    vocab: Vocabulary = None,
    dtype: Dtype = "float32",
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Add up the optimizer's memory, layer by layer.

    To the byte what a run allocates, beside what AdamW would. No memory is needed to plan: a 70b model takes seconds.
    """
    plan, title = _planned(spec, set_, model, vocab, dtype)
    if as_json:
        totals = {key: value for key, value in plan.to_dict().items() if key != "parameters"}
        _print_json({"model": model, "dtype": dtype, **totals, "layers": [vars(layer) for layer in layers(plan)]})
    else:
        show_plan(plan, title, console())


# ---------------------------------------------------------------------------------------------------------------- training


def _field(name: str, metavar: str | None = None) -> Any:
    """An option of `train`: help and default are those of the config's field."""
    field = TrainConfig.model_fields[name]
    text = f"{field.description}"
    default = "" if field.default in (None, (), "") else f"  [default: {field.default}]"
    return typer.Option(f"--{name.replace('_', '-')}", metavar=metavar, help=f"{text[:1].upper()}{text[1:]}.{default}", show_default=False)


@contextmanager
def _running(configs: Sequence[TrainConfig]) -> Iterator[RunProgress]:
    """Live progress. What goes wrong once a run has begun is a failure, and no longer bad input."""
    with RunProgress(console(stderr=True), [(config.label, config.steps) for config in configs]) as progress:
        try:
            yield progress
        except (LabError, NonFiniteGradient, torch.linalg.LinAlgError) as error:
            if isinstance(error, LabError) and not progress.began:
                raise
            raise RunFailed(str(error)) from error


@app.command(epilog="Example: subspace-opt train cosmos --model mini --steps 500 --out runs/cosmos")
def train(
    context: typer.Context,
    spec: SpecArgument,
    model: Annotated[str | None, _field("model", "NAME")] = None,
    data: Annotated[list[str] | None, _field("data", "PATH")] = None,
    max_bytes: Annotated[int | None, _field("max_bytes")] = None,
    steps: Annotated[int | None, _field("steps")] = None,
    batch_size: Annotated[int | None, _field("batch_size")] = None,
    length: Annotated[int | None, _field("length")] = None,
    accumulate: Annotated[int | None, _field("accumulate")] = None,
    lr: Annotated[float | None, _field("lr")] = None,
    weight_decay: Annotated[float | None, _field("weight_decay")] = None,
    warmup: Annotated[int | None, _field("warmup")] = None,
    min_lr_ratio: Annotated[float | None, _field("min_lr_ratio")] = None,
    clip: Annotated[float | None, _field("clip")] = None,
    eval_every: Annotated[int | None, _field("eval_every")] = None,
    eval_batches: Annotated[int | None, _field("eval_batches")] = None,
    seed: Annotated[int | None, _field("seed")] = None,
    device: Annotated[str | None, _field("device", "auto|cpu|cuda|mps")] = None,
    out: Annotated[Path | None, _field("out", "DIR")] = None,
    save_every: Annotated[int | None, _field("save_every")] = None,
    name: Annotated[str | None, _field("name")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, if there is one.")] = False,
    set_: Overrides = [],  # noqa: B006
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Train a language model with a spec.

    It reads text files, a byte a token; without --data, Python's own source.

    Ctrl-C stops after the update at hand and, with --out, saves: the same command with --resume goes on.
    """
    from .lab import to_json
    from .lab import train as run

    given = {key: value for key, value in context.params.items() if key in TrainConfig.model_fields and value not in (None, [])}
    config = _config({**given, "overrides": _overrides(set_)})
    load_spec(spec, config.overrides)  # before the text is read: a mistake is told at once
    with _running([config]) as progress:
        result = run(config, resume=resume, on_event=progress)
    if as_json:
        _print_json(json.loads(to_json([result]))[0])
    else:
        show_results([result], console())
        if progress.saved:
            typer.echo(f"checkpoint: {progress.saved}")
    _finished([result], progress.saved)


def _config(given: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        option = str(wrong["loc"][0]).replace("_", "-")
        raise LabError(f"--{option}: {wrong['msg'].replace('Input should', 'should')}, not {wrong['input']!r}") from None


def _finished(results: Sequence[Result], saved: str | None) -> None:
    last = results[-1]
    if last.status == "interrupted":
        advice = "go on with the same command and --resume" if saved else "nothing was saved, since no --out was given"
        raise RunFailed(f"{last.run} was interrupted after {last.step} updates; {advice}")


@app.command(epilog="Example: subspace-opt demo --steps 50 --out runs/demo")
def demo(
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of each run; fewer are quicker and say less.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the picture and the numbers.")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """Compare four optimizers on one small problem.

    Each trains the same small LLaMA on the same text, Python's own source: about two minutes on two CPU cores.
    """
    from .lab import compare, to_json, write_picture
    from .lab.demo import configs

    runs = [config if steps is None else config.model_copy(update={"steps": steps}) for config in configs()]
    with _running(runs) as progress:
        results = compare(runs, on_event=progress)
        picture = write_picture(results, out / "comparison.png")
        (out / "comparison.json").write_text(to_json(results), encoding="utf-8")
    if as_json:
        _print_json(json.loads(to_json(results)))
    else:
        shown = console()
        show_results(results, shown)
        shown.print(f"picture: {picture}\nnumbers: {out / 'comparison.json'}\n", markup=False, soft_wrap=True)
        shown.print(TRY_NEXT, markup=False, soft_wrap=True)
    _finished(results, None)


TRY_NEXT = """\
Try next:
  subspace-opt show cosmos                                the spec that ran
  subspace-opt list                                       what else there is
  subspace-opt plan cosmos --model 7b                     what it costs at full size
  subspace-opt train cosmos --model mini --set matrix.complement=sign --out runs/sign"""


if __name__ == "__main__":
    main()
