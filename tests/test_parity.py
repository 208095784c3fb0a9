"""Every preset follows trajectories of its authors' code in float64, and deliberate mistakes leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import subspace_opt
from subspace_opt import SubspaceOptimizer
from subspace_opt.testing.trajectories.cases import CASES
from subspace_opt.testing.trajectories.golden import Golden, replay

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", CASES)
def test_preset_reproduces_the_authors_code(name: str) -> None:
    case, golden = CASES[name], Golden(GOLDEN / f"{name}.npz")
    errors = replay(golden, case.make, exclude=tuple(case.left_out), rounded=bool(case.rounded))
    assert max(errors.values(), default=0.0) <= golden.tolerance, errors


# ------------------------------------------------------------------------------------------------------------- deliberate mistakes

POLAR = {"kind": "orthogonalize", "steps": 5, "coefficients": "quintic", "eps": 1e-15, "eps_floor": True}
SCALED_FIRST = [POLAR, {"kind": "scale", "by": "moonshot", "factor": 0.2}, {"kind": "subset_norm", "of": "signal", "subsets": "entries"}]
SCALED_FIRST[-1] |= {"beta2": 0.9, "eps": 1e-8}

# mistake -> (file, overrides for every group that has the pipeline)
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
    "epsilon after bias correction": (
        "adamw_torch",
        "all",
        {"all.complement.debias": False, "all.finish": {"kind": "debias", "beta1": 0.9, "beta2": 0.95}},
    ),
    "Nesterov left out": ("muon_kj_wd", "matrix", {"matrix.momentum.nesterov": False}),
    "decay after the update, radial brake": ("muon_radial_brake_nemo", "matrix", {"matrix.decay": "after"}),
    "no decay, radial brake": ("muon_radial_brake_nemo", "matrix", {"matrix.decay_scale": 0.0}),
    "inward and outward exchanged": ("muon_radial_brake_nemo", "matrix", {"matrix.apply.outward": 1.0, "matrix.apply.inward": 0.5}),
    "another radius": ("muon_hyperball_nemo", "matrix", {"matrix.apply.radius": 4.001}),
    "no retraction": ("spel_nemo", "matrix", {"matrix.apply": None}),
    "retraction with other polynomials": ("spel_nemo", "matrix", {"matrix.apply.by.coefficients": "keller"}),
    "statistic along the wrong side": ("normuon_nemo", "matrix", {"matrix.complement.1.subsets": "rows"}),
    "statistic of the gradient": ("normuon_nemo", "matrix", {"matrix.complement.1.of": "gradient"}),
    "mean over the other side": ("normuon_dion_cautious", "matrix", {"matrix.complement.1.subsets": "lines"}),
    "plain decay for cautious": ("normuon_dion_cautious", "matrix", {"matrix.apply": None}),
    "norm not restored": ("normuon_nemo", "matrix", {"matrix.complement.1.keep_norm": False}),
    "norm restored": ("adamuon_nemo", "matrix", {"matrix.complement.1.keep_norm": True}),
    "scale before the statistic": ("adamuon_nemo", "matrix", {"matrix.complement": SCALED_FIRST, "matrix.finish": "none"}),
    "statistic of the polar factor": ("namo_nemo", "matrix", {"matrix.complement.1.of": "signal"}),
    "mean for sum": ("namo_nemo", "matrix", {"matrix.complement.1.reduce": "mean"}),
    "scale without the nuclear norm": ("polargrad_nemo", "matrix", {"matrix.complement.norm": "none"}),
    "Frobenius for nuclear norm": ("mop_nemo", "matrix", {"matrix.complement.norm": "signal"}),
    "l2 for l1": ("dion2", "matrix", {"matrix.selector.ranking": "l2"}),
    "lines of the longer side": ("dion2", "matrix", {"matrix.orient": "long"}),
    "all of the momentum decays": ("dion2", "matrix", {"matrix.feedback": 0.8}),
    "Polar Express without its margin": ("dion2", "matrix", {"matrix.inside.margin": 1.0}),
    "covariances of the gradient": ("kl_soap_eigh_nemo", "matrix", {"matrix.selector.covariance": "gradient"}),
    "covariance that whitens by larger eigenvalues": ("kl_soap_eigh_nemo", "matrix", {"matrix.selector.floor": 1e-2}),
    "basis refreshed every second step, KL": ("kl_soap_qr_nemo", "matrix", {"matrix.selector.every": 2}),
    "fixed decay for 1 - t^-0.8": ("adafactor_hf", "all", {"all.complement.0.beta2": 0.9}),
    "a second moment for rows alone": ("adafactor_hf", "all", {"all.complement.0": {"kind": "subset_norm", "subsets": "rows"}}),
    "clip left out": ("adafactor_hf", "all", {"all.complement.1.limit": 1e9}),
    "heavy ball for EMA under a floor": ("muon_kj_wd", "matrix", {"matrix.complement.eps": 1e-2}),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_seen(what: str) -> None:
    """Each mistake alone moves the trajectory beyond the tolerance of the right spec."""
    name, pipeline, overrides = MISTAKES[what]
    case, golden = CASES[name], Golden(GOLDEN / f"{name}.npz")

    def mistaken(golden: Golden, params: dict[str, torch.nn.Parameter]) -> SubspaceOptimizer:
        optimizer = case.make(golden, params)
        for group in optimizer.param_groups:
            if group["use"] in (pipeline, None):
                group["spec"] = subspace_opt.load_spec(optimizer.spec_of(group), overrides).to_json()
        return optimizer

    assert max(replay(golden, mistaken, exclude=tuple(case.left_out), rounded=bool(case.rounded)).values()) > 10 * golden.tolerance
