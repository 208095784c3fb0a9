"""Tests that need a GPU. Some of them also compare its results with those of a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from subspace_opt import NonFiniteGradient, build, linalg
from subspace_opt.lab.run.measure import peak_temporaries
from tests.common import copied, gradient, optimizer, parameters, small

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
SHAPES = {"a": (24, 16), "b": (24, 16), "c": (24, 16), "wide": (16, 24), "vector": (24,)}


def moved(params: dict[str, nn.Parameter], device: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().to(device)) for name, p in copied(params).items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("preset", ["adamw", "muon", "cosmos", "galore", "adam-snsm", "soap", "trion", "dion", "sumo"])
def test_a_device_computes_what_a_cpu_does(preset: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stacks and with bases from Cholesky factors, which a GPU uses by default."""
    params = parameters(SHAPES, torch.float64)
    there = moved(params, device)
    for own, stacking in ((params, "never"), (there, "always")):
        opt = optimizer(small(preset, 4, every=3), own, weight_decay=0.1, stacking=stacking)
        for step in range(7):
            for name, p in own.items():
                p.grad = gradient(name, tuple(p.shape), step, p.dtype).to(p.device)
            opt.step()
        monkeypatch.setattr("subspace_opt.linalg.orthonormal", linalg.cholesky_qr)
    for name, p in params.items():
        torch.testing.assert_close(there[name].cpu(), p, rtol=0, atol=1e-8)


@contextmanager
def nobody_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["adamw", "muon", "cosmos", "galore", "adam-snsm", "trion", "soap", "apollo"])
def test_no_host_waits_between_refreshes(preset: str, dtype: torch.dtype) -> None:
    """COSMOS and Trion refresh at every step, and must not wait either. `propagate`: a check for NaN would wait for the device."""
    params = moved(parameters(SHAPES, dtype), "cuda")
    opt = optimizer(small(preset, 4, every=1000), params, nonfinite="propagate")
    grads: dict[str, Tensor] = {name: torch.randn_like(p) for name, p in params.items()}
    for step in range(6):
        for name, p in params.items():
            p.grad = grads[name] * (1 + step)
        if step < 3:
            opt.step()
        else:
            with nobody_waits():
                opt.step()
    assert all(bool(p.isfinite().all()) for p in params.values())


@needs_gpu
@pytest.mark.parametrize("preset", ["muon", "cosmos", "galore", "adam-snsm"])
def test_temporaries_stay_within_a_few_stacks(preset: str) -> None:
    """`batch_bytes` bounds one temporary of a stack; a step has a few of them."""
    device, bound = torch.device("cuda"), 8 * 2**20
    model = nn.ModuleList(nn.Linear(512, 512, bias=False, device=device) for _ in range(64))
    opt = build(preset, model, batch_bytes=bound)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
    assert peak_temporaries(opt.step, device) <= 12 * bound


@needs_gpu
@pytest.mark.parametrize("preset", ["adamw", "muon", "cosmos", "galore", "trion"])
def test_a_captured_step_makes_the_updates_of_a_plain_one(preset: str) -> None:
    """One graph of a step between refreshes, or of a refresh if every step has one; steps that no graph fits run as usual."""
    plain, params = (moved(parameters(SHAPES), "cuda") for _ in range(2))
    spec, refreshes = small(preset, 4, every=5), preset in ("cosmos", "trion")
    own = optimizer(spec, plain, lr=0.01)
    rate = torch.tensor(0.01, device="cuda")
    opt = optimizer(spec, params, lr=rate, capturable=True)
    for name, p in params.items():
        p.grad = torch.zeros_like(p)
        plain[name].grad = p.grad
    graph: torch.cuda.CUDAGraph | None = None
    for step in range(12):
        for name, p in params.items():
            p.grad.copy_(gradient(name, tuple(p.shape), step).cuda())  # type: ignore[union-attr]
        own.step()
        fits = step > 2 and opt.refreshes_next() == refreshes
        if fits and graph is None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
        if fits and graph is not None:
            graph.replay()
            opt.count_replay()
        else:
            opt.step()
    assert graph is not None
    for name, p in params.items():
        torch.testing.assert_close(p, plain[name], rtol=1e-4, atol=1e-5)
    params["a"].grad.fill_(torch.nan)  # type: ignore[union-attr]
    before = params["b"].detach().clone()
    graph.replay()
    assert torch.equal(params["b"], before)
    with pytest.raises(NonFiniteGradient, match="gradient of a held"):
        opt.check()


@needs_gpu
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_no_host_waits_to_inspect_gradients(policy: str) -> None:
    params = moved(parameters(SHAPES), "cuda")
    opt = optimizer(small("muon", 4), params, nonfinite=policy)
    for step in range(6):
        for p in params.values():
            p.grad = torch.ones_like(p) * (1 + step)
        if step < 2:
            opt.step()
        else:
            with nobody_waits():
                opt.step()
    assert opt.check() is None
