"""A pipeline for matrices of one shape: its dimensions, its rules place by place, its state. No mathematics; see `frame`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Self, TypeVar

from ..schedules import Scheduled
from . import storage
from .core import Dim, Rule, Selector, SelectorTraits, Slot, State
from .pipeline import Pipeline, Values, scheduled, with_values
from .storage import Codes, StateDtype
from .weight_rule import WeightRule

R = TypeVar("R", bound=Rule | WeightRule)

KEPT = 8  # results for other numbers that are kept, so that memory does not grow with the steps
# Answers that other numbers do not change.
SAME = ("inner", "opens", "has_complement", "selector_traits", "primes", "refreshes_first", "slots", "wanted", "codes")


@dataclass(frozen=True)
class Shaped:
    """A pipeline for matrices of `rows` x `cols`, in the working orientation. `turned`: this is the transpose of the weight's
    orientation.
    """

    pipeline: Pipeline
    rows: Dim
    cols: Dim
    turned: bool

    @classmethod
    def of(cls, pipeline: Pipeline, rows: int, cols: int, modes: tuple[int, ...] = ()) -> Self:
        """The pipeline for weights of `rows` x `cols`; `modes`: the sizes of the dimensions that were joined into the columns."""
        side: str = pipeline.orient
        if side in ("short", "long"):
            long = "left" if rows > cols else "right"
            short = "right" if rows > cols else "left"
            side = pipeline.square if rows == cols else (short if side == "short" else long)
        if side == "left":
            return cls(pipeline, Dim("rows", cols, modes=modes), Dim("cols", rows), turned=True)
        return cls(pipeline, Dim("rows", rows), Dim("cols", cols, modes=modes), turned=False)

    def at(self, values: Values) -> Self:
        """The same with other numbers in its pipeline, which must not change its state. The last few results are kept."""
        if not values:
            return self
        made: Self = recent(self.memo.setdefault("at", {}), values, lambda: self._with(values))
        return made

    def _with(self, values: Values) -> Self:
        made = replace(self, pipeline=with_values(self.pipeline, values))
        vars(made).update({name: getattr(self, name) for name in SAME})
        return made

    @cached_property
    def scheduled(self) -> tuple[tuple[str, Scheduled, str], ...]:
        """The numbers that schedules change from step to step: dotted path, component and field. A selector follows `every` by itself."""
        found = scheduled(self.pipeline)
        return tuple((path, part, name) for path, _, part, name in found if not (isinstance(part, Selector) and name == "every"))

    @cached_property
    def inner(self) -> tuple[Dim, Dim]:
        """The dimensions of coordinates."""
        return self.pipeline.selector.coords(self.rows, self.cols)

    @property
    def own(self) -> tuple[Dim, Dim]:
        """The dimensions of the weight in its own orientation."""
        return (self.cols, self.rows) if self.turned else (self.rows, self.cols)

    @property
    def rank(self) -> int | None:
        """The rank after clamping; None without a subspace."""
        return min(self.inner[0].size, self.inner[1].size) if self.opens else None

    @cached_property
    def opens(self) -> bool:
        """True if there is a subspace."""
        return self.inner[0].size * self.inner[1].size > 0

    @cached_property
    def has_complement(self) -> bool:
        """True if the complement makes an update. The residual of a full basis is only round-off, so it makes none."""
        p = self.pipeline
        if not p.complement or not p.mix.ever_positive("complement"):
            return False
        full = (self.inner[0].size, self.inner[1].size) == (self.rows.size, self.cols.size) and not self.selector_traits.gated
        return not full or p.complement[0].traits(self.rows, self.cols).takes_whole

    @property
    def needs_weight(self) -> bool:
        """True if the update depends on the weights."""
        p = self.pipeline
        return bool(p.apply) or p.decay == "coupled" or (self.opens and p.selector.source == "weight")

    @cached_property
    def selector_traits(self) -> SelectorTraits:
        """The traits of the selector."""
        return self.pipeline.selector.traits()

    @cached_property
    def reads_lr(self) -> bool:
        """True if an update depends on the learning rate beside the factor of the whole update."""
        return bool(self.pipeline.apply) or (self.opens and self.selector_traits.reads_lr)

    @cached_property
    def primes(self) -> bool:
        """True if the first gradient only sets the basis."""
        return self.opens and self.selector_traits.primes

    @cached_property
    def refreshes_first(self) -> bool:
        """True if a refresh needs no result of the update, and therefore runs before everything else: it may fail."""
        return self.opens and self.pipeline.selector.timing == "before" and self.pipeline.selector.source != "momentum"

    def places(self) -> Iterator[tuple[str, Rule | WeightRule, Dim, Dim]]:
        """Every rule that runs, with the key of its state and the dimensions of its signal."""
        p, (rows, cols) = self.pipeline, (self.rows, self.cols)
        yield from ((key, rule, rows, cols) for key, rule in keyed("momentum", p.momentum))
        if self.opens:
            yield from ((key, rule, *self.inner) for key, rule in keyed("inside", p.inside))
        if self.has_complement:
            yield from ((key, rule, rows, cols) for key, rule in keyed("complement", p.complement))
        yield from ((key, rule, *self.own) for key, rule in keyed("finish", p.finish))
        yield from ((key, rule, *self.own) for key, rule in keyed("apply", p.apply))

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """The state of one matrix, by dotted key."""
        slots: dict[str, Slot] = {}
        if self.pipeline.feedback is not None:
            slots["feedback.error"] = Slot(self.own)
        if self.opens:
            chosen = self.pipeline.selector.slots(self.rows, self.cols)
            slots |= {f"selector.{name}": slot for name, slot in chosen.items()}
        for key, rule, rows, cols in self.places():
            slots |= {f"{key}.{name}": slot for name, slot in rule.slots(rows, cols).items()}
        return slots

    @cached_property
    def wanted(self) -> dict[str, StateDtype]:
        """The storage that `state_dtype` asks for, by dotted key of the slot."""
        chosen = self.pipeline.state_dtype
        rules = [key for key in self.slots if not key.startswith("selector.")] if chosen else []
        return {key: chosen[name] for key in rules if (name := key.rpartition(".")[2]) in chosen}

    @cached_property
    def codes(self) -> dict[str, Codes]:
        """The slots stored as codes, by dotted key: those that `state_dtype` names and whose size allows it."""
        found = {}
        for key, wanted in self.wanted.items():
            slot = self.slots[key]
            how = storage.codes(wanted, prod(slot.shape), signed=slot.holds == "signed")
            if how is not None:
                found[key] = how
        return found

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """Answers that other rooms derive from this pipeline and shape."""
        return {}


def recent(known: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """The value of a key, made if it is not among the `KEPT` values used last."""
    value = known.pop(key) if key in known else make()
    if len(known) == KEPT:
        del known[next(iter(known))]
    known[key] = value
    return value


def keyed(place: str, rules: Sequence[R]) -> list[tuple[str, R]]:
    """Rules with the first part of their state's keys: the place, and a number if several rules share it."""
    return [(place if len(rules) == 1 else f"{place}.{i}", rule) for i, rule in enumerate(rules)]


def joined(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Neighbouring dimensions joined from the left while their product stays at most `most`."""
    out: list[int] = []
    for size in sizes:
        if out and out[-1] * size <= most:
            out[-1] *= size
        else:
            out.append(size)
    return tuple(out)


def part(key: str, state: State) -> State:
    """The state of one rule or of the selector, by its own slot names."""
    prefix = key + "."
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def store(key: str, state: State, new: State) -> None:
    """Write the state of one rule or of the selector into the state of the pipeline."""
    for name, value in state.items():
        new[f"{key}.{name}"] = value
