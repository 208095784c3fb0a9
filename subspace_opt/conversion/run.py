"""`convert`: a saved state, a new spec and a model in; the state of the new spec and a report out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import Params, SpecLike
from ..checkpoint import differing
from ..optimizer import SubspaceOptimizer
from ..plan import Row, make_plan
from ..plan.numbers import checked_values, listed_values, numbers_of
from ..spec import load_spec
from .groups import SavedGroup, new_options, read_groups
from .parameter import Old, converted
from .report import Report, ReportRow
from .source import ConversionError, read_blocks


class Converted(NamedTuple):
    """The state dictionary of the new spec, and the report."""

    state_dict: dict[str, Any]
    report: Report


@torch.no_grad()
def convert(
    state_dict: Mapping[str, Any],
    to: SpecLike,
    *,
    model: nn.Module | Params,
    lr: float | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    step: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Converted:
    """Turn the state of a running optimizer into the state of another spec, so that a run goes on with another optimizer.

    Means of the gradient are projected or lifted, second moments are rotated by squares, bases and covariances are kept if selector and
    sizes are the same and else made from what the old state tells. Counters go on, and with them bias corrections and schedules. No
    argument is changed.

    Args:
        state_dict: State of a `SubspaceOptimizer`, or of `torch.optim.AdamW`, `Adam` or `SGD`.
        to: The new spec, as `build` takes it. The old spec with overrides changes a rank, a selector or a state dtype.
        model: The model, or its parameters as the new optimizer gets them. They may be on the meta device unless the new spec reads the
            weights.
        lr, weight_decay: None keeps the saved ones if both specs have one name, and else takes the new spec's defaults. Several groups
            keep the ratios of their rates.
        step: Updates made so far, if the state has no counter, as that of SGD.
        seed: The seed of the new optimizer.
        options: Options of `SubspaceOptimizer` that change the state or the plan: `state_dtype`, `rounding`, `roles`.

    Returns:
        The state dictionary, for `load_state_dict` of `build(to, model)`, and the report.

    Raises:
        ConversionError: The state belongs to another model or to an optimizer that is not known here, or weights are needed.
        SpecError: The new spec cannot be used.
    """
    saved, implied, state_dict = read_groups(state_dict, model)
    spec = load_spec(to, dict(overrides or {}))
    chosen, remarks = new_options(saved, spec, lr, weight_decay)
    groups = [{"params": _pairs(group), **own} for group, own in zip(saved, chosen, strict=True)]
    target = SubspaceOptimizer(groups, spec, seed=seed, **{**implied, **options})
    _keep_keys(saved, target)
    plan = target.explain()  # anew, with the saved keys
    state: dict[int, dict[str, Any]] = {}
    rows: list[ReportRow] = []
    for index, (old, row, param) in enumerate(_parameters(saved, plan.rows, state_dict["state"], step, seed)):
        if old is not None:
            made = converted(old, row, param, seed)
            rows += made.rows
            if made.state:
                state[index] = made.state
    return Converted({**target.state_dict(), "state": state}, Report(tuple(rows), tuple(remarks)))


def _keep_keys(saved: Sequence[SavedGroup], target: SubspaceOptimizer) -> None:
    """Give the new optimizer's parameters the keys that their random draws and refresh offsets depended on."""
    for group, own in zip(saved, target.param_groups, strict=True):
        if group.keys is not None and "param_names" in own:
            own |= differing(own["param_names"], group.keys)


def _pairs(group: SavedGroup) -> list[Any]:
    return [p if name is None else (name, p) for name, p in group.params]


def _parameters(
    saved: Sequence[SavedGroup], planned: Sequence[Row], state: Mapping[Any, Any], step: int | None, seed: int
) -> Iterator[tuple[Old | None, Row, Tensor]]:
    """Every parameter: under the old spec, or None if it has no state; its row of the new plan; its weights."""
    specs = [group.spec for group in saved for _ in group.params]
    uses = [group.options.get("use") if group.is_ours else None for group in saved for _ in group.params]
    old_rows = make_plan(specs, [replace(row.entry, use=use) for row, use in zip(planned, uses, strict=True)]).rows
    where = iter(zip(old_rows, planned, strict=True))
    for group in saved:
        values = checked_values(group.spec, listed_values(group.options["values"])) if group.options.get("values") else {}
        for saved_id, (_, param) in zip(group.ids, group.params, strict=True):
            old_row, new_row = next(where)
            held = state.get(saved_id)
            if not held or not old_row.splits:
                yield None, new_row, param
                continue
            held = _counted(held if group.is_ours else _renamed(held, old_row), old_row, step)
            numbers = numbers_of(group.options if group.is_ours else {}, old_row, int(float(held["step"])), values)
            frames = tuple(frame.at(numbers.values) for _, frame in old_row.splits)
            yield Old(old_row, held, read_blocks(old_row, held, frames, seed)), new_row, param


def _renamed(held: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """State of torch's optimizers under the names and in the shapes of this package."""
    out: dict[str, Any] = {}
    for key, value in held.items():
        if key == "step":
            out[key] = value
        elif value is not None:
            if tuple(value.shape) != row.entry.shape:
                raise ConversionError(
                    f"'{row.entry.name}': slot '{key}' has shape {tuple(value.shape)}, and the parameter has {row.entry.shape}; the state "
                    "belongs to another model, or to an optimizer that keeps a projection outside its state"
                )
            (block,) = row.view.cut(row.view.whole(value.to(row.compute_dtype)))
            place = "momentum" if key == "momentum_buffer" else "complement"
            out[f"{place}.{key}"] = block if block.size(0) > 1 else block[0]
    return out


def _counted(held: Mapping[str, Any], row: Row, step: int | None) -> Mapping[str, Any]:
    """The state with a counter of updates."""
    if "step" in held:
        return held
    if step is None:
        raise ConversionError(f"'{row.entry.name}': the state has no counter `step`, as that of SGD; give the number of updates: step=1000")
    return {**held, "step": float(step)}
