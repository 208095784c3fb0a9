"""The option `compile`: updates through `torch.compile` are those of the plain path, and nothing is compiled again after the warm-up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from subspace_opt import build
from tests.common import copied, gradient, optimizer, parameters, small

SHAPES = {"a": (12, 8), "b": (12, 8), "wide": (8, 20)}  # Newton-Schulz takes the last by its Gram matrix
STEPS, WARM = 20, 8
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No graphs of other tests, and none left behind. Imported late, because the compiler takes seconds to import."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def counted() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def trained(
    preset: str, compile: bool | str, steps: int = STEPS, shapes: Shapes = SHAPES, **options: Any
) -> tuple[dict[str, nn.Parameter], list[int]]:
    """Parameters after some steps with a scheduled rate, and the number of compiled graphs after each step.

    Bases are refreshed at updates 1, 7, 13 and 19, the last two after the warm-up.
    """
    params = copied(parameters(shapes, torch.float32))
    opt = optimizer(small(preset, 4, every=6), params, stacking="always", compile=compile, **{"weight_decay": 0.1, **options})
    graphs = []
    for step in range(steps):
        opt.param_groups[0]["lr"] = 1e-2 / (1 + step)
        for name, p in params.items():
            p.grad = gradient(name, tuple(p.shape), step, p.dtype)
        opt.step()
        graphs.append(counted())
    return params, graphs


def largest_difference(a: dict[str, nn.Parameter], b: dict[str, nn.Parameter]) -> float:
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)


# One for each kind of pipeline: a fixed basis, with a number deferred to the weight; refreshed at every step; eigenbases; error feedback
# and picked rows; weight rules, which read the rate.
@pytest.mark.parametrize(
    ("preset", "backend"),
    # aot_eager makes the graph free of writes in place, as inductor needs it.
    [("muon", "aot_eager"), *((preset, "eager") for preset in ("galore", "cosmos", "soap", "dion2", "muon-hyperball"))],
)
def test_a_compiled_step_is_the_plain_step(preset: str, backend: str) -> None:
    plain, none = trained(preset, compile=False)
    made, graphs = trained(preset, compile=backend)
    assert none[-1] == 0
    assert 0 < graphs[WARM] == graphs[-1] <= 24, graphs
    assert largest_difference(plain, made) < 1e-6


@pytest.mark.parametrize("preset", ["golore", "shampoo"])
def test_a_pipeline_that_reads_the_count_on_the_host_runs_plain(preset: str) -> None:
    assert trained(preset, compile="eager", steps=4)[1][-1] == 0


def test_numbers_of_a_schedule_run_plain() -> None:
    beta = {"from": 0.5, "to": 0.9, "over": 100, "schedule": "linear"}
    params = copied(parameters({"a": (12, 8)}, torch.float32))
    opt = build("muon", params.items(), overrides={"matrix.momentum.beta": beta}, compile="eager")
    for step in range(3):
        params["a"].grad = gradient("a", (12, 8), step, torch.float32)
        opt.step()
    assert counted() == 0


def test_copies_and_checkpoints_of_a_compiled_optimizer() -> None:
    params, _ = trained("muon", compile="eager", steps=1)
    opt = optimizer(small("muon", 4), params, compile="eager")
    for _ in range(3):
        for name, p in params.items():
            p.grad = gradient(name, tuple(p.shape), 0, p.dtype)
        opt.step()
    twin = copy.deepcopy(opt)
    assert twin._options.compile == "eager"
    opt.load_state_dict(twin.state_dict())
    opt.step()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="compile is 'inducto'; did you mean 'inductor'"):
        build("muon", nn.Linear(4, 4), compile="inducto")
