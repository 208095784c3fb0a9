"""The state of one parameter under the new spec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import linalg
from ..algebra import Rule, Slot, State, WeightRule
from ..algebra.core import Basis, Coords, Dim
from ..registry import kind_of
from .bases import NewBasis, is_same_basis, make_basis
from .moments import Known, Moment, factored, is_known, rotated, share_kept
from .responses import Response, responses
from .source import Blocks, ConversionError, feedback_response, is_residual

WHOLE = 1 - 1e-4  # the share of a direction from which on it counts as held by the old basis


class Filled(NamedTuple):
    """A slot of the new state `(B, *dims)`, how it came about, and from which old slots."""

    value: Tensor
    status: str  # exact, approximate, rebuilt, reset
    why: str
    origin: str = ""


class Restart(NamedTuple):
    """The reason why a parameter starts anew."""

    why: str


@dataclass(frozen=True)
class Target:
    """Some matrices under the new spec, and all that there is to fill their slots from."""

    new: Blocks
    old: Blocks | None  # the same matrices under the old spec; None if it cuts the parameter into others
    known: Known
    weight: Tensor | None  # (B, m, n), if the new pipeline reads weights
    like: Tensor  # has the stack's size, dtype and device


def fill(target: Target) -> dict[str, Filled] | Restart:
    """Every slot of some matrices under the new spec, by dotted key."""
    new, frame, told = target.new, target.new.frame, target.known
    told = Known(told.mean if is_known(told.mean) else None, told.square if is_known(told.square) else None, told.covariances)
    target = replace(target, known=told)
    if told.mean is None and told.square is None and not _is_all_copied(target):
        return Restart("the old state has no average of the gradient or of its squares")
    out: dict[str, Filled] = {}
    basis: NewBasis | None = None
    if frame.opens:
        basis = make_basis(new, target.old, told, target.weight, target.like)
        if basis is None:
            return Restart("the old state does not tell where the gradient's subspace is")
        for name, value in basis.state.items():
            origin = f"selector.{name}" if basis.status == "exact" else basis.origin
            out[f"selector.{name}"] = Filled(value, basis.status, basis.why, origin)
    if "feedback.error" in frame.slots:
        out["feedback.error"] = _error(target)
    for key, rule, rows, cols in frame.places():
        if slots := rule.slots(rows, cols):
            filler = _Filler(target, basis, key, rule, rows, cols)
            out |= {f"{key}.{name}": filled for name, filled in filler.run(slots)}
    return {key: out[key] for key in frame.slots}


def _origin(known: Known) -> str:
    return " + ".join(m.name for m in (known.mean, known.square) if m is not None)


def _is_all_copied(target: Target) -> bool:
    """True if every slot of the new state is a slot of the old one, so that no average is needed."""
    old, new = target.old, target.new
    if old is None or (new.frame.opens and not is_same_basis(old, new)):
        return False
    return all(_twin(old, new, key, rule, rows, cols) is not None for key, rule, rows, cols in new.frame.places() if rule.slots(rows, cols))


def _error(target: Target) -> Filled:
    """The error feedback: the old one, or with a share that makes it a momentum, the mean with that momentum's weight."""
    old, new, mean, like = target.old, target.new, target.known.mean, target.like
    share = new.frame.pipeline.feedback or 0.0
    if old is not None and "feedback.error" in old.state:
        same = old.frame.pipeline.feedback == share and is_same_basis(old, new)
        why = "kept" if same else "kept; another subspace, or another share, decided what it holds"
        return Filled(old.state["feedback.error"], "exact" if same else "approximate", why, "feedback.error")
    if share and mean is not None:
        value = rotated(mean, None, None) * feedback_response(share).weight(new.count)
        return Filled(value, "approximate", "the mean gradient with the weight that this feedback gives it", mean.name)
    value = like.new_zeros(like.size(0), *(dim.size for dim in new.frame.own))
    return Filled(value, "reset", "the old optimizer has no error feedback")


def _twin(old: Blocks | None, new: Blocks, key: str, rule: Rule | WeightRule, rows: Dim, cols: Dim) -> str | None:
    """The key of the same rule in the same place of the old pipeline, with the same slots in the same coordinates."""
    if old is None or old.frame.turned != new.frame.turned:
        return None
    place = key.partition(".")[0]
    if place == "inside" and not is_same_basis(old, new):
        return None
    if place == "complement" and is_residual(old.frame) != is_residual(new.frame):
        return None
    for other, theirs, *sides in old.frame.places():
        alike = other.partition(".")[0] == place and kind_of(type(theirs)) == kind_of(type(rule))
        if alike and theirs.slots(*sides) == rule.slots(rows, cols):
            return other
    return None


def _is_square(slot: Slot) -> bool:
    """True for a matrix along one side twice, such as a covariance."""
    return len(slot.dims) == 2 and slot.dims[0].size == slot.dims[1].size and (slot.dims[0] == slot.dims[1] or slot.holds == "basis")


class _Filler:
    """The slots of one rule."""

    def __init__(self, target: Target, basis: NewBasis | None, key: str, rule: Rule | WeightRule, rows: Dim, cols: Dim) -> None:
        self.new, self.old, self.known, self.weight, self.like = target.new, target.old, target.known, target.weight, target.like
        self.basis, self.key, self.rule, self.rows, self.cols = basis, key, rule, rows, cols
        self.place = key.partition(".")[0]
        self.turned = self.new.frame.turned and self.place not in ("finish", "apply")
        self.answers = responses(self.new.frame)

    def run(self, slots: dict[str, Slot]) -> Iterator[tuple[str, Filled]]:
        """Every slot by name."""
        twin = _twin(self.old, self.new, self.key, self.rule, self.rows, self.cols)
        own_basis = any(_is_square(slot) or slot.holds == "basis" for slot in slots.values())
        replayed: State | None = None
        for name, slot in slots.items():
            answer = self.answers.get(f"{self.key}.{name}", Response(0))
            if twin is not None:
                yield name, self._copied(twin, name, slot, answer)
                continue
            direct = None if own_basis else self._moved(slot, answer)
            if direct is None and self._can_replay(answer, own_basis):
                replayed = self._replay(slots, own_basis) if replayed is None else replayed
                direct = self._replayed(replayed[name], name, slot, answer, own_basis)
            yield name, direct or self._reset(slot, answer)

    # ------------------------------------------------------------------------------------------------- kept, moved, reset

    def _copied(self, twin: str, name: str, slot: Slot, answer: Response) -> Filled:
        """The old slot of the same rule, with the weight that the new decay rate gives it."""
        assert self.old is not None
        value, key = self.old.state[f"{twin}.{name}"], f"{twin}.{name}"
        before = responses(self.old.frame).get(key, Response(0))
        had, has = before.weight(self.old.updates(slot)), answer.weight(self.new.updates(slot))
        if before.degree != answer.degree or before.degree == 0 or had == has or had == 0:
            return Filled(value, "exact", "same rule in the same coordinates: kept", key)
        return Filled(value * (has / had), "exact", "same average, with the weights of the new decay rate", key)

    def _moved(self, slot: Slot, answer: Response) -> Filled | None:
        """An average with an entry for each entry of the rule's signal."""
        if slot.dims != (self.rows, self.cols) or answer.degree == 0 or (self.place == "inside" and self._sides is None):
            return None
        weight = answer.weight(self.new.updates(slot))
        left, right = self._at
        if answer.degree == 1:
            return None if self.known.mean is None else self._moved_mean(self.known.mean, weight, answer, left, right)
        squared = self.known.squared(left, right)
        if squared is None:
            return None
        if self._is_outside:
            squared = squared * self._outside_share()
        status, why, origin = self._said_of_squares(left, right)
        return Filled(self._oriented(squared * weight), status, why, origin)

    def _moved_mean(self, mean: Moment, weight: float, answer: Response, left: Tensor | None, right: Tensor | None) -> Filled:
        value, exact = rotated(mean, left, right), share_kept(mean, left, right) >= WHOLE
        how = (
            ""
            if mean.is_full and left is None and right is None
            else "projected, "
            if left is not None or right is not None
            else "lifted, "
        )
        if self._is_outside:
            value, how = value - self._within(value), "its part outside the subspace, "
        why = "same mean gradient" if exact else "mean gradient in the old subspace; the old state has nothing outside it"
        rates = "" if abs(mean.decay - answer.decay) < 1e-9 else f"; it decays by {answer.decay:g} from now on, not {mean.decay:g}"
        return Filled(self._oriented(value * weight), "exact" if exact else "approximate", how + why + rates, mean.name)

    def _said_of_squares(self, left: Tensor | None, right: Tensor | None) -> tuple[str, str, str]:
        square, mean = self.known.square, self.known.mean
        if square is None:
            assert mean is not None
            return "rebuilt", "from the energy of the mean gradient: rows times columns, as for gradients that are mostly noise", mean.name
        if square.left is left and square.right is right and not self._is_outside:
            return "exact", "same second moments", square.name
        how = "rotated by squares" if mean is None else "mean squared exactly, variance rotated by squares"
        return "approximate", f"{how}, as if coordinates were uncorrelated", " + ".join(m.name for m in (square, mean) if m is not None)

    def _reset(self, slot: Slot, answer: Response) -> Filled:
        value = self.like.new_zeros(self.like.size(0), *slot.shape, dtype=slot.dtype or self.like.dtype)
        if answer.degree == 1:
            return Filled(value, "reset", "the old state has no mean gradient; it fills up again within a few updates")
        return Filled(value, "reset", "the old state has nothing of this meaning")

    # ------------------------------------------------------------------------------------------------------------- replay

    def _can_replay(self, answer: Response, own_basis: bool) -> bool:
        """True if one update with a typical gradient makes the slot: grouped second moments, covariances, slots of weight rules."""
        if isinstance(self.rule, WeightRule):
            return True
        return self.known.energies is not None and (own_basis or answer.degree == 2) and (self.place != "inside" or self._sides is not None)

    def _replay(self, slots: dict[str, Slot], own_basis: bool) -> State:
        """The rule's state after one update from empty state, with a typical gradient."""
        m, n = (dim.size for dim in self.new.frame.own)
        empty = {k: self.like.new_zeros(self.like.size(0), *s.shape, dtype=s.dtype or self.like.dtype) for k, s in slots.items()}
        step = self.new.step(self.like.device)
        step = step._replace(t=torch.ones_like(step.t), first=True, refresh=True)
        typical = self.known.typical(m, n)
        if isinstance(self.rule, WeightRule):
            if self.weight is None or self.weight.is_meta:
                raise ConversionError(
                    f"'{self.new.row.entry.name}': weight rule '{kind_of(type(self.rule))}' starts from the weights, and the given model "
                    "has none; give the model with its weights"
                )
            return self.rule.observe(self.weight, torch.zeros_like(self.weight) if typical is None else typical, empty, step)
        left, right = self._at
        if own_basis:
            assert typical is not None
            x = self._oriented(rotated(Moment(typical), left, right))
        else:
            squared = self.known.squared(left, right)
            assert squared is not None
            x = self._oriented(squared.sqrt())
        step = step._replace(inside=Coords(x, x, x), whole=x, basis=Basis())
        return self.rule.apply(x, x, empty, step)[1]

    def _replayed(self, value: Tensor, name: str, slot: Slot, answer: Response, own_basis: bool) -> Filled | None:
        if isinstance(self.rule, WeightRule):
            return Filled(value, "rebuilt", "from the present weights")
        if answer.degree == 2:
            value = value * (answer.weight(self.new.updates(slot)) / answer.first)
            if own_basis and slot.holds == "unsigned" and slot.dims == (self.rows, self.cols):
                value = factored(value)  # squares of one matrix are near 0 by chance
            why = "covariance of a typical gradient" if _is_square(slot) else "second moments of a typical gradient"
            return Filled(
                value,
                "rebuilt" if own_basis else "approximate",
                f"{why}: the mean, with the energy of the second moments",
                _origin(self.known),
            )
        if own_basis and answer.degree == 0:
            return Filled(value, "rebuilt", "taken from the covariance", _origin(self.known))
        return None

    # -------------------------------------------------------------------------------------------------------------- bases

    @property
    def _sides(self) -> tuple[Tensor | None, Tensor | None] | None:
        return (None, None) if self.basis is None else self.basis.sides

    @property
    def _at(self) -> tuple[Tensor | None, Tensor | None]:
        """The bases of the rule's signal, in the weight's own orientation."""
        sides = self._sides if self.place == "inside" else None
        return (None, None) if sides is None else sides

    @property
    def _is_outside(self) -> bool:
        return self.place == "complement" and is_residual(self.new.frame) and self._sides is not None

    def _within(self, value: Tensor) -> Tensor:
        """The part of a matrix that the subspace holds."""
        assert self._sides is not None
        left, right = self._sides
        value = value if right is None else linalg.mm(linalg.mm(value, right), right.mT)
        return value if left is None else linalg.mm(left, linalg.mm(left.mT, value))

    def _outside_share(self) -> Tensor:
        """The share of each entry's second moment that the subspace leaves to the complement, at least 1 %."""
        assert self._sides is not None
        left, right = self._sides
        rows = 1.0 if left is None else left.square().sum(-1).unsqueeze(-1)
        cols = 1.0 if right is None else right.square().sum(-1).unsqueeze(-2)
        return (1 - rows * cols * torch.ones((), dtype=self.like.dtype)).clamp(0.01, 1.0)

    def _oriented(self, value: Tensor) -> Tensor:
        return value.mT if self.turned else value
