"""The spec that fits a budget, with the fewest losses.

The search takes these steps in turn, each on top of those before it, and stops at the first spec that fits:

    1. the spec as it is
    2. first moments in bf16
    3. all moments in 8 bits
    4. moments of pipelines that update entries one by one, such as AdamW's, in 4 bits
    5. lower ranks, all by one factor, the largest that fits, but at least half of each
    6. all moments in 4 bits, with the largest rank that fits

The order follows the measurements in docs/memory.md. State in bf16 or 8 bits changes the loss by less than the seed does. So do 4 bits for
AdamW, but not for moments in a subspace or before an orthogonalization. Half of the rank costs GaLore as much as 4 bits do, and 4 bits cost
COSMOS twice that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..plan import Entry, Plan, make_plan
from ..spec import Spec, load_spec
from .budget import Budget, BudgetError
from .costs import Costs, costs_of
from .knobs import Storage, lowered, ranks, shares, stored, values_at

STORAGES = (
    ("first moments in bf16", Storage("bf16", "fp32")),
    ("moments in 8 bits", Storage("8bit", "8bit")),
    ("AdamW's moments in 4 bits", Storage("8bit", "8bit", "4bit")),
)
LAST = ("all moments in 4 bits", Storage("4bit", "4bit"))

HALF = 0.5  # the smallest factor of the ranks before moments are stored in 4 bits

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A step of the search: overrides with the values before and after, and the bytes of the plan after it."""

    what: str
    before: Overrides
    after: Overrides
    costs: Costs


@dataclass(frozen=True)
class Fitted:
    """A spec within a budget. `turns` is empty if the spec fits as it is."""

    spec: Spec
    plan: Plan
    costs: Costs
    start: Costs
    turns: tuple[Turn, ...]


def fit(spec: Spec, entries: Sequence[Entry], budget: Budget, *, max_rank: int | None = None) -> Fitted:
    """The spec with the largest rank and the widest state that keeps within a budget.

    Args:
        max_rank: The rank from which the search begins, for selectors with a whole number of columns; None: those of the spec.

    Raises:
        BudgetError: Nothing fits; the message gives the size of the smallest candidate.
    """
    return _Search(entries, budget).run(spec, max_rank)


@dataclass
class _Search:
    """The candidates for one model and one budget."""

    entries: Sequence[Entry]
    budget: Budget
    turns: list[Turn] = field(default_factory=list)
    known: dict[Any, Any] = field(default_factory=dict)  # peaks of temporaries by shapes

    def run(self, spec: Spec, max_rank: int | None) -> Fitted:
        first = spec
        if max_rank is not None:
            first = load_spec(spec, raised(spec, self.plan(spec), max_rank))
        start = self.costs(first)
        for _ in self._steps(first):
            if self.fits(self.plan(self.spec)):
                return Fitted(self.spec, self.plan(self.spec), self.costs(self.spec), start, tuple(self.turns))
        raise BudgetError(_too_small(self.budget, self.costs(self.spec), self.spec))

    def _steps(self, spec: Spec) -> Iterator[None]:
        """Each step of the search leaves its candidate in `self.spec`."""
        self.spec = spec
        yield
        for what, storage in STORAGES:
            yield from self._turn(what, stored(self.spec, self.plan(self.spec), storage))
        wide = self.spec, len(self.turns)
        yield from self._lower_ranks(least=HALF)
        self.spec, self.turns = wide[0], self.turns[: wide[1]]
        yield from self._turn(LAST[0], stored(self.spec, self.plan(self.spec), LAST[1]))
        yield from self._lower_ranks()

    def _lower_ranks(self, least: float = 0.0) -> Iterator[None]:
        """The largest ranks that fit, or the smallest of all. `least`: the smallest factor."""
        spec, found = self.spec, ranks(self.spec, self.plan(self.spec))
        factors = [share for share in shares(found) if share >= least]
        low, high = 0, len(factors) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self.fits(self.plan(load_spec(spec, lowered(found, factors[middle]))))
            low, high = (low, middle) if fits else (middle + 1, high)
        if factors:
            yield from self._turn("lower rank", lowered(found, factors[low]))

    def _turn(self, what: str, after: Mapping[str, Any]) -> Iterator[None]:
        """Set values of the spec, if there are any to set."""
        if after:
            before, self.spec = values_at(self.spec, after), load_spec(self.spec, after)
            self.turns.append(Turn(what, before, dict(after), self.costs(self.spec)))
            yield

    def plan(self, spec: Spec) -> Plan:
        return make_plan(spec, self.entries)

    def costs(self, spec: Spec) -> Costs:
        return costs_of(self.plan(spec), known=self.known)

    def fits(self, plan: Plan) -> bool:
        bound = self.budget.state_bound(plan.adamw_bytes)
        if bound is not None and plan.total_bytes + sum(plan.constants.values()) > bound:
            return False
        return self.budget.training is None or costs_of(plan, known=self.known).training_bytes <= self.budget.training


def raised(spec: Spec, plan: Plan, max_rank: int) -> Overrides:
    """Overrides that bring the largest rank of a spec to `max_rank`, and all others by the same factor.

    Raises:
        BudgetError: No selector has a whole number of columns.
    """
    whole = [rank for rank in ranks(spec, plan) if rank.value >= 1]
    if not whole:
        raise BudgetError(f"--max-rank: no selector of '{spec.name}' has a rank that is a number of columns; leave the option out")
    most = max(rank.value for rank in whole)
    return {rank.path: max(1, round(rank.value * max_rank / most)) for rank in whole}


def _too_small(budget: Budget, least: Costs, spec: Spec) -> str:
    """The message for a budget into which nothing fits."""
    bound = budget.state_bound(least.adamw_bytes)
    wanted = []
    if budget.training is not None:
        wanted.append(f"{_gib(budget.training)} for training")
    if bound is not None:
        wanted.append(f"{_gib(bound)} for the state")
    parts = {
        "weights": least.weight_bytes,
        "gradients": least.gradient_bytes,
        "state": least.held_bytes,
        "temporaries": least.temporaries,
    }
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    text = (
        f"no variant of '{spec.name}' fits into {' and '.join(wanted)}. The smallest needs {_gib(least.training_bytes)} without "
        f"activations: {listed}"
    )
    if budget.training is not None and least.weight_bytes + least.gradient_bytes > budget.training:
        return text + ". Weights and gradients alone are too large: use --dtype bfloat16, `step_in_backward`, or several GPUs"
    return text + ". Give a larger budget, or choose another preset"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
