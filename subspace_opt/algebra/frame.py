"""The mathematics of a pipeline: how a gradient becomes an update.

    G --> [feedback] --> [momentum ...] --> SPLIT( selector | inside ... | complement ... ) --> mix --> [finish ...] --> update
    W, update --> [apply ...] --> displacement

`Frame.update` reads like this picture. It is pure, works on stacks of matrices and knows no concrete kind. Places that combine whole
matrices compute with `Linear` expressions, so their products and passes over memory happen only when entries are read (see `linear`).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .core import Basis, Coords, Order, Refreshed, Rule, RuleTraits, State, Step
from .guards import keep_usable, silence_round_off
from .linear import Linear, same_storage
from .projection import project
from .shaped import Shaped, keyed, part, store
from .transport import Change, shared_atoms

_COORDS = "coords of the source"  # `keep_usable` checks this value together with the selector's new state


class Opened(NamedTuple):
    """A subspace just after its refresh.

    `coords`: the source's coordinates, if the selector computed them. `lost`: moments that the projection cut, to be fed back.
    """

    basis: Basis
    coords: Tensor | None
    lost: Linear | None


class Frame(Shaped):
    """A pipeline for matrices of one shape."""

    @property
    def is_elementwise(self) -> bool:
        """True if every entry of a weight is updated by itself."""
        plain = not self.opens and self.pipeline.feedback is None and not self.turned
        return plain and all(rule.traits(rows, cols).elementwise for _, rule, rows, cols in self.places())

    # ------------------------------------------------------------------------------------------------------- the mathematics

    def update(self, grad: Tensor, weight: Tensor | None, state: State, step: Step) -> tuple[Linear, State]:
        """Return the update, to be subtracted times lr, and the new state.

        With rules in `apply` it is the displacement instead, which contains lr and decay and is subtracted as it is.

        Args:
            grad: `(B, m, n)` in the weight's own orientation, as the update is.
            weight: The weights, if the pipeline `needs_weight`.
            state: One tensor `(B, *dims)` for each of `slots`.

        Evaluate the update before you write to `grad` or the state, because the expression may refer to them.
        """
        p, new = self.pipeline, dict(state)
        if p.feedback is not None:
            grad = self._with_feedback(grad, state["feedback.error"], step)
        g = self._oriented(grad)
        sources = {"gradient": g, "weight": None if weight is None else self._oriented(weight)}
        opened = self._refresh(sources, new, step) if step.refresh and self.refreshes_first else None
        if p.decay == "coupled":
            g = g + step.decay * _given(sources["weight"])  # rules see the decay, selectors do not
        x = sources["momentum"] = self._run("momentum", g, g, new, step)
        if self.opens:
            update = self._split(x, g, sources, opened, new, step)
        else:
            signal = Linear.of(x)
            grads = signal if g is x else Linear.of(g)
            update = self._run_lazily("complement", signal, grads, new, step) * p.mix.complement
        update = self._finish(update, g, new, step)
        return (self._displacement(update.dense(), _given(weight), new, step) if p.apply else update), new

    def _split(self, x: Tensor, g: Tensor, sources: dict[str, Tensor | None], opened: Opened | None, new: State, step: Step) -> Linear:
        """Select, project, run the rules inside and outside, lift and mix; then update feedback and selector."""
        p, selector = self.pipeline, self.pipeline.selector
        source = _given(sources[selector.source])
        if step.refresh and opened is None and (selector.timing == "before" or step.first):
            opened = self._refresh(sources, new, step)
        basis = selector.basis(part("selector", new), step) if opened is None else opened.basis
        known = None if opened is None else opened.coords

        c = known if known is not None and x is source else project(x, basis)
        cg = c if g is x else known if known is not None and g is source else project(g, basis)
        inner = self._run("inside", c, cg, new, step)
        update = self._mixed(x, g, Coords(c, cg, inner), basis, new, step)

        seen = cg if source is g else c if source is x else project(source, basis)
        store("selector", selector.observe(source, seen, part("selector", new), step), new)
        if p.feedback is not None:
            self._remember(g, cg, basis, None if opened is None else opened.lost, update, new, step)
        if step.refresh and selector.timing == "after" and not step.first:
            self._refresh(sources, new, step)
        return update

    def _mixed(self, x: Tensor, g: Tensor, coords: Coords, basis: Basis, new: State, step: Step) -> Linear:
        """`mix.inside P N U' + mix.complement rules(X - P C U')`."""
        p = self.pipeline
        inside = self._lifted(coords.update, basis) * p.mix.inside if p.inside and p.mix.inside > 0 else None
        outside = self._outside(x, g, coords, basis, new, step) * p.mix.complement if self.has_complement else None
        if outside is None:
            return Linear.of(x.new_zeros(x.shape)) if inside is None else inside
        return outside if inside is None else inside + outside.unless_shared(x, g, *new.values())

    def _outside(self, x: Tensor, g: Tensor, coords: Coords, basis: Basis, new: State, step: Step) -> Linear:
        """The rules of the complement on the residual."""
        residual = Linear.of(x) - self._lifted(coords.signal, basis)
        residual_g = residual if g is x else Linear.of(g) - self._lifted(coords.grad, basis)
        there = step._replace(inside=coords, whole=x, basis=basis)
        return self._run_lazily("complement", residual, residual_g, new, there, coords.signal if self._guards_residual else None)

    def _finish(self, update: Linear, g: Tensor, new: State, step: Step) -> Linear:
        """The rules on the whole update, in the weight's own orientation."""
        update = update.mT if self.turned else update
        for key, rule, traits in self._rules["finish"]:
            if traits.lazy:
                update, state = _apply_lazily(rule, update, self._oriented(g) if traits.reads_grad else g, part(key, new), step)
            else:
                u = update.dense()
                spare = not any(same_storage(u, other) for other in (g, *new.values()))
                out, state = rule.apply(u, self._oriented(g), part(key, new), step._replace(spare=spare))
                update = Linear.of(out)
            store(key, state, new)
        return update

    # ------------------------------------------------------------------------------------------------------------- the weight

    def _displacement(self, u: Tensor, weight: Tensor, new: State, step: Step) -> Linear:
        """`W - landed(decayed(W) - lr scaled(U))`, each map by the rules of `apply` in their order."""
        rules = keyed("apply", self.pipeline.apply)
        for key, rule in rules:
            store(key, rule.observe(weight, u, part(key, new), step), new)
        w = self._decayed(weight, "before", step)
        for key, rule in rules:
            w = rule.decayed(w, u, part(key, new), step)
        for key, rule in rules:
            u = rule.scaled(u, w, part(key, new), step)
        after = self._decayed(w - u * step.lr, "after", step)
        for key, rule in rules:
            after = rule.landed(after, w, part(key, new), step)
        return Linear.of(weight - after)

    def waiting_displacement(self, weight: Tensor, step: Step) -> Linear:
        """The displacement of weights `(B, m, n)` without a gradient so far: their decay alone."""
        w = self._decayed(self._decayed(weight, "before", step), "after", step)
        for rule in (rule for rule in self.pipeline.apply if rule.traits(*self.own).decays):
            slots = rule.slots(*self.own)
            state = {name: w.new_zeros(w.size(0), *slot.shape, dtype=slot.dtype or w.dtype) for name, slot in slots.items()}
            w = rule.decayed(w, torch.zeros_like(w), state, step)
            w = rule.landed(w, w, state, step)
        return Linear.of(weight - w)

    def _decayed(self, w: Tensor, when: str, step: Step) -> Tensor:
        """`W (1 - lr wd)`, if that is when the weight decays."""
        decays = isinstance(step.decay, Tensor) or step.decay != 0
        return w * (1 - step.lr * step.decay) if decays and self.pipeline.decay_beside_rules == when else w

    # ------------------------------------------------------------------------------------------------------- error feedback

    def _with_feedback(self, grad: Tensor, error: Tensor, step: Step) -> Tensor:
        # A refresh that may fail needs the error unchanged.
        overwrites = step.in_place and not (step.refresh and self.selector_traits.decomposes)
        return error.add_(grad) if overwrites else grad + error

    def _remember(self, g: Tensor, cg: Tensor, basis: Basis, lost: Linear | None, update: Linear, new: State, step: Step) -> None:
        """`E <- G - (1 - feedback) P C U'`, and what a projection of moments lost."""
        p, before = self.pipeline, new.pop("feedback.error")
        read_again = (step.refresh and p.selector.timing == "after") or any(traits.reads_grad for *_, traits in self._rules["finish"])
        whole = Linear.of(g)
        if not read_again:
            whole = whole.unless_shared(*update.sum.tensors(), *new.values())
        error = whole - self._lifted(cg, basis) * (1.0 - (p.feedback or 0.0))
        if lost is not None:
            error = error + lost
        made = self._oriented(error.dense())
        new["feedback.error"] = before if step.in_place and same_storage(made, before) else made

    # ------------------------------------------------------------------------------------------------------------- refreshes

    def prime(self, grad: Tensor, weight: Tensor | None, state: State, step: Step) -> State:
        """The state after a first gradient that only sets the basis."""
        new, selector, g = dict(state), self.pipeline.selector, self._oriented(grad)
        sources = {"gradient": g, "momentum": g, "weight": None if weight is None else self._oriented(weight)}
        x = _given(sources[selector.source])
        c = x.new_zeros(x.size(0), *(d.size for d in self.inner))
        store("selector", selector.observe(x, c, part("selector", new), step), new)
        self._refresh(sources, new, step)
        return new

    def _refresh(self, sources: dict[str, Tensor | None], new: State, step: Step) -> Opened:
        """Take a new basis and carry the inner state over to it."""
        selector, before = self.pipeline.selector, part("selector", new)
        source = _given(sources[selector.source])
        inner = {name: value for key, *_ in self._rules["inside"] for name, value in part(key, new).items()}
        found = Refreshed(*selector.refresh(source, before, step._replace(inner=inner)))
        after = dict(found.state) if found.coords is None else {**found.state, _COORDS: found.coords}
        after = keep_usable(before, after, source)
        coords = after.pop(_COORDS, None)
        store("selector", after, new)
        basis = selector.basis(after, step)
        return Opened(basis, coords, None if step.first else self._carry(before, basis, found.order, new, step))

    def _carry(self, before: State, basis: Basis, order: Order | None, new: State, step: Step) -> Linear | None:
        """Carry the inner rules' state over to a new basis; return what is to be fed back."""
        selector, lost = self.pipeline.selector, None
        stateful = [(key, rule, slots) for key, rule, _ in self._rules["inside"] if (slots := rule.slots(*self.inner))]
        if not stateful:
            return None
        # Without the old basis nothing is rotated, and the pipeline's validator refuses slots that would need it.
        old = selector.basis(before, step) if self.selector_traits.keeps_basis else Basis()
        change = Change(old, basis, *self.inner, order, shared_atoms(old, basis))
        for key, rule, slots in stateful:
            state = part(key, new)
            moved = rule.transport(state, slots, change, step)
            store(key, moved, new)
            cut = rule.untransmitted(state, moved) if self.pipeline.feedback is not None else None
            if cut is not None:
                gap = (self._lifted(cut[0], old) - self._lifted(cut[1], basis)) * cut[2]
                gap.sum.value()  # now: the rule may write over its moment
                lost = gap if lost is None else lost + gap
        return lost

    # ----------------------------------------------------------------------------------------------------------------- rules

    def update_coordinates(self, c: Tensor, state: State, step: Step) -> tuple[Tensor, float, State]:
        """`update` in coordinates alone: coordinates of the update, a factor for them, and the new state.

        It is valid between refreshes, for a pipeline without momentum, complement and feedback whose `finish` multiplies by known numbers.
        """
        new = dict(state)
        inner = self._run("inside", c, c, new, step)
        update = self._finish(self._lifted(inner, Basis()) * self.pipeline.mix.inside, c, new, step)
        return inner, update.factor, new

    def _run(self, place: str, x: Tensor, g: Tensor, new: State, step: Step) -> Tensor:
        """The rules of a place on tensors."""
        for key, rule, _ in self._rules[place]:
            x, state = rule.apply(x, g, part(key, new), step)
            store(key, state, new)
        return x

    def _run_lazily(self, place: str, x: Linear, g: Linear, new: State, step: Step, guard: Tensor | None = None) -> Linear:
        """The rules of a place on expressions; `guard`: the coordinates against which round-off in `x` is judged."""
        for key, rule, traits in self._rules[place]:
            if guard is not None and (traits.measures or not traits.lazy):
                x, guard = Linear.of(silence_round_off(x.dense(), guard)), None
            if traits.lazy:
                x, state = _apply_lazily(rule, x, g, part(key, new), step)
            else:
                entries = x.dense()
                out, state = rule.apply(entries, g.dense() if traits.reads_grad else entries, part(key, new), step)
                x = Linear.of(out)
            store(key, state, new)
        return x

    @cached_property
    def _rules(self) -> dict[str, tuple[tuple[str, Rule, RuleTraits], ...]]:
        """The rules of each place with the keys of their state and their traits."""
        sides = {"momentum": (self.rows, self.cols), "inside": self.inner, "complement": (self.rows, self.cols), "finish": self.own}
        return {
            place: tuple((key, rule, rule.traits(*dims)) for key, rule in keyed(place, getattr(self.pipeline, place)))
            for place, dims in sides.items()
        }

    @cached_property
    def _guards_residual(self) -> bool:
        """True if a rule of the complement would amplify round-off in the residual to full size."""
        traits = [traits for *_, traits in self._rules["complement"]]
        return any(t.scale_free for t in traits) and not traits[0].takes_whole

    def _lifted(self, c: Tensor, basis: Basis) -> Linear:
        return Linear.lifted(c, basis, self.rows.size, self.cols.size)

    def _oriented(self, x: Tensor) -> Tensor:
        return x.mT if self.turned else x


def _apply_lazily(rule: Any, x: Linear, g: Linear | Tensor, state: State, step: Step) -> tuple[Linear, State]:
    out, new = rule.apply(x, g, state, step)
    return (out if isinstance(out, Linear) else Linear.of(out)), new


def _given(source: Tensor | None) -> Tensor:
    if source is None:
        raise ValueError("this pipeline reads the weights (selector source `weight`, or decay `coupled`), and none were given")
    return source
