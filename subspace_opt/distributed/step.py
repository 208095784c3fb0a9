"""One step of parameters that are distributed over several ranks.

The flow, from this rank's shards of the gradients to this rank's shards of the weights:

    1  survey              One all-reduce with two numbers for each parameter: every rank learns which parameters have a gradient, and its
                           norm. All ranks then raise or skip the same parameters.
    2  take_step           For each group of ranks:
       a  gather_bases     For parameters cut along their basis whose refresh is due: the owner gets the whole basis for this step.
       b  coordinates      The other parameters cut along their basis: the shards send their coordinates, the owner updates the sum, the
                           shards lift the result (coordinates.py).
       c  compute          For parameters with nothing to send: every rank updates its own shard with the engine.
       d  buckets          All other parameters, some at a time (buckets.py):
                               shards of gradients  --all-to-all-->  whole matrices on their owners
                               the engine computes their updates (engine.compute) and stores their state (engine.write_back)
                               updates  --all-to-all-->  one replica of each shard  --all-to-all-->  the other replicas
                               every rank updates its own shard of the weights
       e  scatter_bases    The owner sends every rank its rows of the new basis.
       f  close, report    Counters advance; failed decompositions are reported on all ranks.

The exchange of the next bucket runs while the current one is computed. All ranks run the same collectives in the same order,
even if some of them have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..engine import step as engine
from ..engine.gradients import judged, largest, nonfinite, transferred
from ..engine.homes import Memory
from ..engine.work import Options, allocate
from ..plan import COUNTERS
from .buckets import make_buckets, receive_gradients, receive_updates, send_gradients, send_updates
from .coordinates import batches, gather_bases, needs_refresh, scatter_bases, update_in_coordinates
from .exchange import RankGroup, ShardingError
from .placement import BASIS, Sharding
from .shards import ShardedParam, local_work

# ------------------------------------------------------------------------------------------------------------------- survey


def survey(params: list[ShardedParam], options: Options) -> tuple[list[ShardedParam], list[str]]:
    """The parameters to update and the names of those that are skipped, the same on all ranks. A collective.

    Raises:
        NonFiniteGradient: a gradient is not finite and the policy is `raise`; nothing has been changed.
        ShardingError: some ranks have a gradient of a replicated parameter and others have none.
    """
    found = [pair for group, own in _by_group(params).items() for pair in agree_on_gradients(group, own, options)]
    bad = judged((param.work, size) for param, size in found if _needs_size(param, options))
    if bad and options.nonfinite == "raise":
        raise nonfinite(bad)
    skipped = set(bad) if options.nonfinite == "skip" else set()
    return [param for param, _ in found if param.name not in skipped], sorted(skipped)


def _by_group(params: Sequence[ShardedParam]) -> dict[RankGroup, list[ShardedParam]]:
    groups: dict[RankGroup, list[ShardedParam]] = {}
    for param in params:
        groups.setdefault(param.group, []).append(param)
    return groups


def _needs_size(param: ShardedParam, options: Options) -> bool:
    """True if the size of the gradient matters: always at the first update, later unless the policy is `propagate`."""
    return options.nonfinite != "propagate" or param.work.count == 0


def agree_on_gradients(group: RankGroup, params: Sequence[ShardedParam], options: Options) -> list[tuple[ShardedParam, float]]:
    """The parameters with a gradient on any rank, each with its size, the same on every rank. A missing shard becomes zeros.

    The size is the Frobenius norm. It is the largest absolute value instead if the norm is 0, not finite, or too large to be squared.

    Raises:
        ShardingError: some ranks have a gradient of a replicated parameter and others have none.
    """
    if not params:
        return []
    device = params[0].weight.device
    grads = [_counted_gradient(group, param) if _needs_size(param, options) else None for param in params]
    squares = [size**2 for size in _sizes(grads, norms=True)]
    table = torch.tensor([squares, [float(param.grad is not None) for param in params]], dtype=torch.float64, device=device)
    sums, counts = group.sum(table).tolist()
    found = []
    for param, square, count in zip(params, sums, counts, strict=True):
        if count == 0:
            continue
        if count < group.size and _is_replicated(param.sharding):
            raise ShardingError(
                f"'{param.name}' has a gradient on {int(count)} of {group.size} ranks that hold copies of it; average the gradients over "
                "all of them, as DistributedDataParallel(find_unused_parameters=True) does"
            )
        if param.grad is None:
            param.grad = torch.zeros_like(param.weight)
        found.append((param, math.sqrt(square) if square >= 0 else square))
    return _with_peaks(group, found, options)


def _with_peaks(group: RankGroup, found: list[tuple[ShardedParam, float]], options: Options) -> list[tuple[ShardedParam, float]]:
    """Replace norms that are 0, not finite or too large to be squared by the largest absolute value on any rank."""
    unsure = [
        i
        for i, (param, size) in enumerate(found)
        if _needs_size(param, options) and not 0.0 < size <= largest(param.sharding.row.compute_dtype)
    ]
    if not unsure:
        return found
    peaks = _sizes([found[i][0].grad for i in unsure], norms=False)
    peaks = [math.inf if math.isnan(peak) else peak for peak in peaks]  # some backends lose a NaN in a maximum
    table = torch.tensor(peaks, dtype=torch.float64, device=found[0][0].weight.device)
    out = list(found)
    for i, peak in zip(unsure, group.max(table).tolist(), strict=True):
        out[i] = (found[i][0], peak)
    return out


def _counted_gradient(group: RankGroup, param: ShardedParam) -> Tensor | None:
    """The entries of a gradient that this rank counts, so that the ranks together count each entry once; None if it counts none."""
    if param.grad is None or not param.grad.numel():
        return None
    if param.sharding.updates_in_place:
        part = param.part
        return None if part is None or part.owners[0] != group.rank else param.grad[part.box.slices_in(param.box)]
    return param.grad if param.sharding.replica_index[group.rank] == 0 else None


def _sizes(grads: Sequence[Tensor | None], *, norms: bool) -> list[float]:
    """The norm, or the largest absolute value, of each gradient with one transfer from the device; 0 for a missing or empty one."""
    there = [i for i, grad in enumerate(grads) if grad is not None and grad.numel()]
    out = [0.0] * len(grads)
    for i, size in zip(there, transferred([grad for grad in (grads[i] for i in there) if grad is not None], norms=norms), strict=True):
        out[i] = size
    return out


def _is_replicated(sharding: Sharding) -> bool:
    """True if two ranks hold the same shard."""
    held = [box for box in sharding.boxes if box.numel]
    return len(set(held)) < len(held)


# --------------------------------------------------------------------------------------------------------------------- step


def take_step(params: list[ShardedParam], state: Any, options: Options, memory: Memory, failures: dict[str, int]) -> None:
    """Update the parameters that `survey` has returned. `state` is the optimizer's state. A collective.

    Raises:
        LinAlgError: as `engine.take_step`, on all ranks together.
    """
    for param in params:
        param.work.state = state[param.tensor]
    for group, own in _by_group(params).items():
        _step(group, own, options, memory, failures)


def _step(group: RankGroup, params: list[ShardedParam], options: Options, memory: Memory, failures: dict[str, int]) -> None:
    params = sorted(params, key=lambda param: param.sharding.row.key)
    for param in params:
        _allocate(group, param)
    errors: dict[str, Exception] = {}
    cut_along_basis = [param for param in params if param.sharding.basis_dim is not None]
    in_coordinates = [param for param in cut_along_basis if param.work.count > 0 and not needs_refresh(param)]
    refreshing = [param for param in cut_along_basis if param not in in_coordinates]
    gather_bases(group, refreshing)
    for batch in batches(in_coordinates, options.batch_bytes * group.size):
        update_in_coordinates(group, batch, options, memory)
    sending = [param for param in params if not param.sharding.is_local and param not in in_coordinates]
    buckets = list(make_buckets(sending, options, group))
    if buckets:
        send_gradients(group, buckets[0])
    local = [local_work(param, param.part) for param in params if param.sharding.is_local and param.part is not None]
    engine.compute(local, options, memory, errors)
    engine.write_back(local)
    for number, bucket in enumerate(buckets):
        if number + 1 < len(buckets):
            send_gradients(group, buckets[number + 1])
        here = receive_gradients(group, bucket)
        # Stacks keep their storage between steps, so a basis that is whole in this step only must not become part of a stack.
        unstacked = bucket.params[0].sharding.basis_dim is not None
        engine.compute(here, replace(options, stacking="never") if unstacked else options, memory, errors)
        engine.write_back(here)
        send_updates(group, bucket, errors)
        if number:
            receive_updates(group, buckets[number - 1], options, errors)
    if buckets:
        receive_updates(group, buckets[-1], options, errors)
    scatter_bases(group, refreshing)
    works = [param.work for param in params]
    engine.close(works, memory)
    engine.report(works, errors, failures)


def _allocate(group: RankGroup, param: ShardedParam) -> None:
    """Allocate the state of this rank's part. Slots that other ranks keep become empty tensors of the same names."""
    state, sharding, device = param.work.state, param.sharding, param.weight.device
    if state:
        return
    if param.part is not None:
        allocate(param.part.row, param.weight, state)
    else:
        for key, (_, dtype) in sharding.row.state.items():
            counter = key in COUNTERS
            state[key] = torch.zeros(() if counter else (0,), dtype=dtype, device="cpu" if counter else device)
    if sharding.basis_dim is not None:
        rows = sharding.state_box(BASIS, group.rank)
        state[BASIS] = torch.zeros((0,) if rows is None else rows.shape, dtype=sharding.row.compute_dtype, device=device)
    box = sharding.state_box("compensation", group.rank) if sharding.row.compensated else None
    if box is not None:
        state["compensation"] = torch.zeros(box.shape, dtype=sharding.row.entry.dtype, device=device)
