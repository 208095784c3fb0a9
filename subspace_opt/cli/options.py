"""Options that several commands share, and JSON output."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..registry import load_plugin
from ..spec import SpecError
from ..spec.overrides import value_in_text


def parse_override(given: str) -> tuple[str, Any]:
    """Parse `matrix.selector.rank=128` into a dotted path and a plain value.

    Raises:
        SpecError: the text has no `=`, or its value is not YAML of one line.
    """
    path, equals, text = given.partition("=")
    if not equals or not path.strip():
        raise SpecError(f"--set '{given}': give PATH=VALUE, such as matrix.selector.rank=128")
    return path.strip(), value_in_text(text, f"--set '{given}'")


def parse_overrides(given: Iterable[str]) -> dict[str, Any]:
    """All `--set` options as a mapping for `load_spec`. If a path occurs twice, the last value counts."""
    return dict(map(parse_override, given))


def print_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _load_plugins(paths: list[Path]) -> list[Path]:
    for path in paths:
        load_plugin(path)
    return paths


SpecName = Annotated[str, typer.Argument(metavar="SPEC", help="Name of a preset, or path of a .yaml or .json file.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="PATH=VALUE", help="Set a value of the spec by its dotted path. Repeat for several."),
]
Plugins = Annotated[
    list[Path],
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        callback=_load_plugins,
        help="Run a Python file that registers kinds. Repeat for several.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ModelName = Annotated[str, typer.Option("--model", metavar="NAME", help="A size from tiny to 70b, or path of a Hugging Face config.")]
Vocabulary = Annotated[
    int | None,
    typer.Option("--vocab", min=1, help="Size of the vocabulary. Default: 32000, or that of the config (`train` uses 256)."),
]
ModelSource = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        help="A size from tiny to 70b; path of a Hugging Face config, a .safetensors file, its index, or a folder; or module:function.",
    ),
]
PlannedDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Dtype of the parameters. Default: that of the files or the module, else float32."),
]
