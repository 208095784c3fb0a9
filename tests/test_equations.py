"""Presets that no authors' trajectory covers follow their equations, written out here by other algorithms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace_opt import SubspaceOptimizer, load_spec
from subspace_opt.linalg import polar
from tests.common import parameters

SHAPES = {"tall": (9, 5), "wide": (5, 8), "square": (6, 6)}
LR, DECAY, UPDATES = 0.02, 0.1, 7
State = dict[str, Tensor]


def polynomials_of_singular_values(x: Tensor, name: str, steps: int, margin: float, eps: float) -> Tensor:
    """Newton-Schulz by an SVD: the polynomials act on the singular values alone."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (margin * s.norm() + eps)
    for a, b, c in polar.schedule(name, steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


def nordion2(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    rows, cols = w.shape
    m = state["m"] = state.get("m", torch.zeros_like(w)) + g
    v = state["v"] = state.get("v", torch.zeros(rows, dtype=w.dtype)).clone()
    taken = m.abs().sum(1).argsort(descending=True)[: math.floor(rows / 4 + 0.5)]
    o = polynomials_of_singular_values(m[taken], "dion", 5, 1.02, 1e-8)
    m[taken] *= 0.95
    v[taken] = 0.95 * v[taken] + 0.05 * o.square().mean(1)
    q = o / (v[taken].sqrt() + 1e-8).unsqueeze(1)
    w = w * (1 - LR * DECAY)
    w[taken] -= LR * math.sqrt(rows / cols) * q * (o.norm() / q.norm())
    return w


def root(p: Tensor) -> Tensor:
    """The square root by the iteration of Denman and Beavers."""
    y, z = p, torch.eye(len(p), dtype=p.dtype)
    for _ in range(60):
        y, z = (y + z.inverse()) / 2, (z + y.inverse()) / 2
    return y


def shampoo(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    m = state["m"] = 0.9 * state.get("m", torch.zeros_like(w)) + 0.1 * g
    update = m / (1 - 0.9**t)
    for side, p in (("left", g @ g.T), ("right", g.T @ g)):
        p = state[side] = 0.95 * state.get(side, torch.zeros_like(p)) + 0.05 * p
        if t % 3 == 1:
            p = p / (1 - 0.95**t)
            state[f"{side} root"] = root(root(p + 1e-3 * torch.linalg.matrix_norm(p, 2) * torch.eye(len(p), dtype=p.dtype))).inverse()
        update = state[f"{side} root"] @ update if side == "left" else update @ state[f"{side} root"]
    return w * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(w.numel()) * update / update.norm()


def muon_deepseek(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    m = state["m"] = 0.95 * state.get("m", torch.zeros_like(w)) + 0.05 * g
    x = 0.95 * m + 0.05 * g
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for i in range(10):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5 if i < 8 else 2 * s - 1.5 * s**3 + 0.5 * s**5
    return w * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(max(w.shape)) * (u * s) @ vh


def lion(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    m = state.get("m", torch.zeros_like(w))
    state["m"] = 0.99 * m + 0.01 * g
    return w * (1 - LR * DECAY) - LR * (0.9 * m + 0.1 * g).sign()


def adam_hyperball(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    radius = state.setdefault("radius", w.norm())
    m = state["m"] = 0.9 * state.get("m", torch.zeros_like(w)) + 0.1 * g
    v = state["v"] = 0.95 * state.get("v", torch.zeros_like(w)) + 0.05 * g**2
    update = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    w = w * (1 - LR * DECAY) - LR * radius * update / update.norm()
    return w * radius / w.norm()


def cosmos_normuon(w: Tensor, g: Tensor, state: State, t: int) -> Tensor:
    beta, rank = 0.95, 3
    m = state["m"] = beta * state.get("m", torch.zeros_like(w)) + g
    x = (g + beta * m) / (1 + beta * sum(beta**k for k in range(t)))
    if t == 1:
        u, s = torch.linalg.svd(g, full_matrices=False)[2][:rank].T, torch.zeros(rank, rank, dtype=w.dtype)
    else:
        before, s = state["u"], state["s"]
        u = gram_schmidt((1 - beta) * g.T @ (g @ before) + beta * before @ s)
        s = (before.T @ u).T @ s @ (before.T @ u)
    c, v = g @ u, state.get("v", torch.zeros(len(w), rank, dtype=w.dtype))
    state["u"], state["s"] = u, beta * s + (1 - beta) * c.T @ c
    state["v"] = v = 0.95 * v + 0.05 * c**2
    inside = (x @ u) / ((v / (1 - 0.95**t)).sqrt() + 1e-8) @ u.T
    o = polynomials_of_singular_values(x - x @ u @ u.T, "keller", 5, 1.0, 1e-7)
    o = o * math.sqrt(w.numel()) / o.norm()
    axis = 1 if w.size(0) >= w.size(1) else 0
    state["rows"] = rows = 0.95 * state.get("rows", torch.zeros(max(w.shape), dtype=w.dtype)) + 0.05 * o.square().mean(axis)
    q = o / rows.clamp_min(1e-8).sqrt().unsqueeze(axis)
    update = inside + 0.2 * q * o.norm() / q.norm()
    return w * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(w.numel()) * update / update.norm()


def gram_schmidt(y: Tensor) -> Tensor:
    """The columns of `y`, each without its part along those before it, brought to length 1; twice, against round-off."""
    for _ in range(2):
        columns: list[Tensor] = []
        for column in y.T:
            rest = column - sum((before * (before @ column) for before in columns), torch.zeros_like(column))
            columns.append(rest / rest.norm())
        y = torch.stack(columns, dim=1)
    return y


METHODS: dict[str, tuple[Callable[[Tensor, Tensor, State, int], Tensor], dict[str, Any]]] = {
    "nordion2": (nordion2, {}),
    "shampoo": (shampoo, {"matrix.complement.every": 3, "matrix.complement.eps": 1e-3}),
    "muon-deepseek": (muon_deepseek, {}),
    "lion": (lion, {}),
    "adam-hyperball": (adam_hyperball, {}),
    "cosmos-normuon": (cosmos_normuon, {"matrix.selector.rank": 3}),
}


@pytest.mark.parametrize("preset", METHODS)
def test_a_preset_follows_its_equations(preset: str) -> None:
    equations, overrides = METHODS[preset]
    own = parameters(SHAPES, torch.float64)
    weights = {name: p.detach().clone() for name, p in own.items()}
    states: dict[str, State] = {name: {} for name in own}
    spec = load_spec(preset, overrides)
    group = {"params": list(own.items()), "use": next(iter(spec.pipelines))}
    optimizer = SubspaceOptimizer([group], spec, lr=LR, weight_decay=DECAY)
    draws = torch.Generator().manual_seed(5)
    for t in range(1, UPDATES + 1):
        for name, p in own.items():
            p.grad = torch.randn(p.shape, generator=draws, dtype=p.dtype)
            weights[name] = equations(weights[name], p.grad, states[name], t)
        optimizer.step()
    far = {name: float((p.detach() - weights[name]).norm() / weights[name].norm()) for name, p in own.items()}
    assert max(far.values()) < 1e-9, far


@pytest.mark.parametrize(("schedule", "low", "high"), [("deepseek", 0.99, 1.01), ("keller", 0.6, 1.25)])
def test_ten_steps_of_the_schedule_end_at_1(schedule: str, low: float, high: float) -> None:
    s = torch.linspace(0.01, 1.0, 1000, dtype=torch.float64)
    for a, b, c in polar.schedule(schedule, 10):
        s = a * s + b * s**3 + c * s**5
    assert low < s.min()
    assert s.max() < high
    assert schedule == "deepseek" or s.min() < 0.8
