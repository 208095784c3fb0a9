"""Subnormal gradients, divisors of 0 and another default dtype: finite gradients give finite weights, and no result depends on the
default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace_opt import SubspaceOptimizer, linalg, load_spec
from tests.common import LINEAR, PRESETS, parameters, same, small, snapshot, train

SHAPES = {"one": (1, 1), "row": (1, 3), "square": (2, 2), "tall": (7, 3), "wide": (3, 7)}
SIZES = [1e-45, 1e-42, 1e-38, 1e-30, 1e-20, 1.0, 1e20, 3e38]


def guards(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The dotted path of every eps in a spec's pipelines."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if key in ("eps", "norm_eps"):
            yield ".".join((*path, key))
        yield from guards(inner, (*path, str(key)))


@pytest.mark.all_presets
@pytest.mark.parametrize("eps", ["as published", "0"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_finite_gradient_leaves_finite_weights(preset: str, eps: str) -> None:
    spec, wrong = small(preset, 3, every=2), []
    if eps == "0":
        spec = load_spec(spec, dict.fromkeys(guards(spec.model_dump(mode="json")["pipelines"]), 0.0))
    for size in SIZES:
        params = parameters(SHAPES)
        opt = SubspaceOptimizer(params.items(), spec, modules=dict.fromkeys(params, LINEAR), lr=1e-3)
        for step in range(3):
            signs = torch.Generator().manual_seed(step)
            for p in params.values():
                p.grad = torch.randn(p.shape, generator=signs).sign() * size
            opt.step()
        kept = snapshot(opt, params)
        wrong += [f"gradient {size:g}: {key}" for key, v in kept.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    assert not wrong, wrong


def test_a_ratio_is_0_where_it_would_overflow() -> None:
    sizes = torch.tensor([0.0, 1e-42, 2.0, float("inf")])
    assert linalg.ratio(4.0, sizes, 0.0).tolist() == [0.0, 0.0, 2.0, 0.0]
    assert linalg.ratio(torch.full((4,), 4.0), sizes, 0.0).tolist() == [0.0, 0.0, 2.0, 0.0]
    assert bool(linalg.ratio(4.0, sizes, 1e-30).isfinite().all())
    x = torch.tensor([1.0, -1.0, 3.0, 1.0, float("nan")])
    assert linalg.quotient(x, torch.tensor([0.0, 1e-45, 2.0, float("inf"), 1.0]))[:4].tolist() == [0.0, 0.0, 1.5, 0.0]
    assert bool(linalg.quotient(x, torch.ones(5))[4].isnan())


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("preset", PRESETS)
def test_the_default_dtype_changes_no_bit(preset: str) -> None:
    runs: list[dict[str, Tensor]] = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        params = parameters({"tall": (9, 6), "wide": (6, 9), "square": (7, 7), "vector": (5,)})
        opt = SubspaceOptimizer(params.items(), small(preset, 3, every=2), modules=dict.fromkeys(params, LINEAR), rounding="stochastic")
        train(opt, params, range(5))
        runs.append(snapshot(opt, params))
    assert all(same(runs[0], other) for other in runs[1:])


@pytest.mark.parametrize("restart", [None, 0.0])
def test_a_norm_limiter_comes_back_after_gradients_of_nearly_0(restart: float | None) -> None:
    """apollo-mini after three gradients of 1e-10: with a restart the weight moves at once, and without one it does not move within 60
    steps.
    """
    spec = small("apollo-mini", 1)
    spec = spec if restart is None else load_spec(spec, {"matrix.complement.3.restart": restart})
    params = parameters({"w": (8, 6)})
    opt = SubspaceOptimizer(params.items(), spec, modules={"w": LINEAR}, lr=1e-2, weight_decay=0.0)
    start = params["w"].detach().clone()
    for step in range(63):
        draws = torch.Generator().manual_seed(step)
        params["w"].grad = torch.randn(8, 6, generator=draws) * (1e-10 if step < 3 else 1.0)
        opt.step()
    moved = float((params["w"].detach() - start).norm())
    assert moved > 1e-2 if restart is None else moved < 1e-4


def test_a_norm_limiter_stops_a_spike() -> None:
    """A signal 1e8 times the previous one passes with a growth of gamma only."""
    params = parameters({"w": (8, 6)})
    spec = {"pipelines": {"all": {"complement": [{"kind": "norm_growth", "gamma": 1.5}]}}, "routes": [{"use": "all"}]}
    opt = SubspaceOptimizer(params.items(), spec, lr=1.0, weight_decay=0.0)
    moved = []
    for size in (1.0, 1e8, 1e8):
        before = params["w"].detach().clone()
        params["w"].grad = torch.ones(8, 6) * size
        opt.step()
        moved.append(float((params["w"].detach() - before).abs().mean()))
    assert moved == pytest.approx([1.0, 1.5, 2.25], rel=1e-5)
