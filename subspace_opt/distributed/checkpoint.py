"""State of sharded parameters in checkpoints: it leaves as DTensors and comes back from tensors with any placements.

    export_state    this rank's parts -> DTensors
    import_state    a checkpoint's tensors -> this rank's parts

Owners keep whole matrices and checkpoints have even shards, so slots move between ranks. The slots of one dtype move together, with one
all-to-all for each bucket. A bucket is bounded, so an optimizer of any size needs little memory besides its state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..engine import lowbit
from ..plan import COUNTERS
from . import exchange
from .boxes import Box, full_box
from .exchange import RankGroup, Redistribution, SavedLayout, redistribute
from .placement import Sharding

BUCKET_BYTES = 64 * 2**20  # what a rank sends and receives with one exchange; a larger slot has an exchange of its own

Shardings = Mapping[int, tuple[RankGroup, Sharding]]  # by `id` of the parameter


@dataclass(frozen=True)
class _Move:
    """A slot to redistribute from the boxes `held` to the boxes `target`."""

    group: RankGroup
    param: Tensor
    key: str
    held: tuple[Box | None, ...]
    target: tuple[Box | None, ...]
    value: Tensor  # this rank's data: numbers of `dtype`, or their codes
    dtype: torch.dtype

    def nbytes(self, rank: int) -> int:
        """Bytes of the boxes of a rank; 0 if the rank already has its target."""
        held, target = self.held[rank], self.target[rank]
        return 0 if held == target else self.dtype.itemsize * sum(box.numel for box in (held, target) if box is not None)


def export_state(shardings: Shardings, state: Mapping[Any, dict[str, Any]]) -> defaultdict[Any, dict[str, Any]]:
    """The optimizer's state, with that of sharded parameters as DTensors on the parameters' meshes. A collective.

    A slot of the parameter's shape gets the parameter's placements. Any other slot is cut along its longest side.
    """
    out: defaultdict[Any, dict[str, Any]] = defaultdict(dict, state)
    shared = {param: shardings[id(param)] for param, own in state.items() if own and id(param) in shardings}
    layouts: dict[tuple[Tensor, str], SavedLayout] = {}
    moves: list[_Move] = []
    for param, (group, sharding) in shared.items():
        mesh = exchange.checkpoint_mesh(group, param)
        out[param] = {key: state[param][key] for key in sharding.row.state}
        for key, (shape, dtype) in sharding.row.state.items():
            if key in COUNTERS:
                continue
            layout = layouts[param, key] = exchange.saved_layout(mesh, param, sharding.boxes, shape)
            held = tuple(sharding.state_box(key, rank) for rank in range(group.size))
            if all(box == t or (box is None and not t.numel) for box, t in zip(held, layout.boxes, strict=True)):
                # Codes are saved as numbers, because their blocks differ with the number of ranks.
                out[param][key] = lowbit.whole(out[param][key]).to(dtype).reshape(layout.boxes[group.rank].shape)
            else:
                moves.append(_Move(group, param, key, held, layout.boxes, out[param][key], dtype))
    for move, local in _moved(moves):
        out[move.param][move.key] = local
    for (param, key), layout in layouts.items():
        out[param][key] = layout.dtensor(out[param][key], shared[param][1].row.state[key][0])
    _agree_on_refreshes(shared, out)
    return out


def _agree_on_refreshes(shared: Mapping[Tensor, tuple[RankGroup, Sharding]], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Replace the counters of refreshes by the largest of all ranks: only the owner counts. A collective."""
    counters: dict[RankGroup, list[Tensor]] = {}
    for param, (group, _) in shared.items():
        if "refreshed" in state[param]:
            counters.setdefault(group, []).append(param)
    for group, params in counters.items():
        own = torch.stack([state[param]["refreshed"] for param in params]).to(params[0].device)
        for param, largest in zip(params, group.max(own).to("cpu").unbind(), strict=True):
            state[param]["refreshed"] = largest.clone()


def import_state(shardings: Shardings, state: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """This rank's parts of the saved state of sharded parameters. A saved tensor is whole, or a DTensor with any placements.

    A collective if there are DTensors.

    Raises:
        ShardingError: A tensor holds the shard of another rank; before any rank sends anything.
    """
    shared = {param: shardings[id(param)] for param in state if id(param) in shardings}
    slots = [(param, key) for param in shared for key in state[param] if key not in COUNTERS]
    for param, key in slots:
        exchange.check_saved(state[param][key], shared[param][1].row.entry.name, key)
    out: dict[Tensor, dict[str, Any]] = {param: dict(state[param]) for param in shared}
    moves: list[_Move] = []
    for param, key in slots:
        group, sharding = shared[param]
        held = tuple(sharding.state_box(key, rank) for rank in range(group.size))
        value, saved = exchange.saved_shard(group, lowbit.whole(state[param][key].detach()), sharding.row.entry.name)
        if saved is not None:
            moves.append(_Move(group, param, key, saved, held, value, value.dtype))
            continue
        own = held[group.rank]
        taken = value.new_zeros(0) if own is None else value[own.slices_in(full_box(value.shape))]
        out[param][key] = _stored(group, sharding, key, taken.to(param.device, copy=True))
    for move, taken in _moved(moves):
        out[move.param][move.key] = _stored(*shared[move.param], move.key, taken)
    return out


def _stored(group: RankGroup, sharding: Sharding, key: str, taken: Tensor) -> Tensor:
    """This rank's part of a slot in the shape and the codes in which the engine keeps it."""
    own, part = sharding.state_box(key, group.rank), sharding.part_of(group.rank)
    if own is None:
        return taken.reshape(0)
    if part is None:
        return taken.reshape(own.shape)
    shape = part.row.state[key][0] if key in part.row.state else own.shape
    codes = part.row.codes.get(key)
    taken = taken.reshape(shape if prod(shape) == own.numel else own.shape)
    return taken if codes is None else lowbit.coded(taken, codes)


# -------------------------------------------------------------------------------------------------------------------- buckets


def _moved(moves: Iterable[_Move]) -> Iterator[tuple[_Move, Tensor]]:
    """Redistribute slots, and yield each with this rank's target box. A collective: all ranks pass the same slots in the same order."""
    for bucket in _buckets(moves):
        first = bucket[0]
        pieces = [Redistribution(move.held, move.target, lowbit.whole(move.value).to(move.dtype)) for move in bucket]
        yield from zip(bucket, redistribute(first.group, pieces, first.dtype, first.param.device), strict=True)


def _buckets(moves: Iterable[_Move]) -> Iterator[list[_Move]]:
    """Slots of one group of ranks, dtype and device, so many that no rank sends and receives more than `BUCKET_BYTES`."""
    alike: dict[tuple[RankGroup, torch.dtype, torch.device], list[_Move]] = {}
    for move in moves:
        alike.setdefault((move.group, move.dtype, move.param.device), []).append(move)
    for (group, _, _), some in alike.items():
        bucket: list[_Move] = []
        loads = [0] * group.size
        for move in some:
            added = [move.nbytes(rank) for rank in range(group.size)]
            if bucket and max(map(int.__add__, loads, added)) > BUCKET_BYTES:
                yield bucket
                bucket, loads = [], [0] * group.size
            bucket.append(move)
            loads = list(map(int.__add__, loads, added))
        if bucket:
            yield bucket
