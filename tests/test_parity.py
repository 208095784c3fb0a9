"""Every preset against trajectories of its authors' own code, in float64; and deliberate mistakes, which must be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import subspace_opt
from subspace_opt import Dim, Slot, State, Step, SubspaceOptimizer
from subspace_opt.registry import unregister
from subspace_opt.testing.cases import CASES, cosmos
from subspace_opt.testing.golden import Golden, replay

GOLDEN = Path(__file__).parent / "golden"

@pytest.mark.parametrize("name", CASES)
def test_preset_reproduces_the_authors_code(name: str) -> None:
    case, golden = CASES[name], Golden(GOLDEN / f"{name}.npz")
    errors = replay(golden, case.make, exclude=tuple(case.left_out))
    assert max(errors.values(), default=0.0) <= golden.tolerance, errors


# ------------------------------------------------------------------------------------------------------------- deliberate mistakes

# What -> (file, overrides for every group that has the pipeline)
MISTAKES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "epsilon inside the root": ("cosmos_nesterov_wd", "matrix", {"matrix.inside.eps_inside": True}),
    "no bias correction": ("cosmos_nesterov_wd", "matrix", {"matrix.inside.debias": False}),
    "EMA for heavy ball without debias": ("cosmos_nesterov_wd", "matrix", {"matrix.momentum.debias": False}),
    "basis on the other side": ("cosmos_nesterov_wd", "matrix", {"matrix.orient": "left"}),
    "basis refreshed every second step": ("cosmos_nesterov_wd", "matrix", {"matrix.selector.every": 2}),
    "decay after the update": ("cosmos_nesterov_wd", "matrix", {"matrix.decay": "after"}),
    "refresh off by one": ("galore_std_wd", "matrix", {"matrix.selector.offset": 1}),
    "decay before the update": ("galore_std_wd", "matrix", {"matrix.decay": "before"}),
    "moments rotated at a refresh": ("galore_std_wd", "matrix", {"matrix.inside.on_refresh": "project"}),
    "moments reset at a refresh": ("galore_std_wd", "matrix", {"matrix.inside.on_refresh": "reset"}),
    "epsilon after bias correction": ("adamw_torch", "all", {"all.complement.debias": False, "all.finish": {"kind": "debias", "beta1": 0.9, "beta2": 0.95}}),
    "Nesterov left out": ("muon_kj_wd", "matrix", {"matrix.momentum.nesterov": False}),
    "heavy ball for EMA under a floor": ("muon_kj_wd", "matrix", {"matrix.complement.eps": 1e-2}),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_seen(what: str) -> None:
    """Each mistake alone moves the trajectory beyond the tolerance that the right spec keeps."""
    name, pipeline, overrides = MISTAKES[what]
    case, golden = CASES[name], Golden(GOLDEN / f"{name}.npz")

    def mistaken(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
        optimizer = case.make(golden, params)
        for group in optimizer.param_groups:
            if group["use"] in (pipeline, None):
                group["spec"] = subspace_opt.load_spec(optimizer.spec_of(group), overrides).to_json()
        return optimizer

    assert max(replay(golden, mistaken, exclude=tuple(case.left_out)).values()) > 10 * golden.tolerance


# ------------------------------------------------------------------------------------------------------- defects of the authors' code


def test_cosmos_files_differ_by_the_named_defects_and_nothing_else() -> None:
    """With each defect written as a rule of this test's own, the parameters left out above agree as well."""

    @subspace_opt.register
    class ForgottenMomentum(subspace_opt.Rule):
        """`X / c(t)`: the raw gradient scaled by the weights of a momentum that is never read."""

        kind: Literal["forgotten_momentum"] = "forgotten_momentum"
        beta: float

        def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
            return x / ((1 - self.beta**step.t) / (1 - self.beta)), {}

    @subspace_opt.register
    class GainedAdam(subspace_opt.Rule):
        """Adam whose first moment takes 0.1 of the gradient and is corrected for 0.9, whatever beta1."""

        kind: Literal["gained_adam"] = "gained_adam"
        beta1: float
        beta2: float

        def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
            return {"exp_avg": Slot((rows, cols)), "exp_avg_sq": Slot((rows, cols))}

        def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
            m = self.beta1 * state["exp_avg"] + 0.1 * x
            v = self.beta2 * state["exp_avg_sq"] + (1 - self.beta2) * x * x
            update = m / (1 - 0.9**step.t) / ((v / (1 - self.beta2**step.t)).sqrt() + 1e-8)
            return update, {"exp_avg": m, "exp_avg_sq": v}

    try:
        for name, case in CASES.items():
            if case.make is not cosmos or not case.left_out:
                continue
            golden = Golden(GOLDEN / f"{name}.npz")
            b1, b2 = golden.meta["optimizer_kwargs"]["betas"]
            nesterov = golden.meta["optimizer_kwargs"]["nestrov"]

            def defective(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
                optimizer = cosmos(golden, params)
                for group in optimizer.param_groups:
                    overrides: dict[str, Any] = {"other.complement": {"kind": "gained_adam", "beta1": b1, "beta2": b2}}
                    if not nesterov:
                        overrides["matrix.momentum"] = {"kind": "forgotten_momentum", "beta": b1}
                    group["spec"] = subspace_opt.load_spec(optimizer.spec_of(group), overrides).to_json()
                return optimizer

            errors = replay(golden, defective)
            assert max(errors.values()) <= golden.tolerance, (name, errors)
    finally:
        unregister(ForgottenMomentum)
        unregister(GainedAdam)
