"""The command `subspace-opt`: show specs, plan their memory, train with them.

In: the arguments of one call. Out: text or JSON, and an exit status.
Exit status: 0 success; 1 a run started and failed or was interrupted; 2 bad input. Bad input gives one message on stderr; a bug gives a
traceback. Results go to stdout and progress to stderr, so that `--json` can be piped.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import torch
import typer

from .. import __version__
from ..checkpoint import CheckpointError
from ..distributed.meshes import MeshError
from ..engine.lowbit import LowBitError
from ..forecast import BudgetError, ModelError
from ..lab import LabError
from ..registry import RegistryError
from ..spec import SpecError
from ..spec.document import DocumentError
from . import changes, fidelity, inspection, memory, plugins, ranks, specs, training
from .studies.compare import compare
from .studies.search import search

BAD_INPUT = (SpecError, DocumentError, RegistryError, CheckpointError, LabError, LowBitError, MeshError, BudgetError, ModelError)

app = typer.Typer(
    name="subspace-opt",
    help="Subspace optimizers for PyTorch from a declarative spec.",
    epilog="Example: subspace-opt plan cosmos --model 7b --set matrix.selector.rank=256",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # a box around a message would break the line within file:line:column
    pretty_exceptions_enable=False,
)

for name, command, example in (
    ("list", specs.list_kinds, "list --plugin top_norm.py"),
    ("show", specs.show, "show cosmos --set matrix.selector.rank=128 > mine.yaml"),
    ("validate", specs.validate, "validate *.yaml"),
    ("schema", specs.schema, "schema > spec.schema.json"),
    ("explain", memory.explain, "explain galore --model 130m"),
    ("plan", memory.plan, "plan cosmos --model 70b --dtype bfloat16"),
    ("diff", changes.diff, "diff galore cosmos"),
    ("explain-change", changes.explain_change, "explain-change cosmos cosmos --set matrix.selector.rank=128 --model 130m"),
    ("convert", changes.convert, "convert runs/adamw/last.pt --to cosmos --out runs/cosmos/last.pt"),
    ("verify", ranks.verify, "verify cosmos --ranks 4 --mesh fsdp"),
    ("train", training.train, "train cosmos --model mini --steps 500 --out runs/cosmos"),
    ("inspect", inspection.inspect, "inspect runs/cosmos --out spectra.svg"),
    ("compare", compare, "compare cosmos muon adamw --model mini --steps 600 --seeds 3"),
    ("search", search, "search --budget 2h --bytes 0.6x --time 1.3x --confirm-data other.txt"),
    ("demo", training.demo, "demo --steps 50 --out runs/demo"),
    ("parity", fidelity.parity, "parity --json"),
    ("new-plugin", plugins.new, "new-plugin top-peaks --kind selector"),
):
    app.command(name, epilog=f"Example: subspace-opt {example}")(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"subspace-opt {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its status."""
    for package in ("torchao", "torch.utils._pytree"):  # imported by transformers; logs warnings about unused kernels
        logging.getLogger(package).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(None if arguments is None else list(arguments), prog_name="subspace-opt")
        except training.RunError as error:
            _leave(error, 1)
        except BAD_INPUT as error:
            _leave(error, 2)
    raise SystemExit(0)


def _leave(error: Exception, status: int) -> NoReturn:
    print(f"Error: {error}", file=sys.stderr)
    raise SystemExit(status)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"Warning: {message}", file=sys.stderr)
