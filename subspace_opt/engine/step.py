"""From gradients to weights: load stacks, apply the pure mathematics, settle the state, update. Boxes 3 to 6 of the walk.

Only this file, `survey`, `stacks` and `update` know of devices, dtypes of parameters and storage.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ..algebra import Constants, State, Step, linalg
from ..algebra.frame import Product, Split
from ..plan.views import Block
from ..registry import kind_of
from .stacking import Memory, counted, gather, refreshed, scatter, stacks
from .weights import generator, update_weight, update_weights
from .work import Options, Phase, Piece, Stack, Work

MOST_FAILURES = 3  # decompositions of one parameter that may fail in a row


def take_step(work: list[Work], options: Options, memory: Memory, failures: dict[str, int]) -> None:
    """Update every parameter of a surveyed list. `failures`: of decompositions in a row, by parameter, kept up to date.

    Raises:
        torch.linalg.LinAlgError: a decomposition failed `MOST_FAILURES` times in a row for one parameter; all others are updated by then.
    """
    errors: dict[str, Exception] = {}
    compute(work, options, memory, errors)
    write_back(work)
    close(work, memory)
    report(work, errors, failures)


def compute(work: list[Work], options: Options, memory: Memory, errors: dict[str, Exception]) -> None:
    """Updates and new state; `errors` is told of decompositions that failed."""
    # In an order of their own: round-off within a batched product depends on the place in it, and the order of parameters must not matter.
    work = sorted(work, key=lambda item: item.name)
    for stack in stacks(_left_by_kernels(work, options), options, memory):
        _advance(stack, options, memory, errors)


def count(name: str, state: dict[str, Any], memory: Memory) -> int:
    """Updates made so far, by the counter in the state, which is read only where somebody else may have written to it."""
    step = state["step"]
    known = memory.counts.get(name)
    if known is None or known[0] is not step or known[1] != step._version:
        known = memory.counts[name] = (step, step._version, int(step.item()))
    return known[2]


def close(work: list[Work], memory: Memory) -> None:
    """Count the updates."""
    counters = [item.state["step"] for item in work if item.count >= 0 and not item.held]
    if counters:
        torch._foreach_add_(counters, 1.0)
    for item in work:
        if item.count >= 0 and not item.held:
            step = item.state["step"]
            memory.counts[item.name] = (step, step._version, item.count + 1)


def write_back(work: list[Work]) -> None:
    """Copy weights, compensations and updates to where they belong, if their storage could not be viewed as matrices."""
    for item in work:
        for stored, name in ((item.param, "weights"), (item.state.get("compensation"), "compensations")):
            blocks = vars(item).get(name)  # what was never looked at need not be written back
            if stored is not None and blocks and blocks[0].untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
                stored.copy_(item.row.view.restore(blocks, stored.shape))


# --------------------------------------------------------------------------------------------------------------------- kernels


def _left_by_kernels(work: list[Work], options: Options) -> list[Work]:
    """Have PyTorch's fused kernels update what they can, in place; returns the others."""
    left: list[Work] = []
    fit: dict[Any, list[Work]] = defaultdict(list)
    for item in work:
        if _fits_a_kernel(item):
            rate = id(item.lr) if isinstance(item.lr, Tensor) else item.lr
            fit[(id(item.row.splits[0][1].pipeline), item.count, rate, item.weight_decay, item.param.device, item.param.dtype)].append(item)
        else:
            left.append(item)
    for items in fit.values():
        _run_kernel(items)
    return left


def _run_kernel(items: list[Work]) -> None:
    first = items[0]
    split = first.row.splits[0][1]
    assert split.kernel is not None
    key, rule = split.kernel
    states = {name: [_shaped(item.state[f"{key}.{name}"], item.param) for item in items] for name in rule.slots(split.rows, split.cols)}
    rule.update_in_place(
        [item.param for item in items], [item.grad for item in items], states, first.count + 1, first.lr, first.weight_decay
    )


def _shaped(value: Tensor, param: Tensor) -> Tensor:
    return value if value.shape == param.shape else value.view(param.shape)


def _fits_a_kernel(item: Work) -> bool:
    """Whether one rule makes the whole update and has a kernel for it, and storage is as kernels want it."""
    if item.count < 0 or item.scale != 1.0 or item.outbox is not None or len(item.row.splits) != 1 or item.row.splits[0][1].kernel is None:
        return False
    if item.row.converts:
        return False
    p, g = item.param, item.grad
    alike = p.dtype == g.dtype == item.row.compute_dtype and p.device == g.device and p.device.type in linalg.FUSED
    return alike and p.is_contiguous() and g.is_contiguous() and not item.row.view.transposed


# ------------------------------------------------------------------------------------------------------- apply, settle, update


def update_coordinates(work: Work, c: Tensor, options: Options, memory: Memory) -> Tensor:
    """Updated coordinates `(1, k, r)` of a matrix whose gradient and weight are elsewhere, at an update without a refresh."""
    piece = Piece(work, 0, 0, 1)
    split = work.row.splits[0][1]
    old = {key: piece.slot(key).to(c.dtype) for key in split.slots if not key.startswith("selector.")}
    step = _step(Stack(split, Phase.BEGUN, False, [piece]), options, memory.tables)
    update, factor, new = split.inner_direction(c, old, step)
    update = update * factor  # before the state is written: the update may be part of it
    for key in old:
        piece.put(key, new[key])
    return update


def _advance(stack: Stack, options: Options, memory: Memory, errors: dict[str, Exception]) -> None:
    """Apply, update, settle. Where a decomposition fails, matrices go on with the basis they have, and `errors` is told whose."""
    split, pieces = stack.split, stack.pieces
    if stack.phase is Phase.WAITING:
        _update(stack, None, options)
        return
    grad = _gradients(stack)
    old, kept_here = gather(stack, options, memory)
    weight = _joined([p.of(p.work.weights) for p in pieces], stack.dtype) if split.needs_weight else None
    step = _step(stack, options, memory.tables)
    sound, factored = options.nonfinite != "propagate", _takes_products(stack)
    # On a CPU a basis is looked at when it is made; elsewhere the update is, and what was overwritten by then could not be had back.
    told = grad.device.type == "cpu" or not (sound and step.refresh)
    if kept_here and stack.phase is Phase.BEGUN and split.fails_first(step.refresh) and told:
        step = step._replace(in_place=True)
    try:
        update, factor, new = _run(split, grad, weight, old, step, sound, factored)
    except torch.linalg.LinAlgError as error:
        if len(pieces) > 1:  # one by one, to learn whose fault it is and to spare the others
            for piece in pieces:
                _advance(Stack(split, stack.phase, stack.refresh, [piece]), options, memory, errors)
            return
        name = pieces[0].work.name
        if step.in_place and step.refresh and not split.pipeline.selector.decomposes:  # what it began with is no longer there
            kind = kind_of(type(split.pipeline.selector))
            raise RuntimeError(
                f"a decomposition for '{name}' failed in selector '{kind}', which says that its refresh takes none: load the last "
                "checkpoint, and let its `decomposes` be True"
            ) from error
        errors[name] = error
        if step.first:  # there is no basis to go on with: it begins with the next gradient
            pieces[0].work.held = len(pieces[0].work.row.splits) == 1 and pieces[0].block.total == 1
            pieces[0].be_silent()
            return
        if step.refresh and not split.pipeline.selector.keeps_basis:
            pieces[0].be_silent()
            return
        try:
            kept = _without_refresh(split, old) if step.refresh else old
            unchanged = step._replace(refresh=False, in_place=False)
            update, factor, new = _run(split, grad, weight, kept, unchanged, sound, factored)
        except torch.linalg.LinAlgError:  # it was not the basis but a rule
            pieces[0].be_silent()
            return
    if isinstance(update, Product):
        _add_product(pieces[0], update, split, factor)
    elif update is not None:
        _update(stack, update, options, factor)  # before the state is written: the update may be part of it
    else:
        for piece in pieces:
            piece.be_silent()
    scatter(stack, old, new, options, memory)
    if step.refresh and (stack.phase is Phase.BEGUN or not pieces[0].work.count):
        for piece in pieces:
            if "refreshed" in piece.work.state:
                piece.work.state["refreshed"].fill_(step.t)


def _run(
    split: Split, grad: Tensor, weight: Tensor | None, old: State, step: Step, sound: bool, factored: bool
) -> tuple[Tensor | Product | None, float, State]:
    """Update, a number to multiply it by, and new state; no update yet where the first gradient only sets the basis."""
    if step.first and split.primes:
        return None, 1.0, split.prime(grad, weight, old, step)
    update, factor, new = split.direction(grad, weight, old, step, factored=factored)
    # A QR returns NaN where other decompositions raise. What only the basis can fail at has been looked at there.
    if (
        sound
        and not step.in_place
        and (step.refresh or split.decomposes)
        and not all(linalg.all_finite(part) for part in ((update.left, update.right) if isinstance(update, Product) else (update,)))
    ):
        raise torch.linalg.LinAlgError("the update holds NaN or infinity although the gradient does not")
    return update, factor, new


def _without_refresh(split: Split, old: State) -> State:
    """The state where a refresh was due and the basis stays: what begins anew with it still does, as its bias correction counts on it."""
    return {key: torch.zeros_like(v) if split.slots[key].transport == "reset" else v for key, v in old.items()}


def _gradients(stack: Stack) -> Tensor:
    """`(B, rows, cols)`, in range; gathered by one operation where the parameters themselves are the matrices."""
    pieces = stack.pieces
    if len(pieces) > 1 and all(p.work.is_matrix and p.work.scale == 1.0 for p in pieces):
        return _joined([torch.stack([p.work.grad for p in pieces])], stack.dtype)
    return _joined([_gradient(piece) for piece in pieces], stack.dtype)


def _gradient(piece: Piece) -> Tensor:
    work = piece.work
    grad = piece.of(work.grads)
    return grad if work.scale == 1.0 else grad.to(work.row.compute_dtype) * work.scale


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])).to(dtype)


def _step(stack: Stack, options: Options, tables: dict[Any, Tensor]) -> Step:
    split, pieces, refresh = stack.split, stack.pieces, stack.refresh
    work, selector = pieces[0].work, split.pipeline.selector
    call, t = work.count + 1, counted(work, split)
    first = stack.phase is Phase.FIRST
    noise = None
    shape = selector.draws(split.rows, split.cols, call, first) if refresh else None
    if shape is not None:
        drawn = torch.cat([_noise(piece, call, shape, options.seed) for piece in pieces])
        noise = drawn.to(work.param.device, work.row.compute_dtype)
    return Step(
        t=_clock(t),
        age=_clock(_age(work, split, t, refresh)),
        first=first,
        refresh=refresh,
        decay=work.weight_decay,
        rows=split.rows,
        cols=split.cols,
        position=_positions(tuple(p.work.row.position for p in pieces for _ in range(p.size))),
        noise=noise,
        constants=_constants(split, work, tables) if split.opens else {},
    )


# Tensors that nobody writes to, made once: making one takes longer than much of what is done with it.
@functools.lru_cache(maxsize=8)
def _clock(t: int) -> Tensor:
    return torch.tensor(float(t), dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _positions(places: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.tensor(places)


def _age(work: Work, split: Split, t: int, refresh: bool) -> int:
    """Updates since the last basis was taken, this one counted; by the schedule where nothing hangs on it."""
    if refresh:
        return 1
    last = refreshed(work)
    return split.pipeline.selector.age(max(t, 1), work.row.turn) if last is None else t - last + 1


def _noise(piece: Piece, call: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draws that depend on (seed, name, block, update) alone, `(matrices, *shape)` float32."""
    words = (seed, piece.work.name, piece.block.name, call)
    whole = torch.randn(piece.block.total, *shape, generator=generator(torch.device("cpu"), *words))
    return whole[piece.block.first + piece.start : piece.block.first + piece.stop]


def _constants(split: Split, work: Work, tables: dict[Any, Tensor]) -> Constants:
    """Tables shared by all matrices that need them, built once per device and dtype."""
    out: Constants = {}
    for name, make in split.pipeline.selector.constants(split.rows, split.cols).items():
        key = (name, work.param.device, work.row.compute_dtype)
        if key not in tables:
            tables[key] = make().to(work.param.device, work.row.compute_dtype)
        out[name] = tables[key]
    return out


def report(work: list[Work], errors: dict[str, Exception], failures: dict[str, int]) -> None:
    """Count failures in a row, warn of each, give up at `MOST_FAILURES`."""
    for item in work:
        if item.name not in errors:
            failures.pop(item.name, None)
    for name, error in errors.items():
        failures[name] = failures.get(name, 0) + 1
        if failures[name] < MOST_FAILURES:
            warnings.warn(
                f"a decomposition for '{name}' failed; its basis is kept and the next update tries again: {error}",
                RuntimeWarning,
                stacklevel=5,
            )
    for name, error in errors.items():
        if failures[name] >= MOST_FAILURES:
            raise torch.linalg.LinAlgError(
                f"the decomposition for '{name}' failed {failures[name]} times in a row; its basis was kept until now: {error}"
            ) from error


def _update(stack: Stack, update: Tensor | None, options: Options, factor: float = 1.0) -> None:
    if update is not None and _updated_together(stack, update, options, factor):
        return
    parts = [None] * len(stack.pieces) if update is None else update.split(stack.sizes)
    for piece, part in zip(stack.pieces, parts, strict=True):
        work = piece.work
        if work.outbox is not None:
            if part is not None:
                piece.of(work.outgoing).copy_(part * factor)
            continue
        w = piece.of(work.weights)
        if part is None:  # no update yet: decay alone
            part = torch.zeros(w.shape, dtype=work.row.compute_dtype, device=w.device)
        low = w.dtype != part.dtype
        noise = None
        if low and options.rounding == "stochastic":
            noise = torch.empty_like(part)
            for i, one in enumerate(noise, piece.start):
                one.copy_(rounding_draw(work.name, piece.block, i, work.count, options, one))
        update_weight(
            w,
            part,
            work.lr,
            _decay(piece, stack.split),
            factor=factor,
            decay_after=stack.split.pipeline.decay == "after",
            rounding=options.rounding,
            compensation=piece.of(work.compensations) if work.compensations else None,
            noise=noise,
        )


def rounding_draw(name: str, block: Block, i: int, count: int, options: Options, like: Tensor) -> Tensor:
    """Uniform draws for matrix `i` of a block, or for the cut of it that a rank holds: how stacks and shards are cut must not matter."""
    top, left, rows, cols = block.window or (0, 0, block.rows, block.cols)
    words = (options.seed, "rounding", name, block.name, block.first + i, count)
    whole = torch.empty(rows, cols, dtype=like.dtype, device=like.device).uniform_(generator=generator(like.device, *words))
    return whole[top : top + block.rows, left : left + block.cols]


def _decay(piece: Piece, split: Split) -> float:
    return 0.0 if split.pipeline.decay == "coupled" else piece.work.weight_decay


def _takes_products(stack: Stack) -> bool:
    """Whether an update may come as two factors, to be multiplied into the weight: one whole matrix in the dtype of computation."""
    piece = stack.pieces[0]
    work = piece.work
    alone = len(stack.pieces) == 1 and piece.size == 1 and work.outbox is None
    return alone and stack.split.factored and work.param.dtype == stack.dtype and not isinstance(work.lr, Tensor)


def _add_product(piece: Piece, update: Product, split: Split, factor: float) -> None:
    """`W <- (1 - lr wd) W - lr factor (A B + R)` (times 1 - lr wd, where decay comes after), in one pass over W for each that there is."""
    lr, decay, after = piece.work.lr, _decay(piece, split), split.pipeline.decay == "after"
    assert not isinstance(lr, Tensor)
    kept = 1 - lr * decay
    alpha = -lr * factor * (kept if after else 1.0)
    weights = piece.of(piece.work.weights)
    (w,), (left,), (right,) = weights, update.left, update.right
    if update.rest is not None:
        update_weight(weights, update.rest, lr, decay, factor=factor, decay_after=after)
        kept = 1.0
    if left.dim() == 2 == right.dim():
        w.addmm_(left, right, beta=kept, alpha=alpha)
        return
    if kept != 1.0:
        w.mul_(kept)
    if left.dim() == 1:
        w.index_add_(0, left, right, alpha=alpha)
    else:  # the index_add of columns takes several times as long
        index = right.expand(w.size(0), -1)
        w.scatter_(1, index, w.gather(1, index).add_(left, alpha=alpha))


def _updated_together(stack: Stack, update: Tensor, options: Options, factor: float) -> bool:
    """One operation for all weights of a stack, where they are its matrices, in its dtype, with one lr and decay; else nothing is done."""
    pieces = stack.pieces
    first = pieces[0].work
    rate, decay = first.lr, _decay(pieces[0], stack.split)
    if len(pieces) < 2 or isinstance(rate, Tensor) or any(p.work.outbox is not None for p in pieces):
        return False
    if not all(p.work.is_matrix and p.work.lr == rate and _decay(p, stack.split) == decay for p in pieces):
        return False
    low = first.param.dtype != update.dtype
    if any(p.work.param.dtype != first.param.dtype for p in pieces) or (low and options.rounding != "nearest"):
        return False
    weights, after = [p.work.param for p in pieces], stack.split.pipeline.decay == "after"
    if low:
        together = torch.stack(weights).to(update.dtype)
        update_weight(together, update, rate, decay, factor=factor, decay_after=after)
        torch._foreach_copy_(weights, together.unbind(0))
    else:
        update_weights(weights, list(update.unbind(0)), rate, decay, factor=factor, decay_after=after)
    return True
