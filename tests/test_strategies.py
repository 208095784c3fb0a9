"""Every strategy of the engine equals the plain frame: preset x strategy x shape x dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from subspace_opt import SubspaceOptimizer, load_spec
from tests.common import LINEAR, PRESETS, Params, copied, give, parameters, small
from tests.plain import Plain

SHAPES = {
    "tall": (9, 6),
    "tall2": (9, 6),
    "wide": (6, 9),
    "square": (7, 7),
    "row": (1, 8),
    "vector": (5,),
    "conv": (4, 3, 2, 2),
    "experts": (3, 6, 5),
}
LR, DECAY, UPDATES = 3e-3, 0.1, 5


def passes(patch: pytest.MonkeyPatch) -> None:
    """Compute large matrices in runs of rows, and count 40 entries as large."""
    for name, entries in (("PASS", 40), ("ROWS", 20), ("LONG", 40)):
        patch.setattr(f"subspace_opt.engine.stacking.{name}", entries)


def no_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("subspace_opt.engine.fused.fits_kernel", lambda item: False)


def no_lifts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("subspace_opt.engine.weights._takes_lifts", lambda stack, update: False)


def unchanged(patch: pytest.MonkeyPatch) -> None:
    pass


STRATEGIES: dict[str, tuple[dict[str, Any], Callable[[pytest.MonkeyPatch], None]]] = {
    "as it is": ({}, unchanged),
    "all stacked": ({"stacking": "always"}, unchanged),
    "stacks of two": ({"stacking": "always", "batch_bytes": 1000}, unchanged),
    "one by one": ({"stacking": "never"}, unchanged),
    "lifts made whole": ({"stacking": "never"}, no_lifts),
    "rows in passes": ({"stacking": "never"}, passes),
    "without kernels": ({}, no_kernels),
}
# The largest difference of a weight, relative to its largest entry. In float32 a polar factor or a basis amplifies round-off.
LIMITS = {torch.float64: 1e-9, torch.float32: 4e-3, torch.bfloat16: 4e-2}


# Presets with rules in `apply` that no preset has: entries apart, a lift that must become dense, rows, norms of matrices.
APPLIED: dict[str, tuple[str, dict[str, Any]]] = {
    "cautious adamw": ("adamw", {"all.apply": "cautious"}),
    "cautious galore": ("galore", {"matrix.apply": "cautious", "matrix.decay": "before"}),
    "relative powerstep": ("powerstep", {"all.apply": ["decay", "relative"]}),
    "braked cosmos": ("cosmos", {"matrix.apply": "radial_brake"}),
    "coupled soap on a sphere": ("soap", {"matrix.apply": "hyperball", "matrix.decay": "coupled"}),
}


def trained(preset: str, own: Params, options: dict[str, Any]) -> SubspaceOptimizer:
    modules = {name: frozenset({"conv"}) if name == "conv" else LINEAR for name in own}
    name, overrides = APPLIED.get(preset, (preset, {}))
    spec = load_spec(small(name, 3, every=3), overrides)
    opt = SubspaceOptimizer(own.items(), spec, modules=modules, lr=LR, weight_decay=DECAY, **options)
    for step in range(UPDATES):
        give(own, step)
        opt.step()
    return opt


@pytest.mark.all_presets(dtype=[torch.float64])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("preset", [*PRESETS, *APPLIED])
def test_every_strategy_is_the_plain_frame(preset: str, dtype: torch.dtype) -> None:
    start = parameters(SHAPES, dtype)
    plain: Plain | None = None
    wrong = []
    for name, (options, prepare) in STRATEGIES.items():
        own = copied(start)
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch)
            opt = trained(preset, own, options)
        if plain is None:
            plain = Plain(opt.plan, start, LR, DECAY)
            for step in range(UPDATES):
                give(start, step)
                plain.step({key: p.grad for key, p in start.items() if p.grad is not None})
        for key, p in own.items():
            exact = plain.weights[key].double()
            far = float((p.detach().double() - exact).abs().max() / exact.abs().max())
            if not far <= LIMITS[dtype]:
                wrong.append(f"{name}: {key} is off by {far:.1e}")
    assert not wrong, "\n".join(wrong)


def test_the_reference_notices_an_error_of_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_opt.engine import weights

    own = weights._rates
    monkeypatch.setattr(weights, "_rates", lambda piece, factor=1.0: own(piece, factor * 1.001))
    with pytest.raises(AssertionError, match="lifts made whole: wide is off"):
        test_every_strategy_is_the_plain_frame("galore", torch.float64)
