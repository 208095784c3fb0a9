"""Cuts rows and columns out of an optimizer's state, slot by slot, as the plan declares the slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from subspace_opt import SubspaceOptimizer, make_plan
from subspace_opt.algebra.frame import Frame
from subspace_opt.plan import COUNTERS, Row

Uncuttable = Literal["raise", "reset"]


class PruneError(RuntimeError):
    """Ranks cannot be removed. Model and optimizer are unchanged."""


class Kept(NamedTuple):
    """The indices of the rows and columns of a parameter that stay; None for all of them. A vector has one row."""

    rows: Tensor | None
    cols: Tensor | None


def cut(p: Tensor, kept: Kept) -> Tensor:
    """The rows and columns of a matrix, or the entries of a vector, that stay; a copy."""
    if kept.cols is not None:
        p = p.index_select(-1, kept.cols.to(p.device))
    return p.index_select(0, kept.rows.to(p.device)) if kept.rows is not None else p.clone()


def cut_states(optimizer: SubspaceOptimizer, kept: Mapping[nn.Parameter, Kept], uncuttable: Uncuttable) -> dict[Tensor, dict[str, Any]]:
    """The new state of every parameter that shrinks and has state. The optimizer stays as it is.

    Args:
        uncuttable: With `reset`, a parameter whose state cannot be cut gets none, and starts again at its next gradient.

    Raises:
        PruneError: State cannot be cut, and `uncuttable` is `raise`. The message names the slot and the reason.
    """
    params = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    states: dict[Tensor, dict[str, Any]] = {}
    for (group, p), row in zip(params, optimizer.plan.rows, strict=True):
        state = optimizer.state.get(p)
        if p not in kept or not state:
            continue
        entry = replace(row.entry, shape=tuple(cut(p.detach(), kept[p]).shape))
        (new,) = make_plan(optimizer.spec_of(group), [entry], compensated="compensation" in row.state).rows
        try:
            states[p] = _cut_state(row, new, state, kept[p])
        except PruneError as why:
            if uncuttable == "raise":
                raise PruneError(
                    f"'{row.entry.name}' shrinks from {row.entry.shape} to {entry.shape}, and its state cannot: {why}. Pass "
                    "uncuttable='reset', which starts the state of such parameters again, or use a pipeline without it for the cores"
                ) from None
            states[p] = {}
    return states


def _cut_state(row: Row, new: Row, state: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
    """The state of one parameter after the cut; `row` and `new` are its rows of the plan before and after."""
    if new.pipeline != row.pipeline:
        raise PruneError(f"its new shape takes it from pipeline '{row.pipeline}' to '{new.pipeline}'")
    (block, frame), after = row.splits[0], new.splits[0][1]
    if len(row.splits) > 1 or block.count > 1 or row.view.transposed:
        raise PruneError(f"pipeline '{row.pipeline}' sees it as {row.view}, not as one matrix")
    if frame.turned != after.turned:
        raise PruneError(f"`orient: {frame.pipeline.orient}` turns it over, because another side is the shorter one now")
    _check_basis(frame, after, kept)
    out: dict[str, Any] = {}
    for key, value in state.items():
        if key in COUNTERS:
            out[key] = value.clone()
        elif key == "compensation":
            out[key] = cut(value, kept)
        else:
            out[key] = _cut_slot(key, value, frame, after, kept)
    wrong = [key for key, (shape, _) in new.state.items() if key not in out or tuple(out[key].shape) != shape]
    if wrong or set(out) != set(new.state):
        raise PruneError(f"slots {sorted(wrong) or sorted(set(out) ^ set(new.state))} have another size or name in the new shape")
    return out


def _sides(frame: Frame, kept: Kept) -> dict[str, Tensor]:
    """The kept indices by the name of each side that shrinks, in the working orientation of a pipeline."""
    rows, cols = (kept.cols, kept.rows) if frame.turned else (kept.rows, kept.cols)
    return {name: keep for name, keep in (("rows", rows), ("cols", cols)) if keep is not None}


def _check_basis(frame: Frame, after: Frame, kept: Kept) -> None:
    """Raise if the subspace has a basis on a side that shrinks: rows cut out of orthonormal columns leave none."""
    if not frame.opens:
        return
    selector = frame.pipeline.selector
    kind = getattr(selector, "kind", type(selector).__name__)
    for side, coordinates, name in zip((frame.rows, frame.cols), frame.inner, ("rows", "cols"), strict=True):
        if name in _sides(frame, kept) and coordinates != side:
            raise PruneError(f"selector '{kind}' has a basis of the side that shrinks, and a part of a basis is not orthonormal")
    for key, slot in frame.slots.items():
        if key.startswith("selector.") and any(dim.name in _sides(frame, kept) for dim in slot.dims):
            raise PruneError(f"slot '{key}' of selector '{kind}' runs along the side that shrinks")
    if after.rank != frame.rank:
        raise PruneError(f"the rank of selector '{kind}' falls from {frame.rank} to {after.rank}")


def _cut_slot(key: str, value: Tensor, frame: Frame, after: Frame, kept: Kept) -> Tensor:
    """One slot `(*dims)` without the rows and columns that go."""
    slot, sides = frame.slots[key], _sides(frame, kept)
    if key in frame.codes:
        raise PruneError(f"slot '{key}' is stored as {frame.codes[key]}, whose blocks reach over rows and columns")
    if key not in after.slots or [dim.name for dim in after.slots[key].dims] != [dim.name for dim in slot.dims]:
        raise PruneError(f"slot '{key}' runs along other dimensions in the new shape")
    if slot.holds == "basis" and any(dim.name in sides for dim in slot.dims):
        raise PruneError(f"slot '{key}' is a basis of the side that shrinks, and a part of a basis is not orthonormal")
    for axis, dim in enumerate(slot.dims):
        if dim.name in sides:
            value = value.index_select(axis, sides[dim.name].to(value.device))
        elif not any(dim == other for other in (frame.rows, frame.cols, *frame.inner)):
            raise PruneError(f"slot '{key}' runs along '{dim.name}', groups of entries that the cut would mix")
    return value.clone()


def check_whole(optimizer: SubspaceOptimizer, params: Mapping[nn.Parameter, Kept]) -> None:
    """Raise unless this process holds all parameters and all state."""
    if getattr(optimizer, "_process_group", None) is not None:
        raise PruneError("a process group divides the optimizer's state; prune with an optimizer that was built without `process_group`")
    known = {p for group in optimizer.param_groups for p in group["params"]}
    unknown = [p for p in params if p not in known and p.requires_grad]
    if unknown:
        raise PruneError(f"{len(unknown)} parameters that shrink are not in the optimizer; pass the model that it was built from")
