"""Do diagnostics leave a run as it is, cost nothing when they are off, and say the truth?"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import copied, give, optimizer, parameters, same, small, snapshot, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import subspace_opt
from subspace_opt import linalg, load_spec, step_in_backward
from subspace_opt.algebra.core import Basis
from subspace_opt.diagnostics import json_lines, layer, logger, measures, observe, replay, tensorboard
from subspace_opt.diagnostics.sinks import scalars
from subspace_opt.engine import moment

SHAPES = {"tall": (7, 4), "wide": (4, 7), "experts": (3, 5, 6), "bias": (4,)}


class Counted(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def counts(opt: torch.optim.Optimizer, params: Any, steps: range) -> list[int]:
    """Operations of each step. Constants that another run has left in a cache would save operations."""
    moment._clock.cache_clear()
    moment._positions.cache_clear()
    found = []
    for step in steps:
        give(params, step)
        with Counted() as counted:
            opt.step()
        found.append(counted.number)
    return found


# ------------------------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported the diagnostics."""
    for name in [name for name in sys.modules if name.startswith("subspace_opt.diagnostics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(subspace_opt, "diagnostics", raising=False)


def test_a_run_without_diagnostics_does_not_import_them_and_dispatches_the_same(without_the_module: None) -> None:
    params = parameters(SHAPES)
    other = copied(params)
    roles = dict.fromkeys(("tall", "wide", "experts"), "hidden")
    opt = subspace_opt.build(small("cosmos"), params.items(), roles=roles)
    without = counts(opt, params, range(8))
    assert "subspace_opt.diagnostics" not in sys.modules
    observed = subspace_opt.build(small("cosmos"), other.items(), roles=roles, diagnostics=3)
    assert "subspace_opt.diagnostics" in sys.modules
    with_them = counts(observed, other, range(8))
    assert [with_them[i] for i in (1, 2, 4, 5, 7)] == [without[i] for i in (1, 2, 4, 5, 7)]
    assert all(with_them[i] > without[i] for i in (0, 3, 6)), "samples are taken on steps 1, 4 and 7"
    assert observed.diagnostics is not None
    observed.diagnostics.stop()
    assert counts(observed, other, range(9, 12)) == counts(opt, params, range(9, 12))


@pytest.mark.parametrize("preset", ["cosmos", "galore", "soap", "trion", "dion", "fira", "muon-hyperball"])
def test_a_run_keeps_its_bits_and_the_second_update_is_its_own(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert gets its first gradient at the third step."""
    seen: list[tuple[Any, replay.Replay]] = []

    def spied(stack: Any, options: Any) -> replay.Replay:
        seen.append((stack, replay.replayed(stack, options)))
        return seen[-1][1]

    monkeypatch.setattr(layer, "replayed", spied)
    params = parameters(SHAPES, torch.float64)
    others = copied(params)
    plain, observed = (optimizer(preset, some, weight_decay=0.0) for some in (params, others))
    samples: list[Any] = []
    observe(observed, 1, sink=samples.append)
    compared = 0
    for step in range(6):
        for some in (params, others):
            give(some, step)
            if step < 2:
                some["experts"].grad[1] = 0.0
        before = {name: p.detach().clone() for name, p in others.items()}
        seen.clear()
        plain.step()
        observed.step()
        for stack, again in seen:
            piece = stack.pieces[0]
            if again.update is not None:
                view = piece.work.row.view
                moved = piece.of(view.cut(view.whole(before[piece.work.name] - others[piece.work.name].detach())))
                torch.testing.assert_close(moved, piece.work.lr * again.update, rtol=1e-7, atol=1e-12)
                compared += 1
    assert same(snapshot(plain, params), snapshot(observed, others))
    assert [sample["step"] for sample in samples] == [1, 2, 3, 4, 5, 6]
    opens = preset != "muon-hyperball"
    assert compared > 10 if opens else not compared
    experts = samples[-1]["layers"]["experts"]
    assert experts["matrices"] == 3
    assert len(experts["by_matrix"]["update_ratio"]) == 3
    if preset not in ("soap", "muon-hyperball", "dion"):
        assert samples[0]["layers"]["experts"]["by_matrix"]["captured_gradient"][-1] is None, "the idle expert has no gradient"
    for found in samples[-1]["layers"].values():
        numbers = [value for value in found.values() if isinstance(value, float)]
        assert numbers
        assert all(map(math.isfinite, numbers))
        for name in ("captured_gradient", "captured_momentum"):
            assert 0 <= found.get(name, 0) <= 1 + 1e-9
        assert found.get("captured_gradient", 0) <= found.get("captured_gradient_best", 1) + 1e-9
    assert ("captured_gradient" in experts) == (preset not in ("soap", "muon-hyperball"))
    assert ("captured_momentum" in experts) == (preset in ("cosmos", "trion", "dion"))
    if preset != "soap":  # it rotates vectors too
        assert {"angle_max", "captured_gradient", "inside_rms", "rank"}.isdisjoint(samples[-1]["layers"]["bias"])


# --------------------------------------------------------------------------------------------------------------- the numbers


def test_fields_are_those_of_the_gradient_the_basis_and_the_weight() -> None:
    params = parameters({"w": (9, 6)}, torch.float64)
    opt = optimizer(load_spec("galore", {"matrix.selector.rank": 2, "matrix.selector.every": 2}), params, lr=0.1, weight_decay=0.5)
    samples: list[Any] = []
    observe(opt, 1, sink=samples.append)
    bases = []
    for step in range(4):
        give(params, step)
        before = params["w"].detach().clone()
        opt.step()
        g, u = params["w"].grad, opt.state[params["w"]]["selector.basis"].clone()
        bases.append(u)
        found = samples[-1]["layers"]["w"]
        assert g is not None
        energy = torch.linalg.svdvals(g) ** 2
        p = energy / energy.sum()
        assert found["captured_gradient"] == pytest.approx(float((g @ u).square().sum() / g.square().sum()))
        assert found["captured_gradient_best"] == pytest.approx(float(p[:2].sum()))
        assert found["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()))
        assert found["orthogonality_error"] == pytest.approx(float((u.T @ u - torch.eye(2)).abs().max()), abs=1e-12)
        change = params["w"].detach() - before
        assert found["update_ratio"] == pytest.approx(float(change.norm() / before.norm()))
        assert found["update_rms"] == pytest.approx(float(change.square().mean().sqrt()))
        assert ("refresh_ms" in found) == (step % 2 == 0)
        assert found["age"] == 1 + step % 2
    cos = torch.linalg.svdvals(bases[1].T @ bases[2]).clamp_max(1)
    assert samples[2]["layers"]["w"]["angle_max"] == pytest.approx(float(cos.acos().rad2deg().max()))
    assert samples[3]["layers"]["w"]["angle_max"] == 0.0
    assert "angle_max" not in samples[0]["layers"]["w"]


def columns(*angles: float) -> Tensor:
    """Columns in R^6: the i-th turned by an angle in degrees from axis 2 i to axis 2 i + 1."""
    out = torch.zeros(1, 6, len(angles), dtype=torch.float64)
    for i, angle in enumerate(angles):
        out[0, 2 * i, i], out[0, 2 * i + 1, i] = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return out


def test_measures_of_matrices_that_are_known() -> None:
    found = measures.principal_angles(columns(0, 0, 0), columns(30, 1e-5, 80))
    torch.testing.assert_close(found, torch.tensor([[1e-5, 30.0, 80.0]], dtype=torch.float64), rtol=1e-6, atol=0)
    picked = measures.principal_angles(torch.tensor([[0, 3, 5]]), torch.tensor([[5, 1, 0]]))
    assert picked.tolist() == [[0.0, 0.0, 90.0]]
    x = torch.diag_embed(torch.tensor([[2.0, 2.0, 0.0], [3.0, 0.0, 0.0]]))
    assert measures.effective_rank(measures.energies(x)).tolist() == pytest.approx([2.0, 1.0], abs=1e-5)
    a, b = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]], [[1.0, 1.0]]])
    assert measures.cosine(a, b)[0] == pytest.approx(0.5**0.5)
    assert measures.cosine(a, b)[1].isnan()
    skew = torch.tensor([[[1.0, 0.1], [0.0, 1.0], [0.0, 0.0]]])
    assert float(measures.orthogonality_error(Basis(right=(skew[:, :2], 3)))[0]) == pytest.approx(0.1)  # type: ignore[index]
    assert measures.orthogonality_error(Basis(right=torch.tensor([[0, 1]]))) is None


def test_parts_of_the_update_add_up() -> None:
    """FRUGAL: Adam inside, the sign of the residual outside."""
    params = parameters({"w": (8, 5)}, torch.float64)
    spec = load_spec("frugal", {"matrix.selector": {"kind": "svd", "rank": 2, "every": 1, "method": "exact"}})
    opt = optimizer(spec, params)
    observer = observe(opt, 1)
    train(opt, params, range(3))
    g = params["w"].grad
    assert g is not None
    found = observer.last["layers"]["w"]  # type: ignore[index]
    assert found["complement_rms"] == pytest.approx(opt.spec.pipelines["matrix"].mix.complement, rel=1e-6), "the rms of signs is 1"
    assert -1 < found["cosine"] < 1
    assert found["inside_rms"] > 0


# ----------------------------------------------------------------------------------------------------------------- the guards


def guards(observer: Any, name: str) -> dict[str, int]:
    found: dict[str, int] = observer.last["layers"][name].get("guards", {})
    return found


def test_guards_that_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters({"w": (8, 6), "v": (3, 9), "idle": (2, 4, 5)})
    opt = optimizer(load_spec("cosmos", {"matrix.selector.rank": 4}), params, nonfinite="skip")
    observer = observe(opt, 3)
    for step in range(4):
        give(params, step)
        params["idle"].grad[1] = 0.0
        params["w"].grad = (torch.ones(8, 1) + torch.arange(8.0)[:, None]) @ torch.ones(1, 6)  # rank 1: the residual is round-off
        if step == 1:
            params["w"].grad[0, 0] = math.nan
        opt.step()
    assert guards(observer, "w") == {"silent_residual": 1, "skipped_gradients": 1}
    assert guards(observer, "v") == {"clamped_rank": 4}
    assert guards(observer, "idle") == {"waiting": 1}

    def fails(*_: Any, **__: Any) -> Tensor:
        raise torch.linalg.LinAlgError("no convergence")

    give(params, 4)
    opt.step()
    with monkeypatch.context() as broken:
        broken.setattr(linalg, "orthonormal", fails)
        for step in (5, 6):
            give(params, step)
            params["v"].grad = params["idle"].grad = None
            with pytest.warns(RuntimeWarning, match="a decomposition for 'w' failed"):
                opt.step()
    assert observer.last is not None
    assert observer.last["step"] == 7
    assert guards(observer, "w") == {"failed_decompositions": 2}
    assert "captured_gradient" not in observer.last["layers"]["w"]
    assert observer.last["layers"]["w"]["update_ratio"] > 0

    give(params, 7)
    params["w"].grad[0, 0] = math.inf
    for step in (7, 8, 9):
        opt.step()
        give(params, step)
        params["w"].grad[0, 0] = math.inf
    assert observer.last["layers"]["w"] == {"pipeline": "matrix", "guards": {"skipped_gradients": 3}}


# ------------------------------------------------------------------------------------------------------- kinds of parameters


def test_fused_parts_transposed_weights_closures_and_low_bits() -> None:
    lin = nn.Linear(16, 32, bias=False)
    model = nn.ModuleDict({"qkv": nn.Linear(16, 48, bias=False), "a": lin})
    routes = [{"name": "qkv*", "use": "matrix", "split": {"q": 16, "k": 16, "v": 16}}, {"name": "a*", "use": "matrix", "transposed": True}]
    spec = load_spec("galore", {"matrix.selector.rank": 4, "matrix.inside.beta1": 0.9}).model_dump(mode="json")
    opt = subspace_opt.build({**spec, "routes": [*routes, {"use": "other"}]}, model, state_dtype={"exp_avg": "bf16", "exp_avg_sq": "8bit"})
    plain = opt.state
    samples: list[Any] = []
    observer = observe(opt, 1, sink=[samples.append], names=("qkv*", "a*"))
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))

    def closure() -> float:
        opt.zero_grad()
        loss = (model["qkv"](x).square().mean() + model["a"](x).square().mean()) * 10
        loss.backward()
        return float(loss.detach())

    for _ in range(3):
        opt.step(closure)
    assert opt.state is plain
    assert list(samples[-1]["layers"]) == ["qkv.weight.q", "qkv.weight.k", "qkv.weight.v", "a.weight"]
    g, u = lin.weight.grad, opt.state[lin.weight]["selector.basis"]
    assert g is not None
    work = g @ u if u.size(0) == 16 else g.T @ u
    assert samples[-1]["layers"]["a.weight"]["captured_gradient"] == pytest.approx(float(work.square().sum() / g.square().sum()), rel=1e-5)
    state = opt.state_dict()
    opt.load_state_dict(state)
    opt.step(closure)
    assert observer.last is not None
    assert observer.last["step"] == 4
    assert "angle_max" not in observer.last["layers"]["a.weight"], "the basis of the last sample belonged to another state"


# --------------------------------------------------------------------------------------------------------------------- sinks


class Writer:
    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((name, value, step))


class Run:
    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []

    def log(self, data: dict[str, float], step: int) -> None:
        self.rows.append((data, step))


def test_sinks_take_every_sample(tmp_path: Path) -> None:
    params, writer, run = parameters({"w": (6, 4), "tiny": (3, 2)}), Writer(), Run()
    opt = optimizer("cosmos", params)
    kept: list[Any] = []
    observe(opt, 2, sink=[kept.append, json_lines(tmp_path / "log.jsonl"), tensorboard(writer), logger(run, prefix="diag")])
    train(opt, params, range(4))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == kept
    assert [line["step"] for line in lines] == [1, 3]
    named = dict(scalars(kept[-1]))
    assert ("subspace/w/captured_gradient", named["subspace/w/captured_gradient"], 3) in writer.rows
    assert named["subspace/tiny/guards/clamped_rank"] == 3
    assert "subspace/w/pipeline" not in named
    assert run.rows[-1] == ({name.replace("subspace", "diag"): value for name, value in named.items()}, 3)


# -------------------------------------------------------------------------------------------------------------------- errors


def wrong() -> Iterator[tuple[type[Exception], str, Any]]:
    opt = optimizer("cosmos", parameters({"w": (6, 4)}))
    yield TypeError, "observe reads a SubspaceOptimizer, not SGD", lambda: observe(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    for every in (0, 2.5, True):
        yield ValueError, "every is .*; give the number of steps", lambda every=every: observe(opt, every)
    yield ValueError, r"names 'x\*' match no parameter; there are w", lambda: observe(opt, names="x*")
    yield ValueError, "spectrum is -1; give the longest side", lambda: observe(opt, spectrum=-1)
    yield TypeError, "a sink takes one sample and must be callable; 3 is not", lambda: observe(opt, sink=[3])  # type: ignore[list-item]
    yield TypeError, r"tensorboard\(\) takes an object with add_scalar", lambda: tensorboard(3)
    yield TypeError, r"logger\(\) takes an object with log", lambda: logger(3)
    yield OSError, "No such file", lambda: json_lines("/no such folder/x.jsonl")
    in_backward = step_in_backward([nn.Parameter(torch.ones(4, 4))], small("cosmos"))
    yield ValueError, r"updates during backward\(\) and frees each gradient", lambda: observe(in_backward)


def test_errors_name_the_place_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, message, call in wrong():
        with pytest.raises(kind, match=message):
            call()
    params = parameters({"w": (6, 4), "v": (6, 4)})
    opt = optimizer("cosmos", params)
    monkeypatch.setattr(opt, "_shardings", lambda: {id(params["w"]): None})
    with pytest.raises(ValueError, match=r"'w' is shared by several ranks.*pass `names` that match unshared parameters only"):
        observe(opt)
    assert observe(opt, names="v").last is None
    assert opt.diagnostics is not None
