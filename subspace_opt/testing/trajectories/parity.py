"""Measure the distance from the authors' code for each golden trajectory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cases import CASES
from .golden import Golden, replay


@dataclass(frozen=True)
class Parity:
    """The distance of a preset from the trajectory of one file."""

    preset: str
    file: str
    reference: str
    pins: str
    tolerance: float
    error: float  # largest over steps and compared parameters; 0 if none is compared
    compared: int
    left_out: dict[str, str]  # parameter -> the defect of the reference that it pins
    rounded: str = ""  # why round-off decides the first update of the reference

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def measure(name: str, folder: Path) -> Parity:
    """Replay one file of `folder`."""
    case, golden = CASES[name], Golden(folder / f"{name}.npz")
    errors = replay(golden, case.make, exclude=tuple(case.left_out), rounded=bool(case.rounded))
    reference = golden.meta["reference"]
    return Parity(
        preset=case.preset,
        file=name,
        reference=f"{reference['repo']} at {reference['commit'][:12]}",
        pins=golden.meta["pins"],
        tolerance=golden.tolerance,
        error=max(errors.values(), default=0.0),
        compared=len(errors),
        left_out=dict(case.left_out),
        rounded=case.rounded,
    )


def measure_all(folder: Path) -> list[Parity]:
    """The parity of every known file in `folder`, by preset.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    found = [name for name in CASES if (folder / f"{name}.npz").is_file()]
    if not found:
        raise FileNotFoundError(f"no golden trajectories in '{folder}'; give the folder tests/golden of a checkout")
    return sorted((measure(name, folder) for name in found), key=lambda p: (p.preset, p.file))
