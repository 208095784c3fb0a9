"""Eigenbases of both sides of the gradient (SOAP), or of every mode of a convolution."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from .. import linalg
from ..algebra import Basis, Dim, Order, Selector, SelectorFlops, SelectorTraits, Side, Slot, State, Step
from ..algebra.shaped import joined
from ..registry import register


class _Mode(NamedTuple):
    """One mode of the matrix; `axis`: its index among the sizes `(rows..., cols...)`."""

    name: str
    side: str
    axis: int
    size: int
    rotated: bool


@register
class KronEigen(Selector):
    """`L <- beta L + (1 - beta) GG', R <- beta R + (1 - beta) G'G; Q <- qr(P Q)` for P in {L, R}, Q first by eigh (arXiv:2409.11321).

    Columns are sorted by their estimated eigenvalues before each QR, and kept second moments are permuted with them. A side longer than
    `max_dim` gets no basis, nor does the longer side with `sides: short`. If the columns are several joined dimensions (route
    `view: modes`), each dimension gets a basis; neighbours are merged while their product is at most `merge`.

    With `covariance: kl` each side measures the gradient whitened by the other side (KL-Shampoo, arXiv:2509.03378), both from the bases Q
    and eigenvalues `lambda = diag(Q'PQ)` of the last refresh:

        L <- beta L + (1 - beta) / n  G Q_R max(lambda_R, floor mean(lambda_R))^-1 Q_R' G'        and likewise R, with G' and 1 / m
    """

    kind: Literal["kron_eigen"] = "kron_eigen"
    every: PositiveInt | None = Field(10, description="Updates between refreshes.")
    offset: NonNegativeInt | Literal["spread"] = Field(
        1,
        description="Refresh on update t if t - 1 + offset is a multiple of `every`; `spread` derives the offset from the "
        "parameter's name, so that refreshes are spread over the steps.",
    )
    timing: Literal["before", "after"] = Field(
        "after", description="Refresh before the update is made, or after it; with `after`, the first gradient only sets the basis."
    )
    skip_first: bool = Field(
        False,
        description="The first gradient only sets the basis, also with `timing: before`. In its own eigenbasis most of its coordinates are "
        "round-off, which Adam would divide by round-off.",
    )
    beta: float = Field(0.95, ge=0.0, lt=1.0, description="Decay rate of the covariances.")
    debias: bool = Field(False, description="Correct the bias of the covariances.")
    covariance: Literal["gradient", "kl"] = Field(
        "gradient",
        description="Covariances of the gradient, or for each side those of the gradient whitened by the others (KL-Shampoo).",
    )
    floor: float = Field(
        1e-4, gt=0.0, le=1.0, description="The least eigenvalue by which `covariance: kl` divides, as a share of their mean."
    )
    start: float = Field(1.0, gt=0.0, description="The eigenvalues by which `covariance: kl` divides the first gradient.")
    solver: Literal["power", "eigh"] = Field("power", description="One power iteration and QR from the present basis, or eigh.")
    sort: bool = Field(True, description="Sort columns by eigenvalue before the QR, and permute kept coordinates with them.")
    sides: Literal["both", "short"] = Field("both", description="A basis for each side, or for the shorter one (rows if square).")
    max_dim: PositiveInt = Field(10000, description="The longest side that gets a basis.")
    merge: PositiveInt = Field(1, description="Merge neighbouring modes while their product is at most this.")

    def traits(self) -> SelectorTraits:
        return SelectorTraits(primes=self.timing == "after" or self.skip_first, waits=True, host_clock=self.debias)

    def modes(self, rows: Dim, cols: Dim) -> list[_Mode]:
        """The modes of a matrix, in the order of its sizes."""
        short = "rows" if rows.size <= cols.size else "cols"
        out: list[_Mode] = []
        for side, dim in (("rows", rows), ("cols", cols)):
            for i, size in enumerate(joined(dim.modes, self.merge) or (dim.size,)):
                name = f"{side}{i}" if dim.modes else side
                wanted = 1 < size <= self.max_dim and (self.sides == "both" or side == short)
                out.append(_Mode(name, side, len(out), size, wanted))
        return out

    def coords(self, rows: Dim, cols: Dim) -> tuple[Dim, Dim]:
        return Dim("eigen_rows", rows.size, eigen=True), Dim("eigen_cols", cols.size, eigen=True)

    def slots(self, rows: Dim, cols: Dim) -> dict[str, Slot]:
        out: dict[str, Slot] = {}
        for mode in self.modes(rows, cols):
            if mode.rotated:
                dim = Dim(mode.name, mode.size)
                out |= {f"{mode.name}.covariance": Slot((dim, dim)), f"{mode.name}.basis": Slot((dim, dim))}
                if self.covariance == "kl":
                    out[f"{mode.name}.eigenvalues"] = Slot((dim,), holds="unsigned")
        return out

    def flops(self, rows: Dim, cols: Dim) -> SelectorFlops:
        cost = 9.0 if self.solver == "eigh" else 2.0 + 8 / 3
        sizes = [m.size for m in self.modes(rows, cols) if m.rotated]
        products = sum(2.0 * size * rows.size * cols.size for size in sizes)  # one for each basis
        whitened = (len(sizes) - 1) * products if self.covariance == "kl" else 0.0
        return SelectorFlops(refresh=sum(cost * size**3 for size in sizes), observe=products + whitened, project=products)

    def basis(self, state: State, step: Step) -> Basis:
        modes = self.modes(step.rows, step.cols)
        return Basis(self._side("rows", modes, state), self._side("cols", modes, state))

    def _side(self, side: str, modes: list[_Mode], state: State) -> Side:
        factors = [state[f"{m.name}.basis"] if m.rotated else m.size for m in modes if m.side == side]
        if all(isinstance(f, int) for f in factors):
            return None
        return factors[0] if len(factors) == 1 and isinstance(factors[0], Tensor) else tuple(factors)

    def observe(self, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        # A refresh before the update has added the gradient already.
        return state if step.refresh and self.timing == "before" else self._accumulated(x, state, step)

    def refresh(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        if self.timing == "before":
            # A decomposition may fail, and the matrix is then computed again: the covariances must not be written over.
            state = self._accumulated(x, state, step._replace(in_place=False))
        new, order = self._turned(x, state, step)
        if self.covariance == "kl":
            for key in [key for key in new if key.endswith(".eigenvalues")]:
                p, q = (new[key.replace("eigenvalues", name)] for name in ("covariance", "basis"))
                new[key] = (q * linalg.mm(p, q)).sum(-2).clamp_min(0.0)
        return new, order

    def _turned(self, x: Tensor, state: State, step: Step) -> tuple[State, Order | None]:
        """The state with new bases, and the order of kept coordinates."""
        new = dict(state)
        orders: dict[str, Tensor] = {}
        modes = self.modes(step.rows, step.cols)
        if step.first and len(modes) == 2 and all(mode.rotated for mode in modes):  # the covariances are those of x alone
            new["rows.basis"], new["cols.basis"] = linalg.singular_bases(x)
            return new, None
        for mode in modes:
            if not mode.rotated:
                continue
            p, q = state[f"{mode.name}.covariance"], state[f"{mode.name}.basis"]
            if step.first or self.solver == "eigh":
                new[f"{mode.name}.basis"] = linalg.eigenbasis(p)
                continue
            turned = linalg.mm(p, q)
            # Estimates of directions without a gradient so far are round-off in random order. Set to 0, these directions keep their order.
            energy = (q * turned).sum(-2)  # diag(Q'PQ)
            energy = energy * (energy > mode.size * torch.finfo(p.dtype).eps * energy.amax(-1, keepdim=True))
            if self.sort:
                order = orders[mode.name] = energy.argsort(dim=-1, descending=True, stable=True)
                turned = turned.gather(-1, order.unsqueeze(-2).expand_as(turned))
            new[f"{mode.name}.basis"] = linalg.complete(turned)
        return new, self._order(orders, step) if orders else None

    def _accumulated(self, x: Tensor, state: State, step: Step) -> State:
        """The covariances with the gradient added; with `debias`, weighted so that they are averages from the first update on."""
        weight: float | Tensor = 1 - self.beta
        if self.debias:
            count = (step.t if step.on_device else step.t.item()) + (1 if self.traits().primes else 0)
            weight = (1 - self.beta) / (1 - self.beta**count)
        new = dict(state)
        modes = self.modes(step.rows, step.cols)
        sizes = [mode.size for mode in modes]
        for mode in modes:
            if mode.rotated:
                seen, share = x.reshape(-1, *sizes), weight
                if self.covariance == "kl":
                    seen, share = self._whitened(seen, mode, state, step), weight * mode.size / (x.size(-2) * x.size(-1))
                unfolded = seen.movedim(1 + mode.axis, 1).reshape(x.size(0), mode.size, -1)
                key = f"{mode.name}.covariance"
                if isinstance(weight, Tensor) or isinstance(share, Tensor):
                    new[key] = state[key] * (1 - weight) + linalg.symmetric(unfolded, unfolded.mT) * share
                else:
                    new[key] = linalg.symmetric(unfolded, unfolded.mT, state[key], beta=1 - weight, alpha=share, in_place=step.in_place)
        return new

    def _whitened(self, x: Tensor, mode: _Mode, state: State, step: Step) -> Tensor:
        """The gradient `(B, *sizes)` in the bases of all other modes, each coordinate divided by the root of its eigenvalue."""
        for other in self.modes(step.rows, step.cols):
            if other == mode or not other.rotated:
                continue
            if step.first:  # there is no basis yet
                x = x * self.start**-0.5
                continue
            values = state[f"{other.name}.eigenvalues"]
            least = self.floor * values.mean(-1, keepdim=True)
            root = linalg.divisor(torch.maximum(values, least)).rsqrt().unsqueeze(-2)
            moved = x.movedim(1 + other.axis, -1)
            turned = linalg.mm(moved.reshape(x.size(0), -1, other.size), state[f"{other.name}.basis"] * root)
            x = turned.reshape(moved.shape).movedim(-1, 1 + other.axis)
        return x

    def _order(self, orders: dict[str, Tensor], step: Step) -> Order:
        """The orders of the modes of a side as one order of its coordinates."""
        out: Order = {}
        for side, dim in (("rows", "eigen_rows"), ("cols", "eigen_cols")):
            index: Tensor | None = None
            for mode in self.modes(step.rows, step.cols):
                if mode.side != side:
                    continue
                any_order = next(iter(orders.values()))
                own = orders.get(mode.name)
                if own is None:
                    own = torch.arange(mode.size, device=any_order.device).expand(any_order.size(0), -1)
                index = own if index is None else (index.unsqueeze(-1) * mode.size + own.unsqueeze(-2)).flatten(1)
            assert index is not None
            out[dim] = index
        return out
