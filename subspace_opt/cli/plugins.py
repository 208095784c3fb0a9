"""The command `new-plugin`: write the skeleton of a plugin package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .scaffold import Kind, new_plugin


def new(
    name: Annotated[str, typer.Argument(help="Name of its kind or preset: lower-case letters, digits, hyphens.")],
    kind: Annotated[Kind, typer.Option(help="What the plugin adds.")] = "selector",
    directory: Annotated[Path, typer.Option("--in", metavar="DIR", help="Folder in which to create the package.")] = Path(),
) -> None:
    """Write the skeleton of a plugin package, with its tests.

    The package has a working component or preset to start from, an example, tests and a README.
    """
    folder = new_plugin(name, directory, kind)
    typer.echo(f"Created {folder}. Next:\n  pip install -e '{folder}[test]'\n  pytest {folder}")
