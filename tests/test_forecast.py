"""Are the planned temporaries the measured ones? Does a budget give a spec that keeps it? Are parameters found in files and functions?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import give, optimizer, parameters, small
from selection import covering
from torch import nn

from subspace_opt import Entry, build, load_spec, make_plan
from subspace_opt.engine.work import Options
from subspace_opt.forecast import Budget, BudgetError, ModelError, costs_of, entries_of, find_parameters, fit
from subspace_opt.forecast.rehearsal import rehearse
from subspace_opt.lab.run.measure import peak_temporaries
from subspace_opt.spec import parse_spec

SIDE = 64
WITHIN = 1.35  # the planned peak and the measured one differ by at most this factor
TOGETHER: dict[str, Any] = {"stacking": "always", "batch_bytes": 3 * 4 * SIDE * 2 * SIDE}


@pytest.mark.parametrize("preset", sorted(covering()))
def test_planned_temporaries_are_the_measured_ones(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step without a refresh and in one with it. Newton-Schulz then computes in one dtype on both devices."""
    monkeypatch.setattr("subspace_opt.linalg.polar.cpu_has_bfloat16", lambda: True)
    params = parameters({**{f"w{i}": (SIDE, 2 * SIDE) for i in range(4)}, "u": (SIDE, SIDE)})
    opt = optimizer(small(preset, rank=16, every=5), params, nonfinite="propagate", **TOGETHER)
    for step in range(3):
        give(params, step)
        if step < 2:
            opt.step()
    peaks = rehearse(opt.plan.rows, Options(**TOGETHER))
    measured = peak_temporaries(opt.step, torch.device("cpu"))
    opt.refresh_bases()
    at_refresh = peak_temporaries(opt.step, torch.device("cpu"))
    for planned, found in ((peaks.at_step, measured), (peaks.at_refresh, at_refresh)):
        assert found / WITHIN <= planned + 64 <= found * WITHIN + 128, (planned, found)
