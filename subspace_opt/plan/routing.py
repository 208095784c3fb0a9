"""From a spec and the parameters' names, shapes, dtypes and modules to a plan: each parameter's route and row."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..algebra.frame import Frame
from ..algebra.pipeline import Pipeline, scheduled
from ..spec import Route, Spec, SpecError
from .names import Role, canonical_name, expert_parents, role_by_name
from .plan import Plan
from .rows import Entry, Row
from .views import View, ViewError, make_view


def make_plan(spec: Spec | Sequence[Spec], entries: Sequence[Entry], *, strict: bool = False, compensated: bool = False) -> Plan:
    """Route every parameter and lay out its state.

    Args:
        spec: One spec for all entries, or one per entry.
        strict: Raise if a route matches no parameter.
        compensated: Parameters in bf16 or fp16 keep a Kahan compensation.

    Raises:
        SpecError: No route accepts a parameter, or its shape does not fit its route. With `strict`, also if a route matches no parameter.
    """
    specs = [spec] * len(entries) if isinstance(spec, Spec) else list(spec)
    frames: dict[Any, Frame] = {}
    taken: dict[int, set[int]] = {}
    experts = expert_parents([canonical_name(entry.name) for entry in entries])
    rows = []
    for own, entry in zip(specs, entries, strict=True):
        role = _role(own, entry, experts)
        index, route = _route(own, entry, role)
        taken.setdefault(id(own), set()).add(index)
        rows.append(_row(own, entry, role, index, route, frames, compensated))
    if strict:
        for own in {id(s): s for s in specs}.values():
            for i, route in enumerate(own.routes):
                if i not in taken.get(id(own), set()):
                    raise SpecError(f"routes.{i} ({route}) of '{own.name}' matches no parameter; correct it, or leave out strict")
    rows = _placed(rows)
    return Plan(tuple(rows), specs[0].name if specs else "", {row.entry.name: row for row in rows})


def _placed(rows: list[Row]) -> list[Row]:
    """The rows, each with its index among the rows of its pipeline."""
    total = Counter(row.pipeline for row in rows)
    seen: Counter[str] = Counter()
    out = []
    for row in rows:
        out.append(replace(row, position=(seen[row.pipeline], total[row.pipeline])))
        seen[row.pipeline] += 1
    return out


def _role(spec: Spec, entry: Entry, experts: Collection[str]) -> Role:
    """The role that the spec gives, else the one that the model tells, else the one that name and shape tell."""
    name = canonical_name(entry.name)
    found = entry.role or role_by_name(name, entry.shape, entry.modules, experts)
    for glob, role in spec.roles.items():
        if fnmatch.fnmatchcase(name, glob):
            if role == "fused" and not found.parts:
                raise SpecError(
                    f"roles: '{glob}' makes '{entry.name}' fused, and its parts are not known; give it a route with their sizes, such as "
                    "`split: {q: 64, k: 32, v: 32}`"
                )
            return Role(role, f"roles '{glob}'", *((found.parts, found.groups) if role == "fused" else ()))
    return found


def _route(spec: Spec, entry: Entry, role: Role) -> tuple[int, Route]:
    if entry.use is not None:
        if entry.use not in spec.pipelines:
            raise SpecError(
                f"parameter group of '{entry.name}': use '{entry.use}' is not a pipeline of '{spec.name}'; known: "
                f"{', '.join(spec.pipelines)}"
            )
        return -1, Route(use=entry.use)
    dims = len(entry.shape)
    view = make_view(entry.shape, conv="conv" in entry.modules)
    sides = (min(view.rows, view.cols), max(view.rows, view.cols))
    for i, route in enumerate(spec.routes):
        if route.accepts(canonical_name(entry.name), dims, sides, entry.modules, role.name):
            return i, route
    raise SpecError(
        f"parameter '{entry.name}' of shape {entry.shape} and role {role.name} is accepted by no route of '{spec.name}'; "
        "add a route without conditions at the end, such as {use: other}"
    )


def _view(entry: Entry, role: Role, route: Route, pipeline: Pipeline) -> View:
    """The parameter's view as its route asks for it. `split: auto` cuts a fused weight unless every entry is updated by itself."""
    options: dict[str, Any] = {
        "layout": route.view,
        "conv": "conv" in entry.modules,
        "transposed": ("transposed" in entry.modules) if route.transposed is None else route.transposed,
        "heads": route.heads,
        "merge": route.merge,
    }
    if isinstance(route.split, dict):
        return make_view(entry.shape, split=route.split, **options)
    whole = make_view(entry.shape, **options)
    if route.split is None or route.heads or not role.parts or not whole.blocks:
        return whole
    fits = sum(size for _, size in role.parts) == whole.rows and not whole.modes and whole.row_dims is None
    if not fits or Frame.of(pipeline, whole.rows, whole.cols).is_elementwise:
        return whole
    return make_view(entry.shape, split=dict(role.parts), groups=role.groups, **options)


def _row(spec: Spec, entry: Entry, role: Role, index: int, route: Route, frames: dict[Any, Frame], compensated: bool) -> Row:
    pipeline = spec.pipelines[route.use]
    try:
        view = _view(entry, role, route, pipeline)
    except ViewError as error:
        raise SpecError(f"parameter '{entry.name}' of shape {entry.shape} {error} (routes.{index} of '{spec.name}')") from None
    pairs = []
    for block in view.blocks:
        key = (id(pipeline), block.rows, block.cols, view.modes)
        if key not in frames:
            frames[key] = Frame.of(pipeline, block.rows, block.cols, view.modes)
        pairs.append((block, frames[key]))
    return Row(
        entry=entry,
        view=view,
        pipeline=route.use,
        splits=tuple(pairs),
        why=("its group's `use`" if index < 0 else f"routes.{index}: {route}; {role}") + _following(pipeline),
        role=role,
        compensated=compensated and entry.dtype in (torch.bfloat16, torch.float16),
        decay=entry.weight_decay * pipeline.decay_scale,
        lr_scale=pipeline.lr_scale,
        decay_scale=pipeline.decay_scale,
    )


def _following(pipeline: Pipeline) -> str:
    """The numbers that follow schedules, as the end of a reason."""
    paths = sorted(path for path, *_ in scheduled(pipeline))
    return f"; scheduled: {', '.join(paths)}" if paths else ""
