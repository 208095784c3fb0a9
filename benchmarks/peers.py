"""Optimizers of other packages, on the same parameters as ours. A note names each package that is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from subspace_opt.linalg import cpu_has_bfloat16

LR = 1e-5  # small, so that the weights hardly change; they do not affect the time
ADAMW, MUON, MUON32, GALORE = "torch AdamW fused", "torch Muon", "torch Muon, float32", "galore-torch GaLore"
SOAPS = ("pytorch-optimizer SOAP", "heavyball SOAP")
MUONS = ("pytorch-optimizer Muon", "heavyball Muon")  # they iterate in bfloat16, as torch's does


class Muon32(torch.optim.Muon):
    """torch's Muon with Newton-Schulz in float32: the peer for a CPU without instructions for bfloat16.

    On such a CPU, torch's bfloat16 is forty times slower than float32. All other operations are the same.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        from torch.optim import _muon as module

        own = module._zeropower_via_newtonschulz
        module._zeropower_via_newtonschulz = _newton_schulz_float32
        try:
            return super().step(closure)
        finally:
            module._zeropower_via_newtonschulz = own


def _newton_schulz_float32(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    a, b, c = coefficients
    y = grad.mT if grad.size(0) > grad.size(1) else grad
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if grad.size(0) > grad.size(1) else y


def peers(parameters: Sequence[Tensor], wanted: Sequence[str], note: Callable[[str], None]) -> Iterator[tuple[str, Optimizer]]:
    """(name, optimizer) for each peer that can be built; `note` gets a message about each of the others."""
    own = list(parameters)
    for name, make in MAKERS.items():
        if wanted and name not in wanted:
            continue
        if name in (MUON, *MUONS) and own[0].device.type == "cpu" and not cpu_has_bfloat16():
            note(f"{name}: left out, because it iterates in bfloat16 and this CPU has no instructions for that; '{MUON32}' replaces it")
            continue
        try:
            yield name, make(own)
        except ImportError as error:
            note(f"{name}: left out, {error}")


def _pytorch_optimizer(own: list[Tensor]) -> Optimizer:
    from pytorch_optimizer import SOAP  # type: ignore[import-not-found]

    made: Optimizer = SOAP(own, lr=LR, precondition_frequency=10)
    return made


def _heavyball(own: list[Tensor]) -> Optimizer:
    import heavyball  # type: ignore[import-not-found]

    heavyball.utils.compile_mode = None  # compilation takes tens of seconds and does not make it faster on a CPU
    made: Optimizer = heavyball.SOAP(own, lr=LR, precondition_frequency=10, max_precond_dim=10000, merge_dims=False)
    return made


def _pytorch_optimizer_muon(own: list[Tensor]) -> Optimizer:
    from pytorch_optimizer import Muon

    made: Optimizer = Muon([{"params": own, "use_muon": True}], lr=LR)
    return made


def _heavyball_muon(own: list[Tensor]) -> Optimizer:
    import heavyball

    heavyball.utils.compile_mode = None
    made: Optimizer = heavyball.Muon(own, lr=LR)
    return made


def _galore(own: list[Tensor]) -> Optimizer:
    from galore_torch import GaLoreAdamW  # type: ignore[import-not-found]

    group = {"params": own, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    made: Optimizer = GaLoreAdamW([group], lr=LR, no_deprecation_warning=True)
    return made


MAKERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    ADAMW: lambda own: torch.optim.AdamW(own, lr=LR, fused=True),
    "torch AdamW foreach": lambda own: torch.optim.AdamW(own, lr=LR, foreach=True),
    MUON: lambda own: torch.optim.Muon(own, lr=LR),
    MUON32: lambda own: Muon32(own, lr=LR),
    "pytorch-optimizer SOAP": _pytorch_optimizer,
    "heavyball SOAP": _heavyball,
    "pytorch-optimizer Muon": _pytorch_optimizer_muon,
    "heavyball Muon": _heavyball_muon,
    GALORE: _galore,
}
