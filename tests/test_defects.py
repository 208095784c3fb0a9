"""The parity tests leave out parameters in which the reference has a defect. With that defect alone added, these parameters agree too.

So the difference between a preset and its authors' code is the named one. The defects are rules and selectors of this file; none of them is
in the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import subspace_opt
from subspace_opt import Change, Dim, Rule, Slot, State, Step, SubspaceOptimizer, linalg
from subspace_opt.algebra import Order
from subspace_opt.registry import Component, unregister
from subspace_opt.rules.adaptive import Adam
from subspace_opt.selectors.kron_eigen import KronEigen
from subspace_opt.testing.trajectories.cases import CASES, DISCARDED, GAIN, ONE_SHOT, STALE, UNSORTED
from subspace_opt.testing.trajectories.golden import Golden, replay

GOLDEN = Path(__file__).parent / "golden"


class ForgottenMomentum(Rule):
    """`X / c(t)`: the raw gradient scaled by the weights of a momentum that is updated and never read (COSMOS without Nesterov)."""

    kind: Literal["forgotten_momentum"] = "forgotten_momentum"
    beta: float

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x / ((1 - self.beta**step.t) / (1 - self.beta)), {}


class GainedAdam(Rule):
    """Adam whose first moment takes 0.1 of the gradient and is corrected for beta1 = 0.9, also if beta1 is another number (COSMOS, for
    vectors).
    """

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


class StaleEma(Rule):
    """An average whose buffer is replaced by zeros at a refresh, while that update still uses the old one (Subspace-Momentum).

    So the old coordinates are read in the new basis once more, and the gradient of that update is lost to later ones.
    """

    kind: Literal["stale_ema"] = "stale_ema"
    beta: float

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"exp_avg": Slot((rows, cols), "keep")}

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        m = state["exp_avg"].lerp(x, 1 - self.beta)
        return m, {"exp_avg": torch.zeros_like(m) if step.refresh and not step.first else m}


class OneShotAdam(Adam):
    """Adam that carries its first moment into the new basis for the update of a refresh only, and keeps the old one (GoLore)."""

    kind: Literal["one_shot_adam"] = "one_shot_adam"  # type: ignore[assignment]

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        slot = Slot((rows, cols), "keep")
        return {"exp_avg": slot, "exp_avg_sq": slot, "carried": slot}

    def transport(self, state: State, slots: dict[str, Slot], change: Change, step: Step) -> State:
        projected = Slot(slots["exp_avg"].dims, "project")
        return {**state, "carried": change.carry(state["exp_avg"], projected)}

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        carrying = step.refresh and not step.first
        used = {**state, "exp_avg": state["carried"]} if carrying else state
        out, new = super().apply(x, grad, used, step)
        return out, {**new, "exp_avg": state["exp_avg"] if carrying else new["exp_avg"], "carried": state["carried"]}


class UnsortedMoments(KronEigen):
    """Sorts columns by their eigenvalues after the QR, but not their second moments (Emerging-Optimizers' SOAP)."""

    kind: Literal["unsorted_moments"] = "unsorted_moments"  # type: ignore[assignment]

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        new, _ = super().refresh(x, state, step)
        for mode in self.modes(step.rows, step.cols):
            key = f"{mode.name}.basis"
            if not step.first:
                p, q = new[f"{mode.name}.covariance"], new[key]
                order = (q * linalg.mm(p, q)).sum(-2).argsort(dim=-1, descending=True)
                new[key] = q.gather(-1, order.unsqueeze(-2).expand_as(q))
        return new, None


@pytest.fixture(autouse=True)
def _kinds() -> Iterator[None]:
    kinds: list[type[Component]] = [ForgottenMomentum, GainedAdam, StaleEma, OneShotAdam, UnsortedMoments]
    for cls in kinds:
        subspace_opt.register(cls)
    yield
    for cls in kinds:
        unregister(cls)


def _defect(golden: Golden, pipelines: dict[str, Any]) -> dict[str, Any]:
    """The overrides that put the file's defects into a spec with these pipelines."""
    defects = set(CASES[golden.meta["id"]].left_out.values())
    options = golden.meta["optimizer_kwargs"]
    out: dict[str, Any] = {}
    if defects & {GAIN, DISCARDED}:  # the other branch of the reference has its defect in every file
        b1, b2 = options["betas"]
        out["other.complement"] = {"kind": "gained_adam", "beta1": b1, "beta2": b2}
    if DISCARDED in defects:
        out["matrix.momentum"] = {"kind": "forgotten_momentum", "beta": options["betas"][0]}
    if STALE in defects:
        out["matrix.inside"] = {"kind": "stale_ema", "beta": options["betas"][0]}
    if ONE_SHOT in defects:
        (adam,) = pipelines["matrix"].inside
        kept = adam.model_dump(include={"beta1", "beta2", "eps", "debias"})
        out["matrix.inside"] = {"kind": "one_shot_adam", **kept}
    if UNSORTED in defects:
        out["matrix.selector"] = {**pipelines["matrix"].selector.model_dump(), "kind": "unsorted_moments"}
    return out


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.left_out])
def test_a_file_differs_by_the_named_defect_and_nothing_else(name: str) -> None:
    case, golden = CASES[name], Golden(GOLDEN / f"{name}.npz")

    def defective(golden: Golden, params: dict[str, nn.Parameter]) -> SubspaceOptimizer:
        optimizer = case.make(golden, params)
        for group in optimizer.param_groups:
            spec = optimizer.spec_of(group)
            group["spec"] = subspace_opt.load_spec(spec, _defect(golden, dict(spec.pipelines))).to_json()
        return optimizer

    assert max(replay(golden, defective).values()) <= golden.tolerance
    # Without the defect, each of these parameters disagrees.
    errors = replay(golden, case.make)
    assert all(errors[parameter] > 100 * golden.tolerance for parameter in case.left_out), errors


def test_every_defect_is_one_that_is_written_here() -> None:
    named = {why for case in CASES.values() for why in case.left_out.values()}
    assert named == {GAIN, DISCARDED, STALE, ONE_SHOT, UNSORTED}
