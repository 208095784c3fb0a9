"""The questions about every rule and selector. Each is a function that raises a `ConformanceError`, which says what to do."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ..algebra import Dim, LowRank, Selector
from ..algebra.frame import Frame
from ..algebra.pipeline import Pipeline
from ..plan.costs import flops
from ..registry import FAMILIES, Component, find, kind_of, kinds, names_of
from ..spec import Spec, json_schema
from . import trial
from .drive import DTYPES, SHAPES, Trace, drive, placed
from .models import stack
from .places import places
from .probe import ConformanceError, Notes
from .subject import Subject

UPDATES = 5  # two refreshes, at updates 1 and 4


class Examination:
    """A component under test, and the findings of one run in each of its places."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.component = subject, subject.component

    @cached_property
    def places(self) -> dict[str, Pipeline]:
        """Pipelines around the component. If one cannot be built, the component breaks its contract."""
        try:
            return places(self.component)
        except ValidationError as error:
            raise ConformanceError(f"no pipeline takes {self.subject.label}: {error.errors(include_url=False)[0]['msg']}") from error

    @cached_property
    def notes(self) -> Notes:
        """The findings of probes in every place, for matrices of several shapes in both precisions."""
        notes = Notes()
        for place, pipeline in self.places.items():
            watched = placed(pipeline, self.component, notes)
            for shape in SHAPES:
                for dtype in DTYPES:
                    grads = [stack((3, *shape), dtype, seed) for seed in range(UPDATES)]
                    try:
                        drive(Frame.of(watched, *shape), grads, notes, where=f"as {place}, ")
                    except Exception as error:  # the component may raise anything; its exception is the finding
                        notes.add("runs", f"{type(error).__name__}: {error}")
                        notes.where, notes.error = "", error
        return notes

    def expect(self, *questions: str) -> None:
        """Raise if the notes contain a finding for these questions, or if a run raised."""
        said = [text for question in (*questions, "runs") for text in self.notes.found.get(question, [])]
        if said:
            raise ConformanceError("\n".join(said)) from self.notes.error

    def traces(self, grads: list[Tensor], **options: Any) -> dict[str, Trace]:
        """A run in every place, without probes."""
        self.expect("slots")
        shape = grads[0].shape[1:]
        return {place: drive(Frame.of(pipeline, *shape), grads, Notes(), **options) for place, pipeline in self.places.items()}

    def frames(self) -> list[tuple[str, Frame]]:
        return [(place, Frame.of(p, *shape)) for place, p in self.places.items() for shape in SHAPES]


# ------------------------------------------------------------------------------------------------------------------ declarations


def documented(exam: Examination) -> None:
    """The class is registered, has a docstring, described options and a JSON schema, refuses unknown options, and survives JSON."""
    cls = type(exam.component)
    name = kind_of(cls)
    if find(cls.family, name) is not cls:
        raise ConformanceError(f"{cls.__name__} is not registered under '{name}': put `@subspace_opt.register` above the class")
    if not (cls.__dict__.get("__doc__") or "").strip():
        raise ConformanceError(f"{cls.__name__} has no docstring; open it with the mathematics in one line and its source in brackets")
    for option, field in cls.model_fields.items():
        if option != "kind" and not (field.description or "").strip():
            raise ConformanceError(f"option '{option}' has no description: give it a Field(..., description='...')")
    _schema_has(cls.family, names_of(cls))
    if cls.model_config.get("extra") != "forbid" or not cls.model_config.get("frozen"):
        raise ConformanceError("`model_config` must keep frozen=True and extra='forbid': a component refuses unknown options")
    for place, pipeline in exam.places.items():
        spec = trial.spec_of(pipeline)
        if Spec.model_validate_json(spec.to_json()) != spec:
            raise ConformanceError(
                f"as {place}, the component changes when it is written to JSON and read back; use numbers, strings and lists as options"
            )


def _schema_has(family: str, names: tuple[str, ...]) -> None:
    defined = _definitions(frozenset(kinds(family).items()))
    missing = [name for name in names if f"{family}.{name}" not in defined]
    if missing:
        raise ConformanceError(f"the JSON schema does not know {missing}")


@lru_cache(maxsize=len(FAMILIES))
def _definitions(known: frozenset[tuple[str, type[Component]]]) -> frozenset[str]:
    """The names that the JSON schema defines while a family has these kinds. Making the schema takes a tenth of a second."""
    return frozenset(json_schema()["$defs"])


# ---------------------------------------------------------------------------------------------------------------------- behaviour


def slots(exam: Examination) -> None:
    """`apply`, `refresh`, `observe` and `transport` return the keys, shapes and dtypes that `slots` declares."""
    exam.expect("slots")


def pure(exam: Examination) -> None:
    """No method writes to its inputs."""
    exam.expect("slots", "pure")


def precision(exam: Examination) -> None:
    """Results have the dtype and the device of the signal."""
    exam.expect("slots", "precision")
    notes = Notes()
    for place, pipeline in exam.places.items():
        watched = placed(pipeline, exam.component, notes)
        with FakeTensorMode():
            grads = [torch.empty(3, 6, 4, device="meta") for _ in range(UPDATES - 1)]  # both refreshes; fake tensors are slow
            try:
                drive(Frame.of(watched, 6, 4), grads, notes, where=f"as {place}, on another device, ")
            except (DataDependentOutputException, DynamicOutputShapeException):
                continue  # the component reads values, and fake tensors have none
            except Exception as error:
                raise ConformanceError(
                    f"as {place}, with matrices on another device: {type(error).__name__}: {error}. Create new tensors on the device of x: "
                    "x.new_zeros(...), torch.arange(n, device=x.device)"
                ) from error
    for text in notes.found.get("precision", []):
        raise ConformanceError(text)


def stacked(exam: Examination) -> None:
    """Matrix b of every result depends on matrix b of the inputs alone."""
    for shape in ((6, 4), (4, 7)):
        grads = [stack((4, *shape), torch.float64, seed, twins=True) for seed in range(UPDATES)]
        others = [grad.clone() for grad in grads]
        for seed, grad in enumerate(others):
            grad[3] = 100 * stack((1, *shape), torch.float64, 500 + seed)[0]
        before, after = exam.traces(grads, twins=True), exam.traces(others, twins=True)
        for place in before:
            for one, two in zip(_results(before[place]), _results(after[place]), strict=True):
                name, values = one
                _alike(values[2], values[0], f"as {place}, {name}: two copies of a matrix in one stack give different results")
                _alike(two[1][:3], values[:3], f"as {place}, {name}: the result for a matrix changes with another matrix of the stack")


def _results(trace: Trace) -> list[tuple[str, Tensor]]:
    found = []
    for call, (update, state) in enumerate(zip(trace.updates, trace.states, strict=True), 1):
        found += [(f"update {call}", update)] if update is not None else []
        found += [(f"state '{key}' after update {call}", value) for key, value in state.items()]
    return found


def _alike(a: Tensor, b: Tensor, what: str) -> None:
    """Raise unless `a` and `b` are equal up to round-off: the order of summation may depend on the index in the stack."""
    if a.is_floating_point():
        same = torch.allclose(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()) if b.numel() else 0.0)
    else:
        same = bool(torch.equal(a, b))
    if not same:
        raise ConformanceError(f"{what}; reduce over the last two dimensions only, never over the first")


def deterministic(exam: Examination) -> None:
    """The same inputs give the same outputs, and no global random number generator is used."""
    grads = [stack((3, 6, 4), torch.float64, seed) for seed in range(UPDATES)]
    kept = torch.get_rng_state()
    try:
        first = exam.traces(grads)
        python = random.getstate()
        torch.manual_seed(1)
        before = torch.get_rng_state()
        second = exam.traces(grads)
        touched = not torch.equal(before, torch.get_rng_state()) or python != random.getstate()
    finally:
        torch.set_rng_state(kept)
    if touched:
        raise ConformanceError(
            "the global random number generator is used, so ranks and resumed runs would differ; let a selector declare the shape of its "
            "draws in `draws` and read them from `step.noise`"
        )
    for place in first:
        for (name, a), (_, b) in zip(_results(first[place]), _results(second[place]), strict=True):
            if not torch.equal(a, b):
                raise ConformanceError(f"as {place}, {name} differs when the same run is repeated")


def finite(exam: Examination) -> None:
    """Updates and state stay finite for zero, rank-one, tiny and large gradients."""
    exam.expect("slots")
    for dtype in DTYPES:
        normal = [stack((3, 6, 4), dtype, seed) for seed in range(7)]
        ranked = normal[1][..., :1] @ normal[2][..., :1, :]
        runs = {
            "gradients that are 0, first for one matrix and later for all": [
                normal[0] * torch.tensor([0.0, 1, 1], dtype=dtype).view(3, 1, 1),
                normal[1],
                *[torch.zeros_like(ranked)] * 4,
                normal[2],
            ],
            "gradients of rank 1": [ranked, ranked, normal[0], ranked, -ranked],
            "gradients of size 1e-20": [1e-20 * g for g in normal],
            "gradients of size 1e12": [1e12 * g for g in normal],
        }
        for what, grads in runs.items():
            for place, trace in exam.traces(grads).items():
                for name, value in _results(trace):
                    if not value.isfinite().all():
                        raise ConformanceError(f"as {place}, with {what} in {dtype}: {name} holds NaN or infinity; guard the division")


# --------------------------------------------------------------------------------------------------------------- selectors only


def basis(exam: Examination) -> None:
    """`basis` has the shape that `coords` declares, and orthonormal columns. `coords` clamps a rank that is too large."""
    selector = exam.component
    if not isinstance(selector, Selector):
        return
    for m, n in (*SHAPES, (1, 1), (6, 1)):
        rows, cols = Dim("rows", m), Dim("cols", n)
        for variant in _ranked(selector):
            k, r = variant.coords(rows, cols)
            if not (0 <= k.size <= m and 0 <= r.size <= n):
                raise ConformanceError(f"`coords` of {variant!r} gives {k.size} x {r.size} coordinates for a matrix {m} x {n}")
    exam.expect("slots", "basis")


def _ranked(selector: Selector) -> list[Selector]:
    if not isinstance(selector, LowRank) and "rank" not in type(selector).model_fields:
        return [selector]
    return [selector.model_copy(update={"rank": rank}) for rank in (1, 3, 1_000_000, *((0.5,) if isinstance(selector, LowRank) else ()))]


# ------------------------------------------------------------------------------------------------------- in an optimizer


def planned(exam: Examination) -> None:
    """A plan on the meta device gives the bytes that a step allocates; costs are finite numbers."""
    exam.expect("slots")
    for place, frame in exam.frames():
        if not all(math.isfinite(cost) and cost >= 0 for cost in flops(frame)):
            raise ConformanceError(f"as {place}, an update costs {flops(frame)} operations; `flops` should return finite numbers >= 0")
    _each(exam, trial.check_plan)


def resumed(exam: Examination) -> None:
    """A run that is saved after any update and loaded into a new optimizer ends in the same bits as a run without a cut."""
    exam.expect("slots")
    _each(exam, trial.check_resume)


def optimized(exam: Examination) -> None:
    """In an optimizer, stacking changes no result, gradients are only read, and a parameter without a gradient stays unchanged."""
    exam.expect("slots", "pure")
    for check in (trial.check_stacking, trial.check_gradients_kept, trial.check_missing):
        _each(exam, check)


def _each(exam: Examination, check: Callable[[trial.Trial], None]) -> None:
    for place, pipeline in exam.places.items():
        try:
            check(trial.of_pipeline(pipeline))
        except ConformanceError as error:
            raise ConformanceError(f"as {place}: {error}") from error


QUESTIONS: dict[str, Callable[[Examination], None]] = {
    question.__name__: question
    for question in (documented, slots, pure, precision, stacked, deterministic, finite, basis, planned, resumed, optimized)
}
