"""Laying out a plugin package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .scaffold import Kind, new_plugin


def new(
    name: Annotated[str, typer.Argument(help="What to call its kind, or its preset: small letters, digits, hyphens.")],
    kind: Annotated[Kind, typer.Option(help="What it brings.")] = "selector",
    directory: Annotated[Path, typer.Option("--in", metavar="DIR", help="Where to put its folder.")] = Path(),
) -> None:
    """Write the skeleton of a plugin package, with tests that pass.

    It is a package of its own: a working rule, selector or preset to start from, an example, tests, a README.
    """
    folder = new_plugin(name, directory, kind)
    typer.echo(f"{folder} is written. Next:\n  pip install -e '{folder}[test]'\n  pytest {folder}")
