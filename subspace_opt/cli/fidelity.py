"""The command `parity`: compare presets with their authors' trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, print_json
from .tables import console, show_parity
from .training import RunError


def parity(
    golden: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the trajectories: tests/golden of a checkout.")] = Path(
        "tests/golden"
    ),
    as_json: AsJson = False,
) -> None:
    """Compare presets with their authors' own code.

    Replays recorded trajectories of that code. Exits with status 1 if one differs by more than its tolerance.
    """
    from ..testing.trajectories.parity import measure_all  # numpy is not a core dependency

    try:
        measured = measure_all(golden)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--golden") from None
    if as_json:
        print_json([row.to_dict() for row in measured])
    else:
        show_parity(measured, console())
    if not all(row.holds for row in measured):
        raise RunError(f"{sum(not row.holds for row in measured)} of {len(measured)} trajectories exceed their tolerance")
