"""A step that a CUDA graph can hold: the device counts, and a step without a refresh runs the same operations each time.

The capture itself is a test of `test_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from subspace_opt import NonFiniteGradient, SubspaceOptimizer
from subspace_opt.engine.flags import watch
from tests.common import PRESETS, differences, flat, give, optimizer, parameters, small, snapshot, train

SHAPES = {"tall": (7, 4), "mate": (7, 4), "wide": (4, 6), "bias": (4,)}
WAITING = {"kl-soap", "mop", "rekls", "shampoo", "soap-qr", "sumo", "sumo-paper"}  # every update of these waits
FIT = sorted(set(PRESETS) - WAITING)
QUICK = ["adamw", "muon", "cosmos", "galore", "soap", "adafactor", "frugal", "subspace-momentum"]
presets = pytest.mark.parametrize("preset", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in FIT])


class Operations(TorchDispatchMode):
    """The names of dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@presets
def test_counts_on_the_device_give_the_same_weights(preset: str) -> None:
    """Over refreshes too, and with counters where the parameters are. A step writes into the storage of the first."""
    ends = []
    for capturable in (False, True):
        params = parameters(SHAPES, torch.float64)
        opt = optimizer(small(preset, 3), params, capturable=capturable, weight_decay=0.1)
        storage: dict[str, int] = {}
        for step in range(5):
            give(params, step)
            opt.step()
            found = {key: value.data_ptr() for key, value in flat(opt)}
            assert storage in ({}, found)
            storage = found
        ends.append(snapshot(opt, params))
    assert max(differences(*ends).values()) < 1e-12


@presets
def test_steps_without_a_refresh_are_alike(preset: str) -> None:
    """On the meta device every read raises, and a device takes the same operations as long as no host decides."""
    params = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in {"matrix": (6, 4), "bias": (4,)}.items()}
    opt = optimizer(small(preset, 3, every=10**6), params, capturable=True)
    lists = []
    for step in range(4):
        for p in params.values():
            p.grad = torch.empty_like(p)
        with Operations() as seen:
            opt.step()
        assert "aten._local_scalar_dense.default" not in seen.seen or step < 2
        if step > 1:
            lists.append(seen.seen)
    assert lists[0] == lists[1] != []


def test_a_rate_in_a_tensor_is_not_read() -> None:
    """The learning rate on the meta device cannot be read at all; on a CPU a change of the tensor takes effect."""
    for preset in ("adamw", "muon", "galore", "muon-hyperball"):
        ends = []
        for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
            params = parameters(SHAPES, torch.float64)
            opt = optimizer(preset, params, lr=lr, capturable=isinstance(lr, Tensor), weight_decay=0.1)
            train(opt, params, range(2))
            if isinstance(lr, Tensor):
                lr.fill_(0.03)
            else:
                opt.param_groups[0]["lr"] = 0.03
            give(params, 2)
            with Operations() as seen:
                opt.step()
            reads = seen.seen.count("aten._local_scalar_dense.default")
            ends.append((snapshot(opt, params), reads))
        assert max(differences(ends[0][0], ends[1][0]).values()) < 1e-12
        assert ends[1][1] <= ends[0][1]


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("sumo", {}, "'tall' has pipeline 'matrix', which cannot be captured: rule 'orthogonalize' waits for the device at every update"),
        ("kl-soap", {}, "selector 'kron_eigen' refreshes at every update and waits"),
        ("muon", {"nonfinite": "skip"}, "capturable=True and nonfinite='skip'"),
        ("muon", {"rounding": "stochastic"}, "capturable=True and rounding='stochastic'"),
        (
            "muon",
            {"overrides": {"matrix.lr_scale": {"schedule": "linear", "from": 1.0, "to": 0.5, "over": 9}}},
            "keep one value of 'lr_scale', which follows a schedule",
        ),
    ],
)
def test_what_no_graph_can_hold_is_refused(preset: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(preset, parameters(SHAPES), capturable=True, **options)


def test_the_presets_that_wait_are_known() -> None:
    found = set()
    for preset in PRESETS:
        try:
            optimizer(small(preset, 3), parameters({"tall": (7, 4)}), capturable=True)
        except ValueError:
            found.add(preset)
    assert found == WAITING


def started(preset: str) -> Iterator[SubspaceOptimizer]:
    params = parameters(SHAPES)
    opt = optimizer(small(preset, 3, every=3), params, capturable=True)
    for step in range(8):
        yield opt
        give(params, step)
        opt.step()


def test_an_optimizer_says_which_graph_comes_next() -> None:
    """GaLore here refreshes at updates 1, 4 and 7, COSMOS at every one, Muon at none."""
    assert [opt.refreshes_next() for opt in started("galore")][1:] == [False, False, True, False, False, True, False]
    assert all(opt.refreshes_next() for opt in list(started("cosmos"))[1:2])
    *_, muon = started("muon")
    assert not muon.refreshes_next()
    muon.refresh_bases()
    assert not muon.refreshes_next()
    with pytest.raises(RuntimeError, match="no step of this optimizer has been captured"):
        muon.count_replay()


def test_counters_load_to_where_they_are_used() -> None:
    params = parameters(SHAPES)
    opt = optimizer("muon", params, capturable=True)
    train(opt, params, range(2))
    there = {name: nn.Parameter(p.detach().to("meta")) for name, p in params.items()}
    other = optimizer("muon", there, capturable=True)
    other.load_state_dict(opt.state_dict())
    assert {value.device.type for key, value in flat(other) if key.endswith("/step")} == {"meta"}


def test_a_gate_holds_the_counters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ALSO_ON_CPU", True)
    params = parameters(SHAPES)
    opt = optimizer("galore", params, capturable=True)
    train(opt, params, range(2))
    before = snapshot(opt, params)
    give(params, 2)
    params["bias"].grad = params["bias"].grad * torch.nan  # type: ignore[operator]
    opt.step()
    after = snapshot(opt, params)  # the host has read nothing so far
    assert max(differences(before, after).values()) == 0
    with pytest.raises(NonFiniteGradient, match="gradient of bias held"):
        opt.check()
    train(opt, params, range(2, 4))
    assert {float(value) for key, value in flat(opt) if key.endswith("/step")} == {4.0}
