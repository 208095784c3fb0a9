"""A parameter group sets the decay rates of moments: `momentum`, which schedulers move, and `betas`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import run_ranks
from ranks import differences, give, make_zoo, mesh_of, place
from test_sharding import build as build_zoo
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

import subspace_opt
from subspace_opt.algebra.pipeline import moment_fields
from subspace_opt.spec import preset_names

FIELDS = {
    name: {key: moment_fields(pipeline) for key, pipeline in subspace_opt.load_spec(name).pipelines.items()} for name in preset_names()
}
WITH = [name for name, found in FIELDS.items() if any(fields.first for fields in found.values())]
WITH_SECOND = [name for name in WITH if any(fields.second for fields in FIELDS[name].values())]
WITHOUT = [name for name in FIELDS if name not in WITH]


def model_of() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Linear(12, 20))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, scheduler: LRScheduler | None = None) -> None:
    for step in range(first, last):
        x = torch.randint(0, 20, (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def built(preset: str, model: nn.Module, **options: Any) -> subspace_opt.SubspaceOptimizer:
    return subspace_opt.build(preset, model, lr=1e-2, **options)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


# ----------------------------------------------------------------------------------------------------- equal to the same number in the spec


@pytest.mark.parametrize("preset", WITH)
def test_momentum_of_a_group_is_the_rate_of_every_first_moment(preset: str) -> None:
    runs = []
    overrides = {f"{key}.{path}": 0.7 for key, fields in FIELDS[preset].items() for path in fields.first}
    for given in ({}, overrides):
        model = model_of()
        optimizer = built(preset, model, overrides=given)
        for group in optimizer.param_groups:
            group["momentum"] = None if given else 0.7
        train(model, optimizer, 0, 6)
        runs.append(weights(model))
    plain = model_of()
    train(plain, built(preset, plain), 0, 6)
    assert equal(*runs)
    assert not equal(runs[0], weights(plain))


@pytest.mark.parametrize("preset", WITH_SECOND)
def test_betas_of_a_group_are_the_rates_of_both_moments(preset: str) -> None:
    found = FIELDS[preset].items()
    overrides = {f"{key}.{path}": 0.7 for key, fields in found for path in fields.first}
    overrides |= {f"{key}.{path}": 0.8 for key, fields in found for path in fields.second}
    runs = []
    for given in ({}, overrides):
        model = model_of()
        group = {"params": list(model.named_parameters()), **({} if given else {"betas": (0.7, 0.8)})}
        optimizer = subspace_opt.SubspaceOptimizer(
            [group], preset, lr=1e-2, overrides=given, roles={"0.weight": "embedding", "[134].weight": "hidden"}
        )
        train(model, optimizer, 0, 6)
        runs.append(weights(model))
    assert equal(*runs)


def test_momentum_comes_before_betas() -> None:
    runs = []
    for given in ({"betas": (0.5, 0.8), "momentum": 0.7}, {"betas": (0.7, 0.8)}):
        model = model_of()
        optimizer = subspace_opt.SubspaceOptimizer([{"params": list(model.parameters()), **given}], "adamw", lr=1e-2)
        train(model, optimizer, 0, 4)
        runs.append(weights(model))
    assert equal(*runs)


def test_groups_have_their_own() -> None:
    """Matrices of one shape in two groups are computed with the rate of their own group."""
    runs = []
    for rates in ((0.5, 0.9), (0.5, None), (None, 0.9)):
        torch.manual_seed(0)
        ws = [nn.Parameter(torch.randn(6, 5)) for _ in range(2)]
        groups = [
            {"params": [(f"w{i}", w)], **({} if rate is None else {"momentum": rate})}
            for i, (w, rate) in enumerate(zip(ws, rates, strict=True))
        ]
        optimizer = subspace_opt.SubspaceOptimizer(groups, "muon", lr=1e-2, roles={"w*": "hidden"})
        for step in range(4):
            for i, w in enumerate(ws):
                w.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
        runs.append([w.detach() for w in ws])
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[2][1])
    assert not torch.equal(runs[0][0], runs[2][0])


# --------------------------------------------------------------------------------------------------------------------------- schedulers


SCHEDULERS: list[Callable[[torch.optim.Optimizer], LRScheduler]] = [
    lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=10),
    lambda optimizer: CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3),
]


@pytest.mark.parametrize("scheduled", SCHEDULERS, ids=["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("preset", ["cosmos", "muon", "galore", "soap", "adamw", "trion"])
def test_a_scheduler_moves_momentum_and_a_cut_goes_on_to_the_bit(preset: str, scheduled: Callable[..., LRScheduler]) -> None:
    model = model_of()
    optimizer = built(preset, model)
    scheduler = scheduled(optimizer)
    seen = []
    for step in range(4):
        seen.append(optimizer.param_groups[0]["momentum"])
        train(model, optimizer, step, step + 1, scheduler)
    assert len(set(seen)) == 4
    saved = weights(model), optimizer.state_dict(), scheduler.state_dict()
    other = model_of()
    resumed = built(preset, other)
    again = scheduled(resumed)
    with torch.no_grad():
        for p, w in zip(other.parameters(), saved[0], strict=True):
            p.copy_(w)
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert resumed.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]
    train(other, resumed, 4, 8, again)
    train(model, optimizer, 4, 8, scheduler)
    assert equal(weights(model), weights(other))


def test_updates_in_backward_follow_momentum() -> None:
    runs = []
    for make in (built, lambda preset, model: subspace_opt.step_in_backward(model, preset, lr=1e-2)):
        model = model_of()
        optimizer = make("cosmos", model)
        train(model, optimizer, 0, 6, OneCycleLR(optimizer, 1e-2, total_steps=10))
        runs.append(weights(model))
    assert equal(*runs)


def on_ranks(kind: str) -> list[str]:
    """The parameters that differ from one process after steps with a moving momentum."""
    wrong = []
    for preset in ("cosmos", "galore", "adamw", "trion"):
        runs = []
        for where in (None, kind):
            model = make_zoo()
            if where is not None:
                place(model, kind, mesh_of(kind, dist.get_world_size()))
            optimizer = build_zoo(preset, model, where)
            for step in range(6):
                give(model, step)
                optimizer.param_groups[0]["momentum"] = 0.6 + step / 20
                optimizer.step()
            runs.append(model)
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in differences(runs[1], runs[0]) if not gap < 1e-9]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_ranks_follow_momentum(kind: str) -> None:
    assert run_ranks(2, on_ranks, kind) == [[]] * 2


# ---------------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("preset", WITHOUT)
def test_a_spec_without_first_moments_refuses(preset: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=f"sets `momentum`, and no rule of spec '{preset}'"):
        subspace_opt.SubspaceOptimizer([{"params": list(model.parameters()), "momentum": 0.9}], preset)
    with pytest.raises(ValueError, match="momentum"):
        OneCycleLR(built(preset, model), 1e-2, total_steps=10)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"momentum": 1.0}, "Invalid momentum: 1.0; it must be a number between 0 and 1"),
        ({"momentum": "0.9"}, "Invalid momentum: 0.9"),
        ({"betas": 0.9}, "Invalid betas: 0.9; it must be two numbers"),
        ({"betas": (0.9, 0.0)}, r"Invalid betas\[1\]: 0.0"),
    ],
)
def test_bad_rates_are_refused(group: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        subspace_opt.SubspaceOptimizer([{"params": [nn.Parameter(torch.zeros(3))], **group}], "adamw")


def test_a_scheduler_that_leaves_the_range_is_named() -> None:
    model = model_of()
    optimizer = built("adamw", model)
    optimizer.param_groups[0]["momentum"] = 1.5
    before = weights(model)
    with pytest.raises(ValueError, match=r"momentum 1\.5 .* between 0 and 1"):
        train(model, optimizer, 0, 1)
    assert equal(before, weights(model))
