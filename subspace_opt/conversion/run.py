"""`convert`: a saved state, a new spec and a model in; the state of the new spec and a report out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.shaped import part
from ..arguments import Params, SpecLike
from ..checkpoint import differing
from ..engine import lowbit
from ..optimizer import SubspaceOptimizer
from ..plan import Entry, Row, make_plan, state_key
from ..plan.numbers import checked_values, listed_values, numbers_of
from ..plan.views import View
from ..spec import load_spec
from .groups import SavedGroup, new_options, read_groups
from .moments import Known, Moment, full, rotated
from .report import Report, ReportRow
from .source import Blocks, ConversionError, known, read_blocks
from .target import Filled, Restart, fill


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
    """Turn the state of a running optimizer into the state of another spec, so that a run goes on with the other optimizer.

    Means of the gradient are projected or lifted, second moments rotated by squares, bases and covariances kept if selector and sizes are
    the same and else made from what the old state tells. Counters go on, so bias corrections and schedules do. Nothing of the arguments
    changes.

    Args:
        state_dict: State of a `SubspaceOptimizer`, or of `torch.optim.AdamW`, `Adam` or `SGD`.
        to: The new spec, as `build` takes it. The old one with overrides changes a rank, a selector or a state dtype.
        model: The model, or its parameters as the new optimizer gets them. Weights may be on the meta device unless the new spec reads
            them.
        lr, weight_decay: None keeps the saved ones if the specs have one name, else takes the new spec's defaults; several groups keep
            their ratios.
        step: Updates made so far, if the state has no counter, as that of SGD.
        seed: The seed of the new optimizer.
        options: Options of `SubspaceOptimizer` that change the state: `state_dtype`, `rounding`, `roles`.

    Returns:
        The state dictionary, for `load_state_dict` of `build(to, model)`, and the report.

    Raises:
        ConversionError: The state belongs to another model or to an optimizer that is not known here, or the weights are needed.
        SpecError: The new spec cannot be used.
    """
    saved, implied, state_dict = read_groups(state_dict, model)
    spec = load_spec(to, dict(overrides or {}))
    chosen, remarks = new_options(saved, spec, lr, weight_decay)
    groups = [{"params": _pairs(group), **own} for group, own in zip(saved, chosen, strict=True)]
    target = SubspaceOptimizer(groups, spec, seed=seed, **{**implied, **options})
    for group, own in zip(saved, target.param_groups, strict=True):
        if group.keys is not None and "param_names" in own:
            own |= differing(own["param_names"], group.keys)
    target._planned = None  # keys are part of the plan
    state, rows = {}, []
    for index, (old, new_row, param) in enumerate(_parameters(saved, target, state_dict["state"], step, implied)):
        if old is None:
            continue
        made, told = _converted(old, new_row, param, seed)
        rows += told
        if made:
            state[index] = made
    if any(isinstance(value, Tensor) and lowbit.found(value) for slots in state.values() for value in slots.values()):
        lowbit.torchao_types()
    return Converted({**target.state_dict(), "state": state}, Report(tuple(rows), tuple(remarks)))


def _pairs(group: SavedGroup) -> list[Any]:
    return [p if name is None else (name, p) for name, p in group.params]


class _Old(NamedTuple):
    """A parameter under the old spec."""

    row: Row
    state: Mapping[str, Any]
    blocks: list[Blocks]


def _parameters(
    saved: list[SavedGroup], target: SubspaceOptimizer, state: Mapping[Any, Any], step: int | None, implied: dict[str, Any]
) -> Iterator[tuple[_Old | None, Row, Tensor]]:
    """Every parameter: under the old spec, None if it has no state, its row of the new plan, and its weights."""
    planned = target.plan.rows
    entries = [row.entry for row in planned]
    specs = [group.spec for group in saved for _ in group.params]
    uses = [group.options.get("use") if group.keys is not None else None for group in saved for _ in group.params]
    old_rows = make_plan(specs, [_under(entry, use) for entry, use in zip(entries, uses, strict=True)]).rows
    where = iter(zip(old_rows, planned, strict=True))
    for group in saved:
        values = checked_values(group.spec, listed_values(group.options["values"])) if group.options.get("values") else {}
        for saved_id, (_, param) in zip(group.ids, group.params, strict=True):
            old_row, new_row = next(where)
            held = state.get(saved_id)
            if not held or not old_row.splits:
                yield None, new_row, param
                continue
            held = _counted(_as_ours(held, old_row, group), old_row, step)
            count = int(float(held["step"]))
            numbers = numbers_of(group.options if group.keys is not None else {}, old_row, count, values)
            frames = tuple(frame.at(numbers.values) for _, frame in old_row.splits)
            yield _Old(old_row, held, read_blocks(old_row, held, frames, target._options.seed)), new_row, param


def _under(entry: Entry, use: str | None) -> Entry:
    """The parameter in its old group."""
    from dataclasses import replace

    return replace(entry, use=use)


def _as_ours(held: Mapping[str, Any], row: Row, group: SavedGroup) -> Mapping[str, Any]:
    """State of torch's optimizers under the names and in the shapes of this package."""
    if group.keys is not None:
        return held
    out: dict[str, Any] = {}
    for key, value in held.items():
        if key == "step" or value is None:
            out |= {} if value is None else {key: value}
            continue
        if tuple(value.shape) != row.entry.shape:
            raise ConversionError(
                f"'{row.entry.name}': slot '{key}' has shape {tuple(value.shape)}, and the parameter has {row.entry.shape}; the state belongs "
                "to another model, or to an optimizer that keeps a projection outside its state"
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


# ----------------------------------------------------------------------------------------------------------- one parameter


def _converted(old: _Old, row: Row, param: Tensor, seed: int) -> tuple[dict[str, Any], list[ReportRow]]:
    """The new state of one parameter, empty if it starts anew, and its rows of the report."""
    name, pipeline = row.entry.name, old.row.pipeline if old.row.pipeline == row.pipeline else f"{old.row.pipeline} -> {row.pipeline}"
    count = old.blocks[0].count

    def told(slot: str, status: str, why: str, origin: str = "") -> ReportRow:
        return ReportRow(name, pipeline, slot, status, origin, why)

    if count < 1:
        return {}, [told("all slots", "reset", "it has had no update so far")]
    primes = any(frame.primes for _, frame in row.splits)
    refreshed = _last_refresh(row, count)
    same_view = old.row.view == row.view
    told_by = [known(blocks) for blocks in old.blocks]
    told_by = told_by if same_view else _recut(told_by, old, row)
    weights = row.view.cut(row.view.whole(param.detach())) if row.splits else []
    state: dict[str, Any] = {"step": torch.tensor(float(count + primes), dtype=torch.float32)}
    if "refreshed" in row.state:
        state["refreshed"] = torch.tensor(float(refreshed), dtype=torch.float32)
    rows: list[ReportRow] = []
    used: set[str] = set()
    for index, (block, frame) in enumerate(row.splits):
        new = Blocks(row, index, frame, {}, count, refreshed if "refreshed" in row.state else None, seed)
        source = old.blocks[index] if same_view else None
        weight = weights[index].to(row.compute_dtype) if frame.needs_weight else None
        like = torch.empty(block.count, 0, dtype=row.compute_dtype, device=_device(old))
        filled = fill(new, source, told_by[index], weight, like)
        if isinstance(filled, Restart):
            return {}, [told("all slots", "reset", f"{filled.why}: it starts anew, its counter and bias corrections included")]
        begun = source.begun if source is not None else torch.ones(block.count, dtype=torch.bool)
        for key, slot in filled.items():
            full_key = state_key(block, key)
            state[full_key], rounded = _stored(slot, begun, row, full_key, block.count)
            status = "approximate" if rounded and slot.status == "exact" and not _was_stored_so(old, full_key, row) else slot.status
            rows.append(told(full_key, status, slot.why + (f"; {rounded}" if rounded else ""), slot.origin))
            used |= set(slot.origin.split(" + ")) | ({k for k in old.state if "selector." in k} if slot.origin == "selector" else set())
    if row.compensated:
        state["compensation"] = _compensation(old, row, param)
    rows.append(told("step", "exact", "updates are counted on, so bias corrections and schedules go on", "step"))
    rows += [told(key, "dropped", "the new pipeline has no use for it", key) for key in _unused(old, used)]
    return state, rows


def _device(old: _Old) -> torch.device:
    tensors = [value for key, value in old.state.items() if isinstance(value, Tensor) and key not in ("step", "refreshed")]
    return tensors[0].device if tensors else torch.device("cpu")


def _last_refresh(row: Row, count: int) -> int:
    """The update of the last refresh on schedule."""
    frame = row.splits[0][1]
    return count - frame.pipeline.selector.age(count, row.turn) + 1 if frame.opens else count


def _stored(slot: Filled, begun: Tensor, row: Row, key: str, count: int) -> tuple[Tensor, str]:
    """A slot as the plan stores it, 0 for matrices that have had no gradient; and how it was rounded, if it was."""
    shape, dtype = row.state[key]
    value = slot.value * begun.to(slot.value.device, slot.value.dtype).reshape(-1, *[1] * (slot.value.dim() - 1))
    value = value.reshape(shape).contiguous()
    if key in row.codes:
        how = row.codes[key]
        return lowbit.coded(value.to(torch.float32), how), f"stored as {how}"
    rounded = f"rounded to {str(dtype).removeprefix('torch.')}" if dtype.is_floating_point and dtype.itemsize < value.dtype.itemsize else ""
    return value.to(dtype).clone(), rounded


def _was_stored_so(old: _Old, key: str, row: Row) -> bool:
    """True if the old state stored the slot in the same dtype or codes, so that storing it again loses nothing."""
    return key in old.row.state and old.row.state[key] == row.state[key] and old.row.codes.get(key) == row.codes.get(key)


def _compensation(old: _Old, row: Row, param: Tensor) -> Tensor:
    """What Kahan's rounding has cut off so far; 0 if the old optimizer rounded otherwise."""
    kept = old.state.get("compensation")
    return kept.clone() if isinstance(kept, Tensor) else torch.zeros(row.entry.shape, dtype=row.entry.dtype, device=_device(old))


def _unused(old: _Old, used: set[str]) -> list[str]:
    """Old slots that gave nothing to the new state."""
    found = []
    for blocks in old.blocks:
        for key in blocks.frame.slots:
            if key not in used and not key.startswith("selector.") and key not in found:
                found.append(key)
    return found


def _recut(told: list[Known], old: _Old, row: Row) -> list[Known]:
    """What is known about the matrices of another view: averages in full space, cut anew."""
    out = []
    mean = _whole([k.mean and rotated(k.mean, None, None) for k in told], old.row.view, row)
    square = _whole([k.squared(None, None) if k.square is not None else None for k in told], old.row.view, row)
    for index in range(len(row.splits)):
        first = told[0]
        out.append(
            Known(
                None if mean is None or first.mean is None else full(first.mean, mean[index]),
                None if square is None or first.square is None else full(first.square, square[index]),
            )
        )
    return out


def _whole(blocks: list[Tensor | None], view: View, row: Row) -> list[Tensor] | None:
    """Stacks of one view as stacks of the new one; None if one is missing."""
    given = [block for block in blocks if block is not None]
    if len(given) < len(blocks) or not given:
        return None
    return [part.contiguous() for part in row.view.cut(row.view.whole(view.restore(given, torch.Size(row.entry.shape))))]
