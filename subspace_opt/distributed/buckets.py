"""Buckets: parameters whose gradients go to owners with one all-to-all and whose updates come back with another.

make_buckets         parameters -> buckets
send_gradients       starts the exchange of gradients
receive_gradients    waits for it; returns the work of this rank, with whole matrices
send_updates         starts the exchange of updates, reduces the status of the matrices
receive_updates      waits for it; updates this rank's shards
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.work import Options, Work
from .boxes import Box
from .exchange import Exchange, RankGroup
from .parts import Part, sent_weight_dtype
from .placement import Message
from .shards import ShardedParam, local_work, rank_messages, update_shard

# Bits of the status that an owner reports for each matrix: its decomposition failed; it has no update; its first update does not count.
FAILED, SILENT, HELD = 1, 2, 4


@dataclass
class Bucket:
    """Parameters whose gradients are sent with one exchange, and the exchanges under way for them."""

    params: list[ShardedParam]
    gradients: Exchange | None = None
    weights: Exchange | None = None
    updates: Exchange | None = None
    status: Tensor | None = None
    outboxes: dict[int, Tensor] = field(default_factory=dict)  # updates of this rank's parts, by position in `params`

    @property
    def updates_in_place(self) -> bool:
        """As `Sharding.updates_in_place`, which is the same for all parameters of a bucket."""
        return self.params[0].sharding.updates_in_place


def make_buckets(params: list[ShardedParam], options: Options, group: RankGroup) -> Iterator[Bucket]:
    """Buckets of parameters with the same dtypes and messages, parameters of one shape next to each other.

    A bucket is full when the whole matrices on one rank take about `batch_bytes`.
    """
    kinds: dict[Any, list[ShardedParam]] = defaultdict(list)
    for param in params:
        row, sharding = param.sharding.row, param.sharding
        exchange = (sharding.updates_in_place, sent_weight_dtype(row), sharding.basis_dim is None, param.weight.dtype, row.compute_dtype)
        kinds[exchange, row.entry.shape, row.pipeline].append(param)
    waiting: dict[Any, list[ShardedParam]] = {}
    held: dict[Any, int] = {}
    limit = options.batch_bytes * group.size
    for (exchange, _, _), alike in kinds.items():
        for param in alike:
            size = param.sharding.row.entry.numel * param.sharding.row.compute_dtype.itemsize
            if held.get(exchange, 0) + size > limit and waiting.get(exchange):
                yield Bucket(waiting.pop(exchange))
                held[exchange] = 0
            waiting.setdefault(exchange, []).append(param)
            held[exchange] = held.get(exchange, 0) + size
    for rest in waiting.values():
        yield Bucket(rest)


def send_gradients(group: RankGroup, bucket: Bucket) -> None:
    """Start to send gradients to owners, and weights if a selector or a rule reads them."""
    own, has_traffic = rank_messages(group, bucket.params, "gradient")
    first = bucket.params[0]

    def gradient(message: Message) -> Tensor:
        param = bucket.params[message.tensor_index]
        return param.filled_grad[message.box.slices_in(param.box)].to(first.weight.dtype)

    def weight(message: Message) -> Tensor:
        return bucket.params[message.tensor_index].sent_weight(message.box)

    bucket.gradients = Exchange(group, own, has_traffic, gradient, first.weight.dtype, first.weight.device)
    if (dtype := sent_weight_dtype(first.sharding.row)) is not None:
        bucket.weights = Exchange(group, own, has_traffic, weight, dtype, first.weight.device)


def receive_gradients(group: RankGroup, bucket: Bucket) -> list[Work]:
    """The work of this rank in a bucket: its parts, with whole matrices of gradients."""
    own = [(i, param, param.part) for i, param in enumerate(bucket.params) if param.part is not None]
    if bucket.updates_in_place:
        return [local_work(param, part) for _, param, part in own]
    for i, param, part in own:
        param.work.grad = torch.empty(part.box.shape, dtype=param.weight.dtype, device=param.weight.device)
        bucket.outboxes[i] = torch.zeros(part.box.shape, dtype=param.sharding.row.compute_dtype, device=param.weight.device)
        param.work.outbox = bucket.outboxes[i]
        dtype = sent_weight_dtype(param.sharding.row)
        param.work.param = bucket.outboxes[i] if dtype is None else torch.empty_like(param.work.grad, dtype=dtype)
    for exchange, name in ((bucket.gradients, "grad"), (bucket.weights, "param")):
        if exchange is not None:
            for message, tensor in exchange.wait():
                param = bucket.params[message.tensor_index]
                assert param.part is not None
                getattr(param.work, name)[message.box.slices_in(param.part.box)] = tensor
    bucket.gradients = bucket.weights = None
    return [param.work for _, param, _ in own]


def send_updates(group: RankGroup, bucket: Bucket, errors: dict[str, Exception]) -> None:
    """Start to send updates, or new weights, and reduce the status of the matrices over the ranks."""
    own, has_traffic = rank_messages(group, bucket.params, "update")
    first = bucket.params[0]

    def update(message: Message) -> Tensor:
        param = bucket.params[message.tensor_index]
        assert param.part is not None
        if bucket.updates_in_place:
            return param.weight[message.box.slices_in(param.box)]
        return bucket.outboxes[message.tensor_index][message.box.slices_in(param.part.box)]

    dtype = first.weight.dtype if bucket.updates_in_place else first.sharding.row.compute_dtype
    bucket.updates = Exchange(group, own, has_traffic, update, dtype, first.weight.device)
    for param in bucket.params:
        param.work.outbox = None
    if any(param.needs_status for param in bucket.params):
        codes = [code for param in bucket.params for part in param.sharding.parts for code in _status_codes(param, part, group, errors)]
        bucket.status = group.max(torch.tensor(codes, dtype=torch.int32, device=first.weight.device))


def _status_codes(param: ShardedParam, part: Part, group: RankGroup, errors: dict[str, Exception]) -> list[int]:
    """The status of each matrix of a part if this rank owns it; zeros otherwise."""
    if group.rank not in part.owners:
        return [0] * len(part.matrix_boxes)
    work = param.work
    code = FAILED * (param.name in errors) + HELD * work.held
    return [code + SILENT * (i in work.silent) for i in range(len(part.matrix_boxes))]


def receive_updates(group: RankGroup, bucket: Bucket, options: Options, errors: dict[str, Exception]) -> None:
    """Update this rank's shards with the updates of a bucket, or copy the new weights into them."""
    moving = _read_status(group, bucket, errors)
    assert bucket.updates is not None
    arrived = list(bucket.updates.wait())
    to_replicas, has_traffic = rank_messages(group, bucket.params, "replica")
    if has_traffic:
        here = {(message.tensor_index, message.box): tensor for message, tensor in arrived}
        first = bucket.params[0]

        def update(message: Message) -> Tensor:
            return here[message.tensor_index, message.box]

        arrived += Exchange(group, to_replicas, has_traffic, update, first.sharding.row.compute_dtype, first.weight.device).wait()
    for message, tensor in arrived:
        param = bucket.params[message.tensor_index]
        if bucket.updates_in_place:
            param.weight[message.box.slices_in(param.box)] = tensor
            continue
        part = next(part for part in param.sharding.parts if part.box.contains(message.box))
        matrices = moving[message.tensor_index, part.box]
        all_move = len(matrices) == len(part.matrix_boxes)
        for box in [message.box] if all_move else [both for matrix in matrices if (both := message.box.intersection(matrix))]:
            update_shard(param, box, param.weight[box.slices_in(param.box)], tensor[box.slices_in(message.box)], options)
    bucket.updates = None
    bucket.outboxes.clear()


def _read_status(group: RankGroup, bucket: Bucket, errors: dict[str, Exception]) -> dict[tuple[int, Box], list[Box]]:
    """Record the failures of owners on this rank.

    Returns the matrices that have an update, by position of the parameter and box of the part.
    """
    status = iter(() if bucket.status is None else bucket.status.tolist())
    moving: dict[tuple[int, Box], list[Box]] = {}
    for i, param in enumerate(bucket.params):
        for part in param.sharding.parts:
            codes = [next(status, 0) for _ in part.matrix_boxes]
            moving[i, part.box] = [box for box, code in zip(part.matrix_boxes, codes, strict=True) if not code & SILENT]
            if any(code & FAILED for code in codes):
                errors.setdefault(param.name, RuntimeError(f"on rank {group.members[part.owners[0]]}"))
            param.work.held |= any(code & HELD for code in codes)
    return moving
