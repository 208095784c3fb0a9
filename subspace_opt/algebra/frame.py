"""A pipeline: feedback, momentum, selection, the rule inside the subspace, the rule for its complement, mix, finish.

    G --> [feedback] --> [momentum ...] --> SPLIT( selector | inside ... | complement ... ) --> mix --> [finish ...] --> update

`Pipeline` is the spec of it, `Split` the same for matrices of one shape. `Split.apply` is pure: it is all the mathematics that runs
between a gradient and an update, on a stack of matrices, and it knows no concrete kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from . import linalg, storage
from .core import Basis, Coords, Dim, Rule, Selector, Slot, State, Step
from .pipeline import Pipeline
from .projection import add_lift, lift, project, same_storage
from .storage import Codes, StateDtype
from .transport import Change, places


class Product(NamedTuple):
    """An update that is not multiplied out: `left right + rest`, of `(B, m, r)`, `(B, r, n)` and, if there is one, `(B, m, n)`.

    Either factor may be indices `(B, r)` int64 instead, of the rows or columns to which the other belongs.
    """

    left: Tensor
    right: Tensor
    rest: Tensor | None = None

    @property
    def transposed(self) -> Product:
        return Product(_flipped(self.right), _flipped(self.left), None if self.rest is None else self.rest.mT)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.left, self.right) if self.rest is None else (self.left, self.right, self.rest)


@dataclass(frozen=True)
class Split:
    """A pipeline for matrices of one shape. `rows`, `cols`: in the working orientation; `turned`: that is the transpose."""

    pipeline: Pipeline
    rows: Dim
    cols: Dim
    turned: bool

    # --------------------------------------------------------------------------------------------------------- what it keeps

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

    @property
    def opens(self) -> bool:
        """Whether there is a subspace."""
        return self.inner[0].size * self.inner[1].size > 0

    @property
    def leaves(self) -> bool:
        """Whether an update is made from the complement: of a full basis nothing is left but round-off."""
        p = self.pipeline
        full = (self.inner[0].size, self.inner[1].size) == (self.rows.size, self.cols.size) and not p.selector.gated
        return bool(p.complement) and p.mix.complement > 0 and (not full or p.complement[0].takes_whole)

    @cached_property
    def elementwise(self) -> bool:
        """Whether every entry of a weight is updated by itself, so that a matrix may be cut anywhere."""
        plain = not self.opens and self.pipeline.feedback is None and not self.turned
        return plain and all(rule.elementwise for _, rule, _, _ in self.places())

    @cached_property
    def by_rows(self) -> bool:
        """Whether between refreshes every row of a weight is updated by itself, so that a tall matrix may be cut between rows."""
        p, selector = self.pipeline, self.pipeline.selector
        if self.turned or p.feedback is not None or not all(rule.by_rows(rows, cols) for _, rule, rows, cols in self.places()):
            return False
        if not self.opens:
            return True
        # Whether a residual is but round-off is asked of a whole matrix.
        asks = self.leaves and any(rule.scale_free for rule in p.complement)
        return self.basis_stands and self.inner[0] == self.rows and selector.every != 1 and not asks

    @cached_property
    def basis_stands(self) -> bool:
        """Whether between refreshes the selector learns nothing, and has one basis, of the columns."""
        selector = self.pipeline.selector
        still = type(selector).observe is Selector.observe and selector.keeps_basis and not selector.primes
        return still and set(selector.slots(self.rows, self.cols)) == {"basis"} and not selector.gated

    def cut(self, key: str, first: int, beyond: int) -> slice | None:
        """The part of a slot's first dimension that belongs to some rows of a matrix; None if they share all of it."""
        shape, side = self.slots[key].dims, self.rows.size
        if key.startswith("selector."):
            return None
        if shape[0] == self.rows:
            return slice(first, beyond)
        each = side * self.cols.size // shape[0].size  # entries that share a number, in row-major order
        return slice(first * self.cols.size // each, beyond * self.cols.size // each)

    @cached_property
    def decomposes(self) -> bool:
        """Whether a rule takes a decomposition at every update."""
        return any(rule.decomposes(rows, cols) for _, rule, rows, cols in self.places())

    @property
    def refreshes_first(self) -> bool:
        """Whether a refresh needs nothing that the update computes, and comes before all of it."""
        return self.opens and self.pipeline.selector.timing == "before" and self.pipeline.selector.source != "momentum"

    def fails_first(self, refresh: bool) -> bool:
        """Whether a decomposition that fails does so before anything else has been computed, at an update with a refresh or without."""
        return not self.decomposes and (not refresh or self.refreshes_first)

    @cached_property
    def in_coordinates(self) -> bool:
        """Whether between refreshes coordinates are all that an update takes from the gradient and gives to the weight."""
        p, selector = self.pipeline, self.pipeline.selector
        if not self.factored or self.leaves or p.momentum or p.feedback is not None or p.decay == "coupled" or self.decomposes:
            return False
        return self.basis_stands and self.inner[0] == self.rows and selector.every != 1 and selector.source == "gradient"

    @cached_property
    def factored(self) -> bool:
        """Whether the update is a lift, and may be had as a product that is not multiplied out: nothing but numbers follows."""
        p = self.pipeline
        moment = Step(t=torch.ones(()), age=torch.ones(()))
        numbers = all(rule.multiplier(self.rows.size, self.cols.size, moment) is not None for rule in p.finish)
        alone = not self.leaves or (self.passes and p.mix.complement == 1)
        return self.opens and alone and bool(p.inside) and p.mix.inside > 0 and numbers

    @property
    def passes(self) -> bool:
        """Whether what the subspace leaves of the signal is its update: then one lift makes both."""
        return self.leaves and all(rule.passes for rule in self.pipeline.complement)

    @property
    def needs_weight(self) -> bool:
        """Whether `apply` has to be given the weights."""
        return self.pipeline.decay == "coupled" or (self.opens and self.pipeline.selector.source == "weight")

    @property
    def primes(self) -> bool:
        """Whether the first gradient only sets the basis."""
        return self.opens and self.pipeline.selector.primes

    def places(self) -> Iterator[tuple[str, Rule, Dim, Dim]]:
        """Every rule with its key and the dimensions it works on."""
        p, (rows, cols) = self.pipeline, (self.rows, self.cols)
        yield from ((key, rule, rows, cols) for key, rule in _keyed("momentum", p.momentum))
        if self.opens:
            yield from ((key, rule, *self.inner) for key, rule in _keyed("inside", p.inside))
        if self.leaves:
            yield from ((key, rule, rows, cols) for key, rule in _keyed("complement", p.complement))
        yield from ((key, rule, *self.own) for key, rule in _keyed("finish", p.finish))

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
        """How slots are to be stored that `state_dtype` names, by dotted key."""
        chosen = self.pipeline.state_dtype
        rules = [key for key in self.slots if not key.startswith("selector.")] if chosen else []
        return {key: chosen[name] for key in rules if (name := key.rpartition(".")[2]) in chosen}

    @cached_property
    def codes(self) -> dict[str, Codes]:
        """The slots that are kept as codes, by dotted key: of those that are to be, the ones that are fit for it."""
        found = {}
        for key, wanted in self.wanted.items():
            slot = self.slots[key]
            how = storage.codes(wanted, prod(slot.shape), signed=slot.holds == "signed")
            if how is not None:
                found[key] = how
        return found

    @cached_property
    def flops(self) -> tuple[float, float]:
        """Floating-point operations of one update of one matrix: between refreshes, and of a refresh."""
        p, selector, dims = self.pipeline, self.pipeline.selector, (self.rows, self.cols)
        rules = sum(rule.flops(rows, cols) for _, rule, rows, cols in self.places())
        if not self.opens:
            return rules, 0.0
        own_signal = bool(p.momentum) or p.decay == "coupled"  # gradient and signal are projected apart
        lifts = self.leaves + (p.mix.inside > 0 and bool(p.inside)) + (p.feedback is not None)
        moved = (1 + own_signal + lifts) * selector.project_flops(*dims)
        return rules + moved + selector.observe_flops(*dims), selector.refresh_flops(*dims)

    @cached_property
    def kernel(self) -> tuple[str, Rule] | None:
        """The rule that alone makes the update and has a kernel, with the key of its state; decay comes before the update."""
        p = self.pipeline
        alone = not (self.opens or p.momentum or p.finish) and p.feedback is None and p.mix.complement == 1 and len(p.complement) == 1
        return ("complement", p.complement[0]) if alone and p.decay == "before" and p.complement[0].has_kernel else None

    # ------------------------------------------------------------------------------------------------------------ what it does

    def apply(self, grad: Tensor, weight: Tensor | None, state: State, step: Step) -> tuple[Tensor, State]:
        """The update of a stack, to be subtracted times lr, and the new state.

        Args:
            grad: `(B, m, n)` in the weight's own orientation.
            weight: the weights, if the pipeline `needs_weight`.
            state: one tensor `(B, *dims)` for each of `slots`.
        """
        direction, factor, new = self.direction(grad, weight, state, step)
        assert isinstance(direction, Tensor)  # factors come only where they are asked for
        return direction if factor == 1.0 else direction * factor, new

    def direction(
        self, grad: Tensor, weight: Tensor | None, state: State, step: Step, *, factored: bool = False
    ) -> tuple[Tensor | Product, float, State]:
        """`apply` without the last multiplications by numbers, which the update of the weight can take along, and their product.

        With `factored` the update of a pipeline that is so may come as a product.
        """
        p, new = self.pipeline, dict(state)
        if p.feedback is not None:
            # In the place of what was not transmitted, which is made anew from it, unless a refresh may fail and want it back.
            overwrites = step.in_place and not (step.refresh and p.selector.decomposes)
            grad = state["feedback.error"].add_(grad) if overwrites else grad + state["feedback.error"]
        source = g = self._turn(grad)
        weight = None if weight is None else self._turn(weight)
        sources = {"gradient": source, "weight": weight}
        fresh = cut = None
        if step.refresh and self.refreshes_first:  # before anything is written to: it is what may fail
            fresh, cut = self._refresh(_given(sources[p.selector.source]), new, step)
        if p.decay == "coupled":
            g = g + step.decay * _given(weight)  # rules see it, selectors do not
        x = self._run("momentum", p.momentum, g, g, new, step)
        if not self.opens:
            update = self._run("complement", p.complement, x, g, new, step)
            update = update if p.mix.complement == 1 else update * p.mix.complement
        else:
            own = self._split(x, g, sources | {"momentum": x}, fresh, cut, new, step, factored=factored and self.factored)
            if isinstance(own, Product):
                factor = self._numbers(step) * (p.mix.inside if own.rest is None else 1.0)
                return own.transposed if self.turned else own, factor, new
            update = own
        update, g = self._turn(update), self._turn(g)
        finish = _keyed("finish", p.finish)
        factor = 1.0
        while finish and (last := finish[-1][1].multiplier(update.size(-2), update.size(-1), step)) is not None:
            factor *= last
            finish.pop()
        alone = update.size(0) == 1 and update.device.type == "cpu"  # then a number can be read without waiting
        update = self._through(finish[:-1] if alone else finish, update, g, new, step, final=True)
        if alone and finish:
            number = finish[-1][1].measured(update)
            if number is None:
                update = self._through(finish[-1:], update, g, new, step, final=True)
            else:
                factor *= number.item()
        return update, factor, new

    def inner_direction(self, c: Tensor, state: State, step: Step) -> tuple[Tensor, float, State]:
        """`direction` in coordinates, of a pipeline that is `in_coordinates`, at an update without a refresh: lifted, it is the same."""
        p, new = self.pipeline, dict(state)
        inner = self._run("inside", p.inside, c, c, new, step)
        return inner, p.mix.inside * self._numbers(step), new

    def _numbers(self, step: Step) -> float:
        """What rules in `finish` multiply by, all of which only multiply."""
        rows, cols = (self.cols.size, self.rows.size) if self.turned else (self.rows.size, self.cols.size)
        return prod(rule.multiplier(rows, cols, step) or 0.0 for rule in self.pipeline.finish)

    def prime(self, grad: Tensor, weight: Tensor | None, state: State, step: Step) -> State:
        """The state after a first gradient that only sets the basis."""
        new = dict(state)
        g = self._turn(grad)
        source = {"gradient": g, "momentum": g, "weight": None if weight is None else self._turn(weight)}
        x = _given(source[self.pipeline.selector.source])
        c = x.new_zeros(x.size(0), *(d.size for d in self.inner))
        self._store("selector", self.pipeline.selector.observe(x, c, _part("selector", new), step), new)
        self._refresh(x, new, step)
        return new

    def _split(
        self,
        x: Tensor,
        g: Tensor,
        sources: dict[str, Tensor | None],
        fresh: Basis | None,
        cut: Tensor | None,
        new: State,
        step: Step,
        *,
        factored: bool,
    ) -> Tensor | Product:
        """Select, project, the rules inside, those outside, lift, mix; then feedback and what the selector learns."""
        p, selector = self.pipeline, self.pipeline.selector
        source = _given(sources[selector.source])
        if step.refresh and not self.refreshes_first and (selector.timing == "before" or step.first):
            fresh, cut = self._refresh(source, new, step)
        basis = selector.basis(_part("selector", new), step) if fresh is None else fresh

        handed = new.pop("selector.coords", None)  # of the source
        c = handed if handed is not None and x is source else project(x, basis)
        cg = c if g is x else handed if handed is not None and g is source else project(g, basis)
        inner = self._run("inside", p.inside, c, cg, new, step)
        update: Tensor | Product
        u = basis.alone if factored else None
        if self.passes and p.inside and p.mix.inside > 0:
            # X less its part in the subspace, and in its place the update: one lift does both.
            own = p.mix.complement
            change = (inner if p.mix.inside == 1 else inner * p.mix.inside).sub(c, alpha=own)
            update = add_lift(x, change, basis, own=own) if u is None else Product(change, _flipped(u), x)
        elif u is not None:
            update = Product(inner, _flipped(u))
        else:
            outer = self._outside(x, g, Coords(c, cg, inner), basis, new, step) if self.leaves else None
            update = self._mixed(inner, outer, basis, x, g, new)

        seen = cg if source is g else c if source is x else project(source, basis)
        self._store("selector", selector.observe(source, seen, _part("selector", new), step), new)
        if p.feedback is not None:
            read = (step.refresh and selector.timing == "after") or any(rule.uses_grad for rule in p.finish)
            before = new.pop("feedback.error")
            last = not read and _nobodys(g, update, *new.values())
            error = self._turn(add_lift(g, cg, basis, p.feedback - 1.0, in_place=last))
            error = before if same_storage(error, before) else error
            new["feedback.error"] = error if cut is None else error + self._turn(cut)
        if step.refresh and selector.timing == "after" and not step.first:
            self._refresh(source, new, step)
            new.pop("selector.coords", None)
        return update

    def _outside(self, x: Tensor, g: Tensor, coords: Coords, basis: Basis, new: State, step: Step) -> Tensor:
        """The update of the complement, from what the subspace leaves of the signal."""
        rules = self.pipeline.complement
        residual = residual_g = add_lift(x, coords.signal, basis, -1.0)
        if g is not x and any(rule.uses_grad for rule in rules):  # one more product, only for rules that look at it
            residual_g = add_lift(g, coords.grad, basis, -1.0)
        if any(rule.scale_free for rule in rules) and not rules[0].takes_whole:
            residual = _without_round_off(residual, coords.signal)
        return self._run("complement", rules, residual, residual_g, new, step._replace(inside=coords, whole=x, basis=basis))

    def _mixed(self, inner: Tensor, outer: Tensor | None, basis: Basis, like: Tensor, grad: Tensor, new: State) -> Tensor:
        """`mix.inside` times the lifted update plus `mix.complement` times the other."""
        p = self.pipeline
        if not p.inside or p.mix.inside == 0:
            if outer is None:
                return torch.zeros_like(like)
            return outer if p.mix.complement == 1 else outer * p.mix.complement
        if outer is None:
            inner = inner if p.mix.inside == 1 else inner * p.mix.inside
            return lift(inner, basis, self.rows.size, self.cols.size, turned=self.turned)
        last = _nobodys(outer, like, grad, *new.values())
        return add_lift(outer, inner, basis, p.mix.inside, own=p.mix.complement, in_place=last)

    def _refresh(self, source: Tensor, new: State, step: Step) -> tuple[Basis | None, Tensor | None]:
        """A new basis; what is kept in coordinates is carried over.

        Returns the basis, where carrying over needed it, and what was lost on the way, if that is to be fed back.
        """
        selector, before = self.pipeline.selector, _part("selector", new)
        keyed = _keyed("inside", self.pipeline.inside)
        inner = {name: value for key, _ in keyed for name, value in _part(key, new).items()}
        after, order = selector.refresh(source, before, step._replace(inner=inner))
        after = _settled(before, after, source)
        self._store("selector", after, new)
        carried = [(key, rule, slots) for key, rule in keyed if (slots := rule.slots(*self.inner))]
        if step.first or not carried:
            return None, None
        now = selector.basis(after, step)
        old = selector.basis(before, step) if selector.keeps_basis else Basis()  # then nothing is rotated, see the validator
        change = Change(old, now, *self.inner, order, places(old, now))
        lost: Tensor | None = None
        for key, rule, slots in carried:
            state = _part(key, new)
            moved = rule.transport(state, slots, change, step)
            self._store(key, moved, new)
            cut = rule.untransmitted(state, moved) if self.pipeline.feedback is not None else None
            if cut is not None:
                there, here, weight = cut
                gap = lift(there, old, self.rows.size, self.cols.size) - lift(here, now, self.rows.size, self.cols.size)
                lost = gap * weight if lost is None else lost + gap * weight
        return now, lost

    def _run(self, place: str, rules: tuple[Rule, ...], x: Tensor, grad: Tensor, new: State, step: Step) -> Tensor:
        return self._through(_keyed(place, rules), x, grad, new, step)

    def _through(self, keyed: list[tuple[str, Rule]], x: Tensor, grad: Tensor, new: State, step: Step, *, final: bool = False) -> Tensor:
        """The signal after some rules; `final`: nothing but state and gradient are needed after them."""
        for key, rule in keyed:
            if final:
                step = step._replace(spare=_nobodys(x, grad, *new.values()))
            x, state = rule.apply(x, grad, _part(key, new), step)
            self._store(key, state, new)
        return x

    def _store(self, key: str, state: State, new: State) -> None:
        for name, value in state.items():
            new[f"{key}.{name}"] = value

    def _turn(self, x: Tensor) -> Tensor:
        return x.mT if self.turned else x


def _flipped(factor: Tensor) -> Tensor:
    return factor.mT if factor.dim() == 3 else factor  # indices


def _nobodys(x: Tensor, *others: Tensor | Product) -> bool:
    """Whether a tensor may be written to: none of the others is stored where it is."""
    return not any(same_storage(x, other) for each in others for other in (each.parts if isinstance(each, Product) else (each,)))


def _keyed(place: str, rules: tuple[Rule, ...]) -> list[tuple[str, Rule]]:
    """Rules with the first part of their state's keys: the place, and a number where several share it."""
    return [(place if len(rules) == 1 else f"{place}.{i}", rule) for i, rule in enumerate(rules)]


def _part(key: str, state: State) -> State:
    prefix = key + "."
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("this pipeline looks at the weights (selector source `weight`, or decay `coupled`), and none were given")
    return weight


def _without_round_off(residual: Tensor, coords: Tensor) -> Tensor:
    """A residual that is only the round-off of `X - P X`, set to 0: a scale-free rule would blow it up to full size.

    The coordinates of X in an orthonormal basis have the norm of `P X`, which is that of X where the residual is small.
    """
    kept = linalg.norm(residual) > 512 * torch.finfo(residual.dtype).eps * linalg.norm(coords)
    if residual.size(0) == 1 and kept.device.type == "cpu" and bool(kept):
        return residual
    return residual * kept


def _settled(before: State, after: State, source: Tensor) -> State:
    """The new basis, and the old where the source is 0 or is not finite. Only on a CPU is a basis with NaN told of: elsewhere nobody waits.

    Raises:
        LinAlgError: a source without NaN and infinity gave a basis with; a QR does that where other decompositions raise.
    """
    floats = [value for value in after.values() if value.is_floating_point()]
    cpu = source.device.type == "cpu"
    broken = "the new basis holds NaN or infinity although its source does not"
    if cpu and source.size(0) == 1 and 0 < linalg.norm(source).item() < math.inf:  # as nearly always
        if not all(map(linalg.all_finite, floats)):
            raise torch.linalg.LinAlgError(broken)
        return after
    size = linalg.magnitude(source)[:, 0, 0]
    usable = (size > 0) & size.isfinite()
    if cpu:
        finite = torch.stack([value.isfinite().reshape(value.size(0), -1).all(-1) for value in floats] or [usable]).all(0)
        if bool((usable & ~finite).any()):
            raise torch.linalg.LinAlgError(broken)
        if bool(usable.all()):
            return after
    # What is not a slot serves this update alone and has no older value to fall back on.
    return {
        name: torch.where(usable.view(-1, *[1] * (value.dim() - 1)), value, before.get(name, torch.zeros_like(value)))
        for name, value in after.items()
    }
