"""Low-rank updates of parameters that are cut along their basis: between refreshes the ranks send only coordinates.

With the shard `G_i` of a gradient and the rows `U_i` of the basis that belong to it:

    1  every rank       C_i = G_i U_i                  sent to the owner, (m, r)
    2  the owner        C' = update(sum_i C_i)         sent to every rank, (m, r)
    3  every rank       W_i <- W_i - lr C' U_i^T
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ..engine import step as engine
from ..engine.homes import Memory
from ..engine.stacking import due
from ..engine.work import Options, Phase
from .boxes import Box, full_box
from .exchange import Exchange, RankGroup, Redistribution, redistribute
from .placement import BASIS, Message
from .shards import ShardedParam, rank_messages, update_shard


def needs_refresh(param: ShardedParam) -> bool:
    """True if this step refreshes the basis, so that the whole gradient must be sent. Every rank computes the same answer."""
    return due(param.work, param.work.splits[0][1], Phase.BEGUN)


def batches(params: Sequence[ShardedParam], limit: float = math.inf) -> Iterator[list[ShardedParam]]:
    """Batches of parameters of one compute dtype whose coordinates together take at most `limit` bytes."""
    batch: list[ShardedParam] = []
    size = 0
    for param in sorted(params, key=lambda param: str(param.sharding.row.compute_dtype)):
        dtype = param.sharding.row.compute_dtype
        own = param.sharding.coordinates.numel * dtype.itemsize
        if batch and (size + own > limit or dtype != batch[0].sharding.row.compute_dtype):
            yield batch
            batch, size = [], 0
        batch.append(param)
        size += own
    if batch:
        yield batch


def update_in_coordinates(group: RankGroup, params: list[ShardedParam], options: Options, memory: Memory) -> None:
    """Update a batch of parameters with two exchanges of coordinates (see the top of the file)."""
    dtype, device = params[0].sharding.row.compute_dtype, params[0].weight.device

    def project(message: Message) -> Tensor:
        param = params[message.tensor_index]
        g = param.filled_grad.to(dtype)
        basis: Tensor = param.work.state[BASIS]
        return _oriented(param, g if param.work.scale == 1.0 else g * param.work.scale) @ basis

    sums: dict[int, Tensor] = {}
    arrived = Exchange(group, *rank_messages(group, params, "projection"), project, dtype, device)
    for message, c in sorted(arrived.wait(), key=lambda pair: pair[0].source):  # the sum must not depend on the owner
        i = message.tensor_index
        sums[i] = sums[i] + c if i in sums else c
    updates = {i: engine.update_coordinates(params[i].work, c.unsqueeze(0), options, memory)[0] for i, c in sums.items()}
    leaving = rank_messages(group, params, "lift")
    for message, c in Exchange(group, *leaving, lambda message: updates[message.tensor_index], dtype, device).wait():
        param = params[message.tensor_index]
        update_shard(param, param.box, param.weight, _oriented(param, c @ param.work.state[BASIS].mT), options)


def _oriented(param: ShardedParam, x: Tensor) -> Tensor:
    """A shard turned from the stored to the working orientation, or back."""
    return x.mT if param.sharding.basis_dim == 0 else x


def gather_bases(group: RankGroup, params: Sequence[ShardedParam]) -> None:
    """Give every owner the whole basis of its parameters for this step. A collective.

    The state with this rank's rows is kept in `kept_state` until `scatter_bases`.
    """
    for batch in batches(params):
        states = [param.work.state for param in batch]
        moves = [Redistribution(_row_boxes(param), _owner_boxes(param), state[BASIS]) for param, state in zip(batch, states, strict=True)]
        for param, state, basis in zip(batch, states, _redistribute(group, batch, moves), strict=True):
            param.kept_state, param.work.state = state, {**state, BASIS: basis}


def scatter_bases(group: RankGroup, params: Sequence[ShardedParam]) -> None:
    """Give every rank its rows of the refreshed bases, and put the state back that `gather_bases` has replaced. A collective."""
    for batch in batches(params):
        moves = [Redistribution(_owner_boxes(param), _row_boxes(param), param.work.state[BASIS]) for param in batch]
        for param, own in zip(batch, _redistribute(group, batch, moves), strict=True):
            param.work.state = param.kept_state
            param.work.state[BASIS].copy_(own.reshape(param.work.state[BASIS].shape))


def _redistribute(group: RankGroup, batch: Sequence[ShardedParam], moves: Sequence[Redistribution]) -> list[Tensor]:
    return redistribute(group, moves, batch[0].sharding.row.compute_dtype, batch[0].weight.device)


def _row_boxes(param: ShardedParam) -> list[Box | None]:
    return [param.sharding.state_box(BASIS, rank) for rank in range(param.group.size)]


def _owner_boxes(param: ShardedParam) -> list[Box | None]:
    basis = full_box(param.sharding.row.state[BASIS][0])
    return [basis if rank in param.sharding.parts[0].owners else None for rank in range(param.group.size)]
