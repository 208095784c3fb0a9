"""Rules linear in the signal: moving averages, the identity, no update."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..algebra import Dim, Rule, RuleTraits, Slot, State, Step, Transport, averaged
from ..algebra.linear import S
from ..linalg import codes as blocks
from ..registry import register

Beta: float = Field(0.95, ge=0.0, lt=1.0, description="Decay rate of the average: the share of it that each update keeps.")
OnRefresh: Transport = Field("keep", description="Transport of the average when the subspace is refreshed.")


@register
class Ema(Rule):
    """`M <- beta M + (1 - beta) X`; the result is M or, with `nesterov`, `(1 - beta) X + beta M`."""

    kind: Literal["ema"] = "ema"
    beta: float = Beta
    nesterov: bool = Field(False, description="Look ahead: pass on the average after one more update with the same signal.")
    debias: bool = Field(False, description="Correct the bias: divide by the sum of the weights of the signals so far.")
    on_refresh: Transport = OnRefresh

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        return {"exp_avg": Slot((rows, cols), self.on_refresh)}

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False, elementwise=True, by_rows=True)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        m = averaged(state["exp_avg"], x, self.beta, step)
        out = x.lerp(m, self.beta) if self.nesterov else m
        if self.debias:
            clock = step.age if self.on_refresh == "reset" else step.t
            weights = 1 - self.beta ** (clock + 1 if self.nesterov else clock)
            out = out.div_(weights) if self.nesterov else out / weights  # with nesterov `out` is a new tensor
        return out, {"exp_avg": m}


@register
class HeavyBall(Rule):
    """`M <- beta M + X`; the result is M or, with `nesterov`, `X + beta M`. Polyak 1964.

    With `dampening` d, `M <- beta M + (1 - d) X` after a first `M = X`, as in `torch.optim.SGD`.

    With `state: int8` M is stored as 8-bit codes with one scale for each 128 entries (arXiv:2605.10335); the result is the M before it is
    rounded.
    """

    kind: Literal["heavy_ball"] = "heavy_ball"
    beta: float = Beta
    nesterov: bool = Field(False, description="Look ahead: pass on X + beta M.")
    debias: bool = Field(False, description="Correct the bias: divide by the sum of the weights of the signals so far.")
    dampening: float = Field(0.0, ge=0.0, lt=1.0, description="Multiply X by 1 minus this, after a first M = X, as `torch.optim.SGD` does.")
    on_refresh: Transport = OnRefresh
    state: Literal["float", "int8"] = Field("float", description="Store M in the dtype of computation, or in 8 bits by blocks.")

    @model_validator(mode="after")
    def _codes_stay(self) -> HeavyBall:
        if self.state == "int8" and self.on_refresh in ("project", "project_abs"):
            raise ValueError("`state: int8` cannot be rotated; use `on_refresh: keep` or `reset`, or `state: float`")
        return self

    @model_validator(mode="after")
    def _damps_a_plain_average(self) -> HeavyBall:
        if self.dampening and (self.nesterov or self.debias):
            raise ValueError("`dampening` goes with neither `nesterov` nor `debias`; leave it out, or use kind 'ema' with these options")
        return self

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False, by_rows=self.state == "float" or cols.size % blocks.BLOCK == 0)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        if self.state == "float":
            return {"momentum_buffer": Slot((rows, cols), self.on_refresh)}
        codes = Dim("blocks", -(-rows.size * cols.size // blocks.BLOCK))
        return {
            "momentum_buffer": Slot((rows, cols), self.on_refresh, torch.int8),
            "scale": Slot((codes,), self.on_refresh),
        }

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        before = state["momentum_buffer"]
        if self.state == "int8":
            before = blocks.from_codes(before, state["scale"])
        share = self._share(step)
        given = x if isinstance(share, float) and share == 1.0 else x * share
        m = torch.add(given, before, alpha=self.beta, out=before if step.in_place and self.state == "float" else None)
        kept = {"momentum_buffer": m}
        if self.state == "int8":
            kept["momentum_buffer"], kept["scale"] = blocks.to_codes(m)
        out = x.add(m, alpha=self.beta) if self.nesterov else m
        if self.debias:
            clock = step.age if self.on_refresh == "reset" else step.t
            weights = (1 - self.beta**clock) / (1 - self.beta)
            out = out.div_(1 + self.beta * weights) if self.nesterov else out / weights  # with nesterov `out` is a new tensor
        return out, kept

    def _share(self, step: Step) -> float | Tensor:
        """The weight of the signal: 1 at the first update of M, or if there is no dampening."""
        anew = self.on_refresh == "reset" and step.refresh
        if self.dampening == 0.0 or step.first or anew:
            return 1.0
        if step.on_device:
            return torch.where(step.t == 1, 1.0, 1 - self.dampening)
        return 1.0 if float(step.t) == 1.0 else 1 - self.dampening


@register
class Identity(Rule):
    """`X`: the signal is the update; as a complement, plain SGD on the residual."""

    kind: Literal["identity", "sgd"] = "identity"

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False, elementwise=True, by_rows=True, lazy=True)

    def apply(self, x: S, grad: S, state: State, step: Step) -> tuple[S, State]:
        return x, {}


@register
class Nothing(Rule):
    """`0`: the place makes no update and costs nothing."""

    kind: Literal["none"] = "none"

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(reads_grad=False, silent=True)

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return x.new_zeros(x.shape), {}
