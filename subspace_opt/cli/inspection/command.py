"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...checkpoint import CheckpointError
from ...diagnostics.saved import SavedLayer, saved_layers
from ..options import AsJson, Plugins, print_json
from ..tables import console
from .files import read_checkpoint
from .show import show_layers


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A file of torch.save, a folder of a run, or a folder of snapshots.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw a picture: .svg, .png, or .html.")] = None,
    plugin: Plugins = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show spectra, energies and bytes of a saved state.

    No model is needed. Layers are named whose rank is too small (the spectrum has not decayed where it is cut) or wasted (few directions
    hold the energy). For checkpoints of several ranks, save a snapshot, which holds whole tensors.
    """
    if out is not None:
        from .picture import check_picture

        check_picture(out)  # before the file is read, so that a wrong name or a missing package raises at once
    found = read_checkpoint(checkpoint)
    layers = saved_layers(found.optimizer)
    if not layers:
        raise CheckpointError(f"{found.path}: the optimizer has no state yet; save it after the first step")
    if as_json:
        print_json(to_dict(found.path, layers))
    else:
        show_layers(found.path, layers, console())
    if out is not None:
        from .picture import write_picture

        write_picture(layers, out, title=str(found.path))
        if not as_json:
            typer.echo(f"picture: {out}")


def to_dict(path: Path, layers: list[SavedLayer]) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "checkpoint": str(path),
        "step": max(layer.step for layer in layers),
        "state_bytes": sum(layer.state_bytes for layer in layers),
        "too_small": [layer.name for layer in layers if layer.verdict == "too small"],
        "wasted": [layer.name for layer in layers if layer.verdict == "wasted"],
        "layers": [layer.to_dict() for layer in layers],
    }
