"""One step: from gradients to weights.

    parameters --fused--> updated by one kernel
               --stacking--> stacks of matrices --moment, homes--> Frame.update --weights--> decay and update --homes--> new state

If a decomposition fails, its matrix gets no refresh, or no update, in this step. All other matrices are updated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..algebra.core import State, Step
from ..algebra.frame import Frame
from ..algebra.linear import Linear
from ..algebra.weight_rule import WeightError
from ..registry import kind_of
from .capture.clock import is_capturing
from .compiled.update import Update, update_of
from .flags.failures import Failure, count_failures
from .flags.gate import finite_matrices, over, spread
from .fused import update_by_kernels
from .homes import Memory, gather, scatter
from .moment import step_of
from .stacking import stacks
from .strategies import decomposes, fails_first
from .weights import update_stack
from .work import Options, Phase, Piece, Stack, Work


def take_step(work: list[Work], options: Options, memory: Memory, failures: dict[str, int]) -> None:
    """Update every parameter of an inspected list.

    Args:
        failures: Failed decompositions in a row, by parameter; kept up to date.

    Raises:
        torch.linalg.LinAlgError: a decomposition failed `MOST_FAILURES` times in a row for one parameter; all others are updated by then.
    """
    errors: dict[str, Exception] = {}
    compute(work, options, memory, errors)
    write_back(work)
    close(work, memory, options)
    memory.watch.send()
    report(work, errors, failures)


def compute(work: list[Work], options: Options, memory: Memory, errors: dict[str, Exception]) -> None:
    """Make updates and new state; add failed decompositions to `errors`, by parameter."""
    # Sorted, because round-off within a batched product depends on the place in it, and the order of parameters must not matter.
    work = sorted(work, key=lambda item: item.key)
    for stack in stacks(update_by_kernels(work, options), options, memory):
        _advance(stack, options, memory, errors)


def close(work: list[Work], memory: Memory, options: Options | None = None) -> None:
    """Count the updates. While a graph is captured nothing runs, so the counts that the host knows stay."""
    moved = [item for item in work if item.count >= 0 and not item.held]
    counters = [item.state["step"] for item in moved]
    capturable = options is not None and options.capturable
    gates = [item.gate for item in moved if item.gate is not None] if capturable else []
    if gates:
        torch._foreach_add_(counters, [gate.to(torch.float32) for gate in gates])
    elif counters:
        torch._foreach_add_(counters, 1.0)
    capturing = capturable and is_capturing()
    for item in moved:
        step = item.state["step"]
        memory.counts[item.name] = (step, step._version, item.count + (0 if capturing else 1))
    if capturing:
        memory.captured = tuple(item.name for item in moved)


def write_back(work: list[Work]) -> None:
    """Copy weights, compensations and updates to their tensors, if the storage of these could not be viewed as matrices."""
    for item in work:
        stores = (item.param, "weights"), (item.state.get("compensation"), "compensations"), (item.outbox, "outgoing")
        for stored, name in stores:
            blocks = vars(item).get(name)  # a cached property that was never read need not be written back
            if stored is not None and blocks and blocks[0].untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
                stored.copy_(item.row.view.restore(blocks, stored.shape))


def report(work: list[Work], errors: dict[str, Exception], failures: dict[str, int]) -> None:
    """Count failed decompositions in a row. With a gate, the flags of this step decide whether a parameter succeeded."""
    found: dict[str, Failure | None] = {item.name: None for item in work if item.name not in errors and item.gate is None}
    for name, error in errors.items():
        found[name] = Failure(f"failed; its basis is kept and the next update tries again: {error}", error)
    count_failures(found, failures)


def update_coordinates(work: Work, c: Tensor, options: Options, memory: Memory) -> Tensor:
    """Updated coordinates `(1, k, r)` of a matrix whose gradient and weight are on other ranks, at an update without a refresh."""
    piece = Piece(work, 0, 0, 1)
    frame = work.splits[0][1]
    old = {key: piece.slot(key).to(c.dtype) for key in frame.slots if not key.startswith("selector.")}
    step = step_of(Stack(frame, Phase.BEGUN, False, [piece]), options, memory.tables)
    update, factor, new = frame.update_coordinates(c, old, step)
    update = update * factor  # before the state is written: the update may share its storage
    for key in old:
        piece.put(key, new[key])
    return update


# ------------------------------------------------------------------------------------------------------------------ one stack


@dataclass(frozen=True)
class _Inputs:
    """`update`, which is `Frame.update` or its compiled form, and its arguments for one stack.

    `sound`: NaN in a result is an error, because the gradient has none.
    """

    grad: Tensor
    weight: Tensor | None
    state: State
    step: Step
    sound: bool
    update: Update
    checks: bool = False  # a decomposition may have failed, and no host waits to learn it: its flags gate the update


def _advance(stack: Stack, options: Options, memory: Memory, errors: dict[str, Exception]) -> None:
    """Compute the update of a stack, update its weights, and store its state."""
    if stack.phase is Phase.WAITING:
        stack = _gated(stack)
        update_stack(stack, _waiting(stack, options, memory) if stack.frame.pipeline.apply else None, options)
        return
    stack = _gated(stack)
    given = _inputs(stack, options, memory)
    made: tuple[Linear | None, State] | None
    try:
        made = _computed(stack.frame, given)
    except (torch.linalg.LinAlgError, WeightError) as error:
        if len(stack.pieces) > 1:  # one by one, to find the matrix that fails and to spare the others
            for piece in stack.pieces:
                _advance(replace(stack, pieces=[piece], gate=None), options, memory, errors)
            return
        if isinstance(error, WeightError):
            raise WeightError(f"'{stack.pieces[0].work.name}': {error}") from error
        made = _after_failure(stack, given, error, errors)
    if made is not None:
        if given.checks and stack.gate is not None:
            stack = _without_failed(stack, given, made[0], memory)
        _settle(stack, given, *made, options, memory)


def _gated(stack: Stack) -> Stack:
    """The stack with the gate of its parameters: one for all matrices if they share it, else one for each."""
    gates = [piece.work.gate for piece in stack.pieces]
    if stack.gate is not None or gates[0] is None:
        return stack
    first = gates[0]
    return replace(stack, gate=first if all(gate is first for gate in gates) else spread([g for g in gates if g is not None], stack.sizes))


def _without_failed(stack: Stack, given: _Inputs, update: Linear | None, memory: Memory) -> Stack:
    """The stack with a closed gate for matrices whose decomposition failed. The flags are read at the next step."""
    assert stack.gate is not None
    count = sum(stack.sizes)
    found = None if update is None else finite_matrices(update.unknown(given.grad), count)
    if found is None:
        return stack
    names = [piece.work.name for piece in stack.pieces for _ in range(piece.size)]
    memory.watch.failing(names, stack.gate & ~found)
    return replace(stack, gate=stack.gate & found)


def _inputs(stack: Stack, options: Options, memory: Memory) -> _Inputs:
    frame, pieces = stack.frame, stack.pieces
    grad = _gradients(stack) if stack.gate is None else _guarded_gradients(stack, stack.gate)
    state, is_stored = gather(stack, memory)
    weight = _joined([_weights(p) for p in pieces], stack.dtype) if frame.needs_weight else None
    step = step_of(stack, options, memory.tables)
    sound = options.nonfinite != "propagate"
    # A CPU searches a new basis for NaN at once. Other devices search the update, when overwritten state could no longer be restored.
    restorable = grad.device.type == "cpu" or not (sound and step.refresh)
    if is_stored and stack.gate is None and stack.phase is Phase.BEGUN and fails_first(frame, refresh=step.refresh) and restorable:
        step = step._replace(in_place=True)
    checks = stack.gate is not None and (step.refresh or decomposes(frame))
    update, step = update_of(stack, step, options)
    return _Inputs(grad, weight, state, step, sound and not checks, update, checks)


def _waiting(stack: Stack, options: Options, memory: Memory) -> Linear:
    """The displacement of weights without a gradient so far."""
    weight = _joined([_weights(piece) for piece in stack.pieces], stack.dtype)
    return stack.frame.waiting_displacement(weight, step_of(stack, options, memory.tables))


def _weights(piece: Piece) -> Tensor:
    """The weights of a piece, `(count, rows, cols)`. Rules in `apply` see what Kahan's rounding has cut off too."""
    weights, lost = piece.of(piece.work.weights), piece.work.compensations
    if lost is None or not piece.frame.pipeline.apply:
        return weights
    dtype = piece.work.row.compute_dtype
    return weights.to(dtype) + piece.of(lost).to(dtype)


def _computed(frame: Frame, given: _Inputs) -> tuple[Linear | None, State]:
    """Update and new state; no update if the first gradient only sets the basis.

    Raises:
        torch.linalg.LinAlgError: a decomposition failed, or its result holds NaN. A QR returns NaN where others raise.
    """
    step = given.step
    if step.first and frame.primes:
        return None, frame.prime(given.grad, given.weight, given.state, step)
    update, new = given.update(given.grad, given.weight, given.state, step)
    if given.sound and not step.in_place and (step.refresh or decomposes(frame)) and not update.is_finite(given.grad):
        raise torch.linalg.LinAlgError("the update holds NaN or infinity although the gradient does not")
    return update, new


def _after_failure(stack: Stack, given: _Inputs, error: Exception, errors: dict[str, Exception]) -> tuple[Linear | None, State] | None:
    """Update and new state of one matrix with the basis it has; None if the matrix gets no update in this step."""
    (piece,), frame, step = stack.pieces, stack.frame, given.step
    keeps = frame.selector_traits
    if step.in_place and step.refresh and not keeps.decomposes:  # its state has been overwritten
        kind = kind_of(type(frame.pipeline.selector))
        raise RuntimeError(
            f"a decomposition for '{piece.work.name}' failed in selector '{kind}', whose traits declare `decomposes=False`: load the last "
            "checkpoint, and let the selector declare `decomposes=True`"
        ) from error
    errors[piece.work.name] = error
    if step.first:  # there is no basis yet: the matrix begins with its next gradient
        piece.work.held = len(piece.work.splits) == 1 and piece.block.total == 1
    elif not step.refresh or keeps.keeps_basis:
        kept = replace(given, state=_without_refresh(frame, given.state) if step.refresh else given.state)
        try:
            return _computed(frame, replace(kept, step=step._replace(refresh=False, in_place=False), update=frame.update))
        except torch.linalg.LinAlgError:  # a rule failed, not the refresh
            pass
    piece.be_silent()
    return None


def _without_refresh(frame: Frame, state: State) -> State:
    """The state if a refresh failed and the basis stays: slots that reset at a refresh still do, as their bias correction counts on it."""
    return {key: torch.zeros_like(v) if frame.slots[key].transport == "reset" else v for key, v in state.items()}


def _settle(stack: Stack, given: _Inputs, update: Linear | None, new: State, options: Options, memory: Memory) -> None:
    """Update the weights, then store the state, of which the update may be made."""
    if update is None:
        for piece in stack.pieces:
            piece.be_silent()
    else:
        update_stack(stack, update, options)
    scatter(stack, given.state, new, memory)
    if given.step.refresh and (stack.phase is Phase.BEGUN or not stack.pieces[0].work.count):
        for piece in stack.pieces:
            if "refreshed" in piece.work.state:
                _mark(piece.work, given.step, memory, options)


def _mark(work: Work, step: Step, memory: Memory, options: Options) -> None:
    """Note the update of a refresh."""
    mark = work.state["refreshed"]
    if not options.capturable:
        mark.fill_(step.t)
        return
    mark.copy_(step.t if work.gate is None else torch.where(work.gate, step.t.to(mark.device), mark))
    memory.marks[work.name] = (mark, mark._version, work.count if work.splits[0][1].primes else work.count + 1)


def _gradients(stack: Stack) -> Tensor:
    """Gradients `(B, rows, cols)`, scaled into range; one `torch.stack` if the parameters themselves are the matrices."""
    pieces = stack.pieces
    if len(pieces) > 1 and all(p.work.is_matrix and p.work.scale == 1.0 for p in pieces):
        return _joined([torch.stack([p.work.grad for p in pieces])], stack.dtype)
    return _joined([_gradient(piece) for piece in pieces], stack.dtype)


def _guarded_gradients(stack: Stack, gate: Tensor) -> Tensor:
    """As `_gradients`, with scales that only the device knows. Before a decomposition, a gradient whose gate is closed becomes 0."""
    pieces = stack.pieces
    if len(pieces) > 1 and all(p.work.is_matrix for p in pieces):
        raw = torch.stack([p.work.grad for p in pieces])
    else:
        raw = _joined([piece.of(piece.work.grads) for piece in pieces], stack.dtype)
    scales = spread([torch.as_tensor(piece.work.scale) for piece in pieces], stack.sizes)
    grad = raw.to(stack.dtype) * over(scales, 3)
    return grad.masked_fill_(over(gate, 3).logical_not(), 0.0) if stack.refresh or decomposes(stack.frame) else grad


def _gradient(piece: Piece) -> Tensor:
    work = piece.work
    grad = piece.of(work.grads)
    return grad if work.scale == 1.0 else grad.to(work.row.compute_dtype) * work.scale


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])).to(dtype)
