"""Replay a golden trajectory: initial parameters, gradients, and the parameters after each step of the authors' code, in float64.

Error of a step: the largest over parameters of |p - reference| / |reference - start|, relative to how far the reference has moved.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...algebra import Order, State, Step
from ...engine import moment as draws
from ...engine.work import Piece
from ...linalg import bases
from ...selectors.fft import Fft

ROUGH = 1e-4  # the error that counts of an update decided by round-off, where 1e-5 is then within a tolerance of 1e-9


@dataclass
class Golden:
    """The contents of one golden file."""

    path: Path
    meta: dict[str, Any] = field(init=False)
    arrays: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        with np.load(self.path, allow_pickle=False) as z:
            self.arrays = {k: z[k] for k in z.files}
        self.meta = json.loads(str(self.arrays.pop("meta")))

    @property
    def names(self) -> list[str]:
        return [p["name"] for p in self.meta["params"]]

    @property
    def tolerance(self) -> float:
        return float(self.meta["tolerance"]["float64"])

    def parameters(self, dtype: torch.dtype = torch.float64) -> dict[str, torch.nn.Parameter]:
        return {n: torch.nn.Parameter(torch.from_numpy(self.arrays[f"init/{n}"]).to(dtype, copy=True)) for n in self.names}

    def gradient(self, t: int, name: str) -> torch.Tensor | None:
        g = self.arrays.get(f"grad/{t}/{name}")
        return None if g is None else torch.from_numpy(g)

    def basis(self, t: int, name: str) -> dict[str, np.ndarray]:
        """The latest stored basis of a parameter up to and including step t."""
        out: dict[str, np.ndarray] = {}
        for s in range(t + 1):
            prefix = f"basis/{s}/{name}/"
            out |= {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}
        return out


def replay(
    golden: Golden,
    make: Callable[[Golden, dict[str, torch.nn.Parameter]], torch.optim.Optimizer],
    *,
    exclude: tuple[str, ...] = (),
    rounded: bool = False,
    before_step: Callable[[int, torch.optim.Optimizer], None] | None = None,
) -> dict[str, float]:
    """The largest error of every parameter that is not excluded.

    With `rounded`, round-off decides the first update of the reference. Its error then counts as a share `ROUGH` of itself, and the later
    updates start from the reference's parameters.
    """
    params = golden.parameters()
    optimizer = make(golden, params)
    factors = golden.meta.get("lr_factors")
    base = [g["lr"] for g in optimizer.param_groups]
    errors = {n: 0.0 for n in golden.names if n not in exclude}
    moment = {"t": -1}
    with signs_of(golden, moment), draws_of(golden, moment), order_of(golden, moment):
        for t in range(golden.meta["steps"]):
            moment["t"] = t
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * (factors[t] if factors else 1.0)
            for n, p in params.items():
                g = golden.gradient(t, n)
                p.grad = None if g is None else g.to(p.dtype)
            if before_step is not None:
                before_step(t, optimizer)
            optimizer.step()
            for n in errors:
                reference, start = golden.arrays[f"param/{t}/{n}"], golden.arrays[f"init/{n}"].astype(np.float64)
                moved = max(float(np.linalg.norm(reference - start)), 1e-8 * float(np.linalg.norm(start)), 1e-300)
                error = float(np.linalg.norm(params[n].detach().double().numpy() - reference)) / moved
                if rounded and t == 0:
                    error *= ROUGH
                    params[n].data.copy_(torch.from_numpy(reference))
                errors[n] = max(errors[n], error if np.isfinite(error) else np.inf)
    return errors


@contextlib.contextmanager
def signs_of(golden: Golden, moment: dict[str, int]) -> Iterator[None]:
    """Give basis vectors the signs that they have in the file.

    A singular vector's sign is arbitrary. This library has a rule for it; the authors take the sign that LAPACK returns. The trajectory
    depends on the sign if moments stay in old coordinates at a refresh, so the comparison uses the authors' signs.
    """
    own = bases.fix_signs

    def like_the_file(u: torch.Tensor) -> torch.Tensor:
        vectors = []
        for key, value in golden.arrays.items():
            if key.startswith(f"basis/{moment['t']}/") and value.ndim == 2 and value.dtype == np.float64:
                vectors += [v.T for v in (value, value.T) if v.shape[0] == u.size(-2)]
        if not vectors:
            return own(u)
        known = torch.from_numpy(np.concatenate([v if v.shape[1] == u.size(-2) else v.T for v in vectors]))
        known = known / known.norm(dim=1, keepdim=True)
        cosine = known @ u  # (B, known, r)
        best = cosine.gather(-2, cosine.abs().argmax(-2, keepdim=True))
        sure = best.abs() > 1 - 1e-6
        return torch.where(sure, u * best.sign(), own(u))

    bases.fix_signs = like_the_file
    try:
        yield
    finally:
        bases.fix_signs = own


@contextlib.contextmanager
def draws_of(golden: Golden, moment: dict[str, int]) -> Iterator[None]:
    """Replace the draws of refreshes by those of the file: Gaussian or orthonormal bases, picked coordinates, Dion's first factor."""
    if not golden.meta["needs_injection"]:
        yield
        return
    own = draws._noise

    def as_in_the_file(piece: Piece, call: int, shape: tuple[int, ...], seed: int) -> Tensor:
        name = piece.work.row.entry.name
        start = golden.arrays.get(f"inject/0/{name}/Q")
        if start is not None:
            return torch.from_numpy(start)[None]
        stored = golden.basis(moment["t"], name)
        index = next((v for k, v in stored.items() if k.startswith("ind")), None)
        if index is not None:
            order = torch.zeros(1, *shape, dtype=torch.float64)
            order[0, torch.from_numpy(index)] = torch.arange(len(index), 0, -1, dtype=torch.float64)
            return order
        basis = torch.from_numpy(stored["ortho"])
        basis = basis if tuple(basis.shape) == shape else basis.mT
        gaussian = getattr(piece.work.row.splits[piece.index][1].pipeline.selector, "draw", "") == "gaussian"
        return basis[None] * (shape[-1] ** 0.5 if gaussian else 1.0)

    draws._noise = as_in_the_file
    try:
        yield
    finally:
        draws._noise = own


@contextlib.contextmanager
def order_of(golden: Golden, moment: dict[str, int]) -> Iterator[None]:
    """Give selected atoms their order in the file. It matters if moments are kept by position and the reference does not fix the order."""
    if not golden.meta["order_sensitive"]:
        yield
        return
    own = Fft.refresh

    def in_the_files_order(self: Fft, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        after, order = own(self, x, state, step)
        chosen = set(after["index"][0].tolist())
        for key, value in golden.arrays.items():
            if key.startswith(f"basis/{moment['t']}/") and key.endswith("/indices") and set(value.tolist()) == chosen:
                return {"index": torch.from_numpy(value)[None]}, order
        raise AssertionError(f"step {moment['t']}: the file does not select the atoms {sorted(chosen)}")

    Fft.refresh = in_the_files_order  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fft.refresh = own  # type: ignore[method-assign]
