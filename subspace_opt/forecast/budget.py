"""Budgets of memory: `24GiB` for training without activations, `0.4x` for a multiple of AdamW's state, or a size for the state alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*$", re.IGNORECASE)
SHARE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*x\s*$", re.IGNORECASE)


class BudgetError(ValueError):
    """A budget is malformed, or nothing fits into it."""


@dataclass(frozen=True)
class Budget:
    """Upper bounds in bytes, each None if there is none.

    `training`: weights, gradients, state, tables and temporaries. `state`: state and tables. `share`: these as a multiple of AdamW's state.
    """

    training: int | None = None
    state: int | None = None
    share: float | None = None

    @classmethod
    def read(cls, training: str | None, state: str | None) -> Budget:
        """The budget of the options `--fit` and `--fit-state`.

        Raises:
            BudgetError: A text is neither a size nor, for `--fit`, a multiple such as 0.4x.
        """
        share = SHARE.match(training or "")
        if share and float(share[1]) <= 0:
            raise BudgetError(f"--fit '{training}': the multiple of AdamW's state must be above 0, for example 0.4x")
        return cls(
            training=None if training is None or share else _size(training, "--fit", ", or a multiple of AdamW's state, for example 0.4x"),
            state=None if state is None else _size(state, "--fit-state", ""),
            share=float(share[1]) if share else None,
        )

    def state_bound(self, adamw_bytes: int) -> int | None:
        """The bound for state and tables."""
        bounds = [self.state, None if self.share is None else int(self.share * adamw_bytes)]
        return min((bound for bound in bounds if bound is not None), default=None)


def _size(text: str, option: str, other: str) -> int:
    found = SIZE.match(text)
    unit = found[2].upper() if found else "?"
    if found is None or unit not in UNITS or not (number := float(found[1]) * UNITS[unit]) or (not unit and number < 2**20):
        raise BudgetError(f"{option} '{text}': give a size with its unit, for example 24GiB or 800MiB{other}")
    return int(number)
