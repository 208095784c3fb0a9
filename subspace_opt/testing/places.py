"""The smallest pipelines in which a component can be tested."""

from __future__ import annotations

from typing import Any, get_args

import torch
from pydantic import ValidationError

from ..algebra import Basis, Coords, Dim, Rule, Selector, Step, Transport, WeightRule, project
from ..algebra.pipeline import SAMPLE, Pipeline
from .subject import SMALL, Testable

SUBSPACE = {"kind": "svd", **SMALL}


def places(component: Testable) -> dict[str, Pipeline]:
    """Pipelines with the component in each place that it can take, by the name of the place in messages."""
    if isinstance(component, WeightRule):
        return _before_weight_rule(component)
    return _around_rule(component) if isinstance(component, Rule) else _around_selector(component)


# ------------------------------------------------------------------------------------------------------------------- rules


def _around_rule(rule: Rule) -> dict[str, Pipeline]:
    """Pipelines for a rule: without a selector, and inside subspaces. A rule that needs a subspace, or makes no update, is a complement."""
    traits = rule.traits(*SAMPLE)
    if traits.silent or traits.takes_whole or _needs_subspace(rule):
        return {"complement of svd": _pipeline(selector=SUBSPACE, inside="adam", complement=rule)}
    found = {"complement": _pipeline(complement=rule)}
    for name, variant in _transported(rule).items():
        found[name] = _pipeline(selector=SUBSPACE, inside=variant, complement="sgd")
    found["inside eigen"] = _pipeline(selector={"kind": "eigen", "rank": SMALL["rank"]}, inside=rule, complement="sgd")
    return found


def _transported(rule: Rule) -> dict[str, Rule]:
    """The rule inside a subspace, once for each `on_refresh` that it accepts."""
    if "on_refresh" not in type(rule).model_fields:
        return {"inside svd": rule}
    found = {}
    for value in get_args(Transport):
        try:
            variant = type(rule).model_validate({**dict(rule), "on_refresh": value})
        except ValidationError:
            continue
        found[f"inside svd, on_refresh {value}"] = variant
    return found


def _needs_subspace(rule: Rule) -> bool:
    """True if the rule raises without a subspace and works beside one."""
    return not _applies(rule, beside=False) and _applies(rule, beside=True)


def _applies(rule: Rule, *, beside: bool) -> bool:
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(1, 5, 4)
    rows, cols = Dim("rows", 5), Dim("cols", 4)
    one = torch.ones((), dtype=torch.float64)
    step = Step(t=one, age=one, first=True, refresh=True, rows=rows, cols=cols)
    if beside:
        basis = Basis(right=torch.eye(4, 2, dtype=x.dtype)[None])
        c = project(x, basis)
        step = step._replace(inside=Coords(c, c, c), whole=x, basis=basis)
    try:
        state = {name: x.new_zeros(1, *slot.shape, dtype=slot.dtype) for name, slot in rule.slots(rows, cols).items()}
        rule.apply(x, x, state, step)
    except Exception:  # the rule may raise anything; the checks report it
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- selectors


def _around_selector(selector: Selector) -> dict[str, Pipeline]:
    """Pipelines for a selector: around Adam with SGD as the complement, and around a momentum with feedback."""
    sides = selector.coords(Dim("rows", 6), Dim("cols", 4))
    if not sides[0].size * sides[1].size:
        return {"selector of nothing": _pipeline(selector=selector, complement="sgd")}
    if not selector.traits().orthonormal:
        return {"selector around adam": _pipeline(selector=selector, inside="adam")}
    carried = "project" if selector.traits().keeps_basis else "keep"
    return {
        "selector around adam": _pipeline(selector=selector, inside="adam", complement="sgd"),
        "selector with feedback": _pipeline(selector=selector, inside={"kind": "heavy_ball", "on_refresh": carried}, feedback=0.9),
    }


# ------------------------------------------------------------------------------------------------------------ weight rules


def _before_weight_rule(rule: WeightRule) -> dict[str, Pipeline]:
    """Pipelines whose updates the rule applies: plain and orthogonal ones, and those of a subspace."""
    return {
        "apply after sgd": _pipeline(complement="sgd", apply=rule),
        "apply after muon": _pipeline(momentum="ema", complement="muon", apply=rule),
        "apply after svd": _pipeline(selector=SUBSPACE, inside="adam", complement="sgd", apply=rule),
    }


def _pipeline(**parts: Any) -> Pipeline:
    if "selector" in parts:
        parts["orient"] = "short"
    return Pipeline.model_validate(parts)
