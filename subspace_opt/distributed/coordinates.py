"""Low-rank updates whose basis is cut as the weight is: between refreshes coordinates alone travel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ..engine import step as engine
from ..engine.homes import Memory
from ..engine.stacking import due
from ..engine.work import Options, Phase
from . import exchange as sharding
from .boxes import Box
from .boxes import full_box as all_of
from .exchange import Exchange, Move, Team
from .placement import BASIS, Message
from .shards import Item, apply, given, messages


def refreshes(item: Item) -> bool:
    """Whether a basis that is cut as the weight is will be taken anew: the whole gradient travels then. Known to all ranks."""
    split = item.share.row.splits[0][1]
    return due(item.work, split, Phase.BEGUN)


def runs(items: Sequence[Item], limit: float = math.inf) -> Iterator[list[Item]]:
    """Items of one precision whose coordinates together stay within a number of bytes."""
    run: list[Item] = []
    size = 0
    for item in sorted(items, key=lambda item: str(item.share.row.compute_dtype)):
        dtype = item.share.row.compute_dtype
        own = item.share.coordinates.numel * dtype.itemsize
        if run and (size + own > limit or dtype != run[0].share.row.compute_dtype):
            yield run
            run, size = [], 0
        run.append(item)
        size += own
    if run:
        yield run


def update_in_coordinates(team: Team, items: list[Item], options: Options, memory: Memory) -> None:
    """`C = sum_i G_i U_i` on the owner, its update there, and `W_i <- W_i - lr C' U_i'` on the shards."""
    dtype, device = items[0].share.row.compute_dtype, items[0].weight.device

    def project(message: Message) -> Tensor:
        item = items[message.item]
        g = given(item).to(dtype)
        basis: Tensor = item.work.state[BASIS]
        return _turned(item, g if item.work.scale == 1.0 else g * item.work.scale) @ basis

    sums: dict[int, Tensor] = {}
    arrived = Exchange(team, *messages(team, items, "projected"), project, dtype, device)
    for message, c in sorted(arrived.wait(), key=lambda pair: pair[0].source):  # in one order, whoever is the owner
        sums[message.item] = sums[message.item] + c if message.item in sums else c
    updates = {i: engine.update_coordinates(items[i].work, c.unsqueeze(0), options, memory)[0] for i, c in sums.items()}
    leaving = messages(team, items, "lifted")
    for message, c in Exchange(team, *leaving, lambda message: updates[message.item], dtype, device).wait():
        item = items[message.item]
        apply(team, item, item.share.boxes[team.rank], item.weight, _turned(item, c @ item.work.state[BASIS].mT), options)


def _turned(item: Item, x: Tensor) -> Tensor:
    """A shard as stored, in the working orientation, or back."""
    return x.mT if item.share.along == 0 else x


def gather_bases(team: Team, items: Sequence[Item]) -> None:
    """Have whole bases on the owners for this step."""
    for run in runs(items):
        states = [item.work.state for item in run]
        bases = _moved(team, run, [Move(_rows(item), _on_owner(item), state[BASIS]) for item, state in zip(run, states, strict=True)])
        for item, state, basis in zip(run, states, bases, strict=True):
            item.kept, item.work.state = state, {**state, BASIS: basis}


def scatter_bases(team: Team, items: Sequence[Item]) -> None:
    """Give every rank its rows of the bases again."""
    for run in runs(items):
        rows = _moved(team, run, [Move(_on_owner(item), _rows(item), item.work.state[BASIS]) for item in run])
        for item, own in zip(run, rows, strict=True):
            item.work.state = item.kept
            item.work.state[BASIS].copy_(own.reshape(item.work.state[BASIS].shape))


def _moved(team: Team, run: Sequence[Item], moves: Sequence[Move]) -> list[Tensor]:
    return sharding.moved(team, moves, run[0].share.row.compute_dtype, run[0].weight.device)


def _rows(item: Item) -> list[Box | None]:
    return [item.share.state_box(BASIS, rank) for rank in range(item.team.size)]


def _on_owner(item: Item) -> list[Box | None]:
    basis = all_of(item.share.row.state[BASIS][0])
    return [basis if rank in item.share.parts[0].owners else None for rank in range(item.team.size)]
