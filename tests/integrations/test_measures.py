"""Is the measured energy that of the gradient inside the basis, and is the size of an update that of the weights' change?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import PRESETS, small
from families import FAMILIES

from subspace_opt import SubspaceOptimizer, build, load_spec
from subspace_opt.algebra.projection import lift, project
from subspace_opt.algebra.shaped import part
from subspace_opt.engine.moment import step_of
from subspace_opt.engine.work import Options, Phase, Piece, Stack, Work
from subspace_opt.integrations.measures import UpdateSizes, captured_energy, means

OPENING = [name for name in PRESETS if any(pipeline.inside for pipeline in load_spec(name).pipelines.values())]

# Their bases have no orthonormal columns, or exist only during a step.
UNMEASURED = ("apollo", "apollo-mini", "online-subspace-descent", "dion")


def trained(preset: str, model: nn.Module, steps: int = 4) -> SubspaceOptimizer:
    """An optimizer after some steps with random gradients. The last gradients are still there."""
    opt = build(small(preset), model)
    draw = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        opt.step()
    return opt


def fused() -> nn.Module:
    """GPT-2: its layers are stored transposed, and one weight holds q, k and v."""
    return FAMILIES["GPT-2"].make()


def inside(opt: SubspaceOptimizer, name: str, p: nn.Parameter) -> float:
    """The share of the gradient's squared norm that remains if every matrix is projected and lifted again."""
    row = opt.plan.by_name[name]
    assert p.grad is not None
    work = Work(row, p, p.grad, 0.0, 0.0, opt.state[p], count=int(opt.state[p]["step"]))
    kept = whole = 0.0
    for i, (block, frame) in enumerate(row.splits):
        piece = Piece(work, i, 0, block.count)
        state = part("selector", {key: piece.slot(key) for key in frame.slots if key.startswith("selector.")})
        basis = frame.pipeline.selector.basis(state, step_of(Stack(frame, Phase.BEGUN, False, [piece]), Options(), {}))
        g = work.grads[i].mT if frame.turned else work.grads[i]
        kept += float(lift(project(g, basis), basis, *g.shape[-2:]).square().sum())
        whole += float(g.square().sum())
    return kept / whole


@pytest.mark.parametrize("preset", OPENING)
def test_energy_is_that_of_the_gradient_projected_and_lifted(preset: str) -> None:
    model = fused()
    opt = trained(preset, model)
    found = captured_energy(opt)
    matrices = set() if preset in UNMEASURED else {row.entry.name for row in opt.plan if row.ranks}
    assert found.keys() == matrices
    assert matrices or preset in UNMEASURED
    for name, p in model.named_parameters():
        if name in found:
            assert found[name] == pytest.approx(inside(opt, name, p), rel=1e-4)
            assert 0 < found[name] <= 1 + 1e-5
    for pipeline, mean in means(found, opt).items():
        some = [value for name, value in found.items() if opt.plan.by_name[name].pipeline == pipeline]
        assert mean == pytest.approx(sum(some) / len(some))


def test_a_gradient_in_the_basis_has_all_its_energy_there_and_one_outside_none() -> None:
    layer = nn.Linear(8, 6, bias=False)
    opt = build("galore", layer, overrides={"matrix.selector.rank": 2}, roles={"weight": "hidden"})
    assert captured_energy(opt) == {}, "there is no basis yet"
    u, _, v = torch.linalg.svd(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    layer.weight.grad = u[:, :2] @ torch.diag(torch.tensor([2.0, 1.0])) @ v[:2]
    opt.step()
    assert captured_energy(opt)["weight"] == pytest.approx(1, abs=1e-5)
    layer.weight.grad = u[:, 3:5] @ v[3:5]
    assert captured_energy(opt)["weight"] == pytest.approx(0, abs=1e-5)
    layer.weight.grad = None
    assert captured_energy(opt) == {}


def test_update_sizes_are_relative_to_the_weights_before() -> None:
    model = fused()
    opt = trained("cosmos", model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sizes = UpdateSizes(opt)
    opt.step()
    found = sizes.by_pipeline()
    assert found.keys() == {"matrix", "other"}
    for pipeline, size in found.items():
        names = [row.entry.name for row in opt.plan if row.pipeline == pipeline]
        change = sum(float((p.detach() - before[name]).square().sum()) for name, p in model.named_parameters() if name in names)
        whole = sum(float(before[name].square().sum()) for name in names)
        assert size == pytest.approx((change / whole) ** 0.5, rel=1e-4)
