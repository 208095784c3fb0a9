"""Failed decompositions in a row, counted by parameter: a warning for each, and an error when they do not end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch

MOST_FAILURES = 3  # failed decompositions of one parameter in a row after which the step raises


class Failure(NamedTuple):
    """What a warning says of a failed decomposition, after the name of its parameter."""

    words: str
    cause: Exception | None = None


def count_failures(found: Mapping[str, Failure | None], failures: dict[str, int]) -> None:
    """Keep `failures` up to date, warn of each failure, and raise at `MOST_FAILURES`.

    Args:
        found: By parameter; None if its decompositions succeeded, or if it took none.

    Raises:
        torch.linalg.LinAlgError: a decomposition failed `MOST_FAILURES` times in a row for one parameter.
    """
    for name, failure in found.items():
        if failure is None:
            failures.pop(name, None)
            continue
        failures[name] = failures.get(name, 0) + 1
        if failures[name] < MOST_FAILURES:
            warnings.warn(f"a decomposition for '{name}' {failure.words}", RuntimeWarning, stacklevel=6)
    for name, failure in found.items():
        if failure is not None and failures[name] >= MOST_FAILURES:
            reason = "" if failure.cause is None else f": {failure.cause}"
            raise torch.linalg.LinAlgError(
                f"the decomposition for '{name}' failed {failures[name]} times in a row; its basis is unchanged{reason}"
            ) from failure.cause
