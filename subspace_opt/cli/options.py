"""What several commands take, and how they answer a program."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..registry import load_plugin
from ..spec import SpecError
from ..spec.document import DocumentError, parse_document


def parse_override(given: str) -> tuple[str, Any]:
    """`matrix.selector.rank=128` as a dotted path and a plain value.

    Raises:
        SpecError: no `=`, or a value that is no YAML of one line.
    """
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


def overrides(given: Iterable[str]) -> dict[str, Any]:
    """All `--set` options as `load_spec` takes them; of two for one path the last holds."""
    return dict(map(parse_override, given))


def print_json(data: Any) -> None:
    """One document on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _load_plugins(paths: list[Path]) -> list[Path]:
    for path in paths:
        load_plugin(path)
    return paths


SpecName = Annotated[str, typer.Argument(metavar="SPEC", help="A preset's name, or the path of a .yaml or .json file.")]
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
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Dtype of the parameters.")]
ModelName = Annotated[str, typer.Option("--model", metavar="NAME", help="A size, tiny to 70b, or the path of a Hugging Face config.")]
Vocabulary = Annotated[
    int | None,
    typer.Option("--vocab", min=1, help="Vocabulary; a size has 32000 (`train` uses 256 bytes), a config its own."),
]
