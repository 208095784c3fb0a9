"""Rules that replace a matrix by its polar factor, exactly or by Newton-Schulz iterations."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from torch import Tensor

from .. import linalg
from ..algebra import Dim, Rule, RuleTraits, State, Step
from ..linalg import polar
from ..linalg.bounds import Bound
from ..registry import register

Named = Literal["keller", "quintic", "cubic", "classical", "cans", "aol", "dion", "deepseek"]
ComputeDtype = Literal["auto", "input", "bfloat16", "float16", "float32", "float64"]


def _to_tuples(value: Any) -> Any:
    """Turn the lists of YAML into the tuples that a frozen model needs."""
    return tuple(tuple(p) if isinstance(p, list) else p for p in value) if isinstance(value, list) else value


Coefficients = Annotated[Named | tuple[tuple[float, float, float], ...], BeforeValidator(_to_tuples)]


def _quick(x: Tensor) -> torch.dtype:
    """The dtype in which this device multiplies fastest. A CPU without bfloat16 instructions is 40x slower in bfloat16 than in float32."""
    if x.dtype == torch.float64:
        return x.dtype
    slow = x.device.type == "cpu" and not linalg.cpu_has_bfloat16()
    return torch.float32 if slow else torch.bfloat16


@register
class Orthogonalize(Rule):
    """`U V'` of `X = U S V'`: by Newton-Schulz (Muon), Polar Express (arXiv:2505.16932) or an exact SVD (arXiv:2505.24749).

    Newton-Schulz first divides X by its Frobenius norm or a closer `bound` of its largest singular value (arXiv:2506.10935, 2512.04632).
    """

    kind: Literal["orthogonalize"] = "orthogonalize"
    method: Literal["newton_schulz", "polar_express", "svd"] = Field(
        "newton_schulz", description="The method that computes the polar factor; `svd` is exact."
    )
    steps: PositiveInt = Field(5, description="Iterations of Newton-Schulz or Polar Express.")
    coefficients: Coefficients = Field(
        "keller", description="The polynomials of `newton_schulz`: a named schedule, or a list of [a, b, c] whose last entry is repeated."
    )
    safety: float = Field(1.02, ge=1.0, lt=2.0, description="The largest singular value that `polar_express` and `cans` must tolerate.")
    bound: Bound = Field(
        "frobenius",
        description="What divides the matrix before the iteration. `schatten4`: the Schatten-4 norm. `spectral`: the largest singular "
        "value, by power iterations. `aol`: a number for each row of the short side (of a square matrix: its rows), as the coefficients "
        "`aol` need it; this changes the polar factor.",
    )
    power_iterations: PositiveInt = Field(8, description="Power iterations of bound `spectral`.")
    eps: float = Field(1e-7, ge=0.0, description="Guards the division by the Frobenius norm.")
    eps_floor: bool = Field(False, description="Divide by max(norm, eps) instead of norm + eps.")
    margin: float = Field(1.0, ge=1.0, description="Divide by this multiple of the Frobenius norm; the coefficients `dion` need 1.02.")
    dtype: ComputeDtype = Field(
        "auto",
        description="Dtype of the iteration; `auto`: float64 for float64, else bfloat16; float32 on a CPU without bfloat16 products; "
        "`input`: that of the matrix.",
    )

    @model_validator(mode="after")
    def _polynomials_fit(self) -> Orthogonalize:
        if self.method != "newton_schulz" and self.coefficients != "keller":
            raise ValueError(f"`coefficients` belong to method newton_schulz; method {self.method} has its own")
        if not self.coefficients:
            raise ValueError("`coefficients` is an empty list; give at least one [a, b, c]")
        if self.coefficients == "aol" and self.bound != "aol":
            raise ValueError("coefficients 'aol' turn some directions around unless rows are scaled for them; use `bound: aol`")
        if self.method == "svd" and self.bound != "frobenius":
            raise ValueError("method svd is exact and needs no `bound`; leave it out, or use method newton_schulz")
        if self.bound != "frobenius" and self.margin != 1:
            raise ValueError("`margin` multiplies the Frobenius norm, and another bound replaces that; leave out `margin` or `bound`")
        if self.bound != "spectral" and "power_iterations" in self.model_fields_set and self.power_iterations != 8:
            raise ValueError("`power_iterations` belong to `bound: spectral`; leave them out, or use that bound")
        return self

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return RuleTraits(scale_free=True, decomposes=self.method == "svd", reads_grad=False, waits=self.method == "svd")

    def flops(self, rows: Dim, cols: Dim) -> float:
        k, l = sorted((rows.size, cols.size))  # noqa: E741
        if self.method == "svd":
            return 8.0 * l * k * k + 20.0 * k**3
        named = {"auto": torch.bfloat16, "input": torch.float32}
        probing = 16.0 * k * k * (self.power_iterations + 1) if self.bound == "spectral" else 0.0
        return probing + polar.flops(k, l, self._polynomials(), named.get(self.dtype) or getattr(torch, self.dtype))

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        return self.orthogonalized(x), {}

    def _polynomials(self) -> tuple[polar.Polynomial, ...]:
        name = "polar_express" if self.method == "polar_express" else self.coefficients
        return polar.schedule(name, self.steps, self.safety if name in ("polar_express", "cans") else 1.0)

    def _dtype(self, x: Tensor) -> torch.dtype:
        if self.dtype == "input":
            return x.dtype
        dtype: torch.dtype = _quick(x) if self.dtype == "auto" else getattr(torch, self.dtype)
        return dtype

    def _divisor(self) -> dict[str, Any]:
        return {} if self.bound == "frobenius" else {"bound": self.bound, "power_iterations": self.power_iterations}

    def orthogonalized(self, x: Tensor) -> Tensor:
        """The polar factor of a stack, in the dtype of `x`."""
        if self.method == "svd":
            return polar.polar(x)
        guards: dict[str, Any] = {"eps": self.eps, "floor": self.eps_floor, "margin": self.margin}
        o = polar.newton_schulz(x, self._polynomials(), dtype=self._dtype(x), **guards, **self._divisor())
        # Row-major as weights are: the update of the weight then reads it faster.
        return o.to(x.dtype, memory_format=torch.contiguous_format).contiguous()


@register
class Muon(Orthogonalize):
    """`s O`, `O = UV'` of X, with s by `norm`: `sqrt(mn) / (|O|_F + norm_eps)`, so that an entry has root mean square 1; 1 for `none`;
    `<O, X>`, the sum of the singular values, for `nuclear` (PolarGrad, arXiv:2505.21799); `|X|_F` for `signal` (NAMO, arXiv:2602.17080).
    """

    kind: Literal["muon"] = "muon"  # type: ignore[assignment]
    norm: Literal["rms", "none", "nuclear", "signal"] = Field(
        "rms",
        description="Scale the result to root mean square 1 per entry, leave it as it is, or multiply it by the nuclear norm <O, X> or "
        "the Frobenius norm of the signal X.",
    )
    norm_eps: float = Field(1e-8, ge=0.0, description="Added to the norm that divides the result of `norm: rms`.")

    def traits(self, rows: Dim, cols: Dim) -> RuleTraits:
        return super().traits(rows, cols)._replace(scale_free=self.norm in ("rms", "none"))

    def apply(self, x: Tensor, grad: Tensor, state: State, step: Step) -> tuple[Tensor, State]:
        o = self.orthogonalized(x)
        if self.norm != "none":
            factor = self._factor(o, x)
            o = o.mul_(factor) if o is not x else o * factor
        return o, {}

    def _factor(self, o: Tensor, x: Tensor) -> Tensor:
        """The scale s of every matrix, `(B, 1, 1)`."""
        match self.norm:
            case "nuclear":
                return (o * x).sum((-2, -1), keepdim=True)
            case "signal":
                return linalg.norm(x)
        return linalg.ratio(math.sqrt(x.size(-2) * x.size(-1)), linalg.norm(o), self.norm_eps)
