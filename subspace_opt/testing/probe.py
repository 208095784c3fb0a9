"""Run a component and note every breach of its contract.

A *probe* replaces the component. It is a subclass whose methods call the original methods and check their inputs and results. Each
finding is noted under the question that it answers, so one run answers several questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..algebra import Basis, Change, Linear, Refreshed, Rule, Selector, Slot, State, Step, WeightRule, project

P = TypeVar("P", bound=Rule | Selector | WeightRule)
Declared = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of one matrix, by slot


class ConformanceError(AssertionError):
    """A component or spec breaks its contract. The message says how, where, and what to do."""


@dataclass
class Notes:
    """Findings by question, without repetitions."""

    where: str = ""
    error: Exception | None = None  # the exception that ended a run
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, question: str, message: str) -> None:
        """Note a breach and the update at which it was first seen."""
        said = self.found.setdefault(question, [])
        if not any(text.startswith(message) for text in said):
            said.append(f"{message} ({self.where})" if self.where else message)


# ------------------------------------------------------------------------------------------------------------------ probes


def probed(component: P, notes: Notes) -> P:
    """The component as a probe that writes to `notes`."""
    cls = type(component)
    family = {"rule": _rule_methods, "selector": _selector_methods, "weight_rule": _weight_rule_methods}
    methods = family[cls.family](cls, notes)
    probe: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **methods})
    return cast(P, probe.model_construct(**dict(component)))


def _rule_methods(cls: type[Any], notes: Notes) -> dict[str, Callable[..., Any]]:
    def apply(self: Rule, x: Tensor | Linear, grad: Tensor, state: State, step: Step) -> tuple[Tensor | Linear, State]:
        if isinstance(x, Linear):  # a lazy rule: check it on the matrix, then compare its result for the expression
            entries = x.dense()
            out, new = apply(self, entries, entries, state, step)
            lazily, kept = cls.apply(self, x, x, state, step)
            _check_lazy(notes, lazily.dense() if isinstance(lazily, Linear) else lazily, out, kept, new)
            return lazily, kept
        with _watched(notes, "apply", x=x, grad=grad, state=state, step=step):
            out, new = _pair(cls.apply(self, x, grad, state, step), "apply", "(update, state)")
        _check_tensor(notes, "slots", "the update of `apply`", out, tuple(x.shape), x.dtype, x.device)
        _check_state(notes, "apply", new, _like(state), x, whole=True)
        if not is_fake(x):
            _check_in_place(notes, cls, self, x, grad, state, step, out, new)
        return out, new

    def transport(self: Rule, state: State, slots: dict[str, Slot], change: Change, step: Step) -> State:
        with _watched(notes, "transport", state=state, change=change, step=step):
            moved: State = cls.transport(self, state, slots, change, step)
        if state:
            _check_state(notes, "transport", moved, _like(state), next(iter(state.values())), whole=True)
        return moved

    return {"apply": apply, "transport": transport}


def _selector_methods(cls: type[Any], notes: Notes) -> dict[str, Callable[..., Any]]:
    def declared(self: Selector, step: Step, x: Tensor) -> Declared:
        return _declared(self.slots(step.rows, step.cols), x.dtype)

    def refresh(self: Selector, x: Tensor, state: State, step: Step) -> Refreshed:
        with _watched(notes, "refresh", x=x, state=state, step=step):
            made = cls.refresh(self, x, state, step)
        found = made if isinstance(made, Refreshed) else Refreshed(*_pair(made, "refresh", "(state, order or None), or a Refreshed"))
        _check_state(notes, "refresh", found.state, declared(self, step, x), x, whole=True, extras=True)
        if found.coords is not None:
            shape = tuple(dim.size for dim in self.coords(step.rows, step.cols))
            _check_tensor(notes, "basis", "`coords` of the refresh", found.coords, (x.size(0), *shape), x.dtype, x.device)
            if not is_fake(x) and not found.state.keys() - declared(self, step, x).keys():
                _check_coords(notes, found.coords, project(x, cls.basis(self, found.state, step)))
        return found

    def observe(self: Selector, x: Tensor, c: Tensor, state: State, step: Step) -> State:
        with _watched(notes, "observe", x=x, c=c, state=state, step=step):
            new: State = cls.observe(self, x, c, state, step)
        # A refresh may return additional values for this update, and `observe` may pass them on. No other undeclared key is allowed.
        passed = {name: value for name, value in new.items() if value is not state.get(name)}
        _check_state(notes, "observe", passed, declared(self, step, x), x)
        return new

    def basis(self: Selector, state: State, step: Step) -> Basis:
        with _watched(notes, "basis", state=state, step=step):
            found: Basis = cls.basis(self, state, step)
        _check_basis(notes, self, found, step)
        return found

    return {"refresh": refresh, "observe": observe, "basis": basis}


def _weight_rule_methods(cls: type[Any], notes: Notes) -> dict[str, Callable[..., Any]]:
    def observe(self: WeightRule, w: Tensor, u: Tensor, state: State, step: Step) -> State:
        with _watched(notes, "observe", w=w, u=u, state=state, step=step):
            new: State = cls.observe(self, w, u, state, step)
        _check_state(notes, "observe", new, _like(state), w, whole=True)
        return new

    def watched(name: str, first: str, second: str) -> Callable[..., Tensor]:
        def method(self: WeightRule, a: Tensor, b: Tensor, state: State, step: Step) -> Tensor:
            with _watched(notes, name, **{first: a, second: b}, state=state, step=step):
                out: Tensor = getattr(cls, name)(self, a, b, state, step)
            _check_tensor(notes, "slots", f"the result of `{name}`", out, tuple(a.shape), a.dtype, a.device)
            return out

        return method

    maps = {"decayed": ("w", "u"), "scaled": ("u", "w"), "landed": ("after", "before")}
    return {"observe": observe} | {name: watched(name, *inputs) for name, inputs in maps.items()}


def _pair(value: Any, method: str, what: str) -> Any:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ConformanceError(f"`{method}` returned {type(value).__name__}, not a pair {what}")
    return value


@contextmanager
def _watched(notes: Notes, method: str, **inputs: Any) -> Iterator[None]:
    """Note a method that writes to its inputs or reads a slot that is not declared."""
    before = [(name, value, _copy(value)) for name, value in _tensors(inputs)]
    try:
        yield
    except KeyError as error:
        if error.args and isinstance(error.args[0], str) and error.args[0] not in inputs["state"]:
            notes.add("slots", _missing(error.args[0], method, inputs["state"]))
        raise
    for name, value, copy in before:
        if copy is not None and not torch.equal(value.nan_to_num(), copy):
            notes.add("pure", f"`{method}` writes to its input `{name}`; make a new tensor: x.mul(2), not x.mul_(2)")


def _check_in_place(
    notes: Notes, cls: type[Any], rule: Rule, x: Tensor, grad: Tensor, state: State, step: Step, out: Tensor, new: State
) -> None:
    """Note a rule that returns different numbers when it may write over its state and its signal."""
    own, spare = {name: value.clone() for name, value in state.items()}, x.clone()
    permitted = step._replace(in_place=True, spare=grad is not x)
    with _watched(notes, "apply", grad=grad, step=step):
        again, kept = cls.apply(rule, spare, spare if grad is x else grad, own, permitted)
    same = _same(again, out) and all(name in kept and _same(kept[name], value) for name, value in new.items())
    if not same:
        notes.add("pure", "`apply` returns different numbers when `step.in_place` or `step.spare` lets it write over its inputs")


def _check_lazy(notes: Notes, lazily: Tensor, out: Tensor | Linear, kept: State, new: State) -> None:
    """Note a lazy rule whose result or state for an expression differs from that for its matrix."""
    pairs = [(lazily, out), *((value, new[name]) for name, value in kept.items())]
    for a, b in pairs:
        assert isinstance(b, Tensor)  # a matrix was given
        if not is_fake(a) and not torch.allclose(a, b, rtol=1e-4, atol=1e-30, equal_nan=True):
            notes.add("pure", "`apply` of a lazy rule returns a different result for an expression than for its matrix")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _missing(name: str, method: str, state: State) -> str:
    said = f"`{method}` reads state '{name}', which `slots` does not declare (declared: {', '.join(state) or 'nothing'})"
    if method != "basis":
        return said
    return f"{said}; declare it, or let `refresh` return it at every update and let `traits` declare `keeps_basis=False`"


def _copy(value: Tensor) -> Tensor | None:
    return None if is_fake(value) else value.nan_to_num().clone()


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tuples and mappings, by its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{name}['{key}']" if name else str(key))
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for key, part in zip(fields, value, strict=True):
            yield from _tensors(part, f"{name}.{key}")


# ------------------------------------------------------------------------------------------------------------------- results


def _like(state: State) -> Declared:
    return {name: (tuple(value.shape[1:]), value.dtype) for name, value in state.items()}


def _declared(slots: Mapping[str, Slot], dtype: torch.dtype) -> Declared:
    return {name: (slot.shape, slot.dtype or dtype) for name, slot in slots.items()}


def _check_state(
    notes: Notes, method: str, new: State, declared: Declared, x: Tensor, *, whole: bool = False, extras: bool = False
) -> None:
    """Check a returned state against its declaration. `whole`: every declared slot is required. `extras`: other keys are allowed."""
    if not isinstance(new, Mapping):
        raise ConformanceError(f"`{method}` returned {type(new).__name__} as the state, not a dict of tensors")
    for name in sorted(set(new) - set(declared)):
        if not extras:
            notes.add("slots", f"`{method}`: returned state has key '{name}' that `slots` does not declare")
        elif not isinstance(new[name], Tensor) or new[name].size(0) != x.size(0):
            notes.add("slots", f"`{method}`: returned '{name}' is not a tensor with one entry for each matrix of the stack")
    for name in sorted(set(declared) - set(new)) if whole else ():
        notes.add("slots", f"`{method}`: returned state lacks key '{name}' that `slots` declares")
    for name, (shape, dtype) in declared.items():
        if name in new:
            what = f"`{method}`: returned state '{name}'"
            _check_tensor(notes, "slots", what, new[name], (x.size(0), *shape), dtype, x.device)


def _check_tensor(
    notes: Notes, question: str, what: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(value, Tensor):
        notes.add(question, f"{what} is {type(value).__name__}, not a tensor")
    elif tuple(value.shape) != shape:
        notes.add(question, f"{what} has shape {tuple(value.shape)}, and should have {shape}, the stack's size first")
    elif value.dtype != dtype:
        notes.add("precision", f"{what} has dtype {value.dtype}, and should have {dtype}")
    elif value.device != device:
        notes.add("precision", f"{what} is on device {value.device}, and should be on {device}, where the gradient is")


def _check_basis(notes: Notes, selector: Selector, basis: Basis, step: Step) -> None:
    """Check the shapes against `coords`, and the columns for orthonormality if the selector declares it."""
    if not isinstance(basis, Basis):
        raise ConformanceError(f"`basis` returned {type(basis).__name__}, not a Basis")
    coords = selector.coords(step.rows, step.cols)
    for name, side, own, dim in (("left", basis.left, step.rows, coords[0]), ("right", basis.right, step.cols, coords[1])):
        if side is None:
            if dim.size != own.size:
                notes.add("basis", f"the {name} side is None, the identity, so `coords` should give {own.size} there, not {dim.size}")
        elif isinstance(side, tuple):
            for factor in (f for f in side if isinstance(f, Tensor)):
                _check_side(notes, selector, name, factor, (factor.size(-1), factor.size(-1)))
        else:
            _check_side(notes, selector, name, side, (own.size, dim.size))


def _check_side(notes: Notes, selector: Selector, name: str, u: Tensor, shape: tuple[int, int]) -> None:
    picks = u.dtype == torch.int64
    expected = shape[1:] if picks else shape
    if tuple(u.shape[1:]) != expected:
        said = f"{tuple(u.shape)}, and `coords` asks for (B, {', '.join(map(str, expected))})"
        notes.add("basis", f"the {name} side of the basis has shape {said}")
        return
    # The basis of a matrix that had no gradient yet is all zeros.
    u = u[u.flatten(1).ne(0).any(-1)] if not is_fake(u) else u
    if is_fake(u) or not selector.traits().orthonormal or not u.numel():
        return
    if picks:
        distinct = u.sort(dim=-1).values.diff(dim=-1).ne(0).all()
        if not distinct or u.min() < 0 or u.max() >= shape[0]:
            notes.add("basis", f"the {name} side picks a column twice, or an index outside 0 to {shape[0] - 1}")
    else:
        error = (u.mT @ u - torch.eye(u.size(-1), dtype=u.dtype, device=u.device)).abs().max().item()
        if not error <= (1e-10 if u.dtype == torch.float64 else 1e-4):
            notes.add(
                "basis",
                f"the columns of the {name} side are not orthonormal: |U'U - I| is {error:.1e}. Orthonormalise them (linalg.orthonormal), "
                "or let `traits` declare `orthonormal=False`",
            )


def _check_coords(notes: Notes, handed: Tensor, computed: Tensor) -> None:
    """Note a refresh whose `coords` are not the coordinates of its source in the new basis."""
    far = float((handed - computed).norm() / computed.norm().clamp_min(1e-30))
    if not far <= (1e-9 if handed.dtype == torch.float64 else 1e-3):
        notes.add("basis", f"`coords` of the refresh are not the source's coordinates in the new basis: the relative error is {far:.1e}")


def is_fake(value: Tensor) -> bool:
    """True if a tensor has a shape and a device but no values."""
    return type(value) is not Tensor and type(value).__name__ == "FakeTensor"
