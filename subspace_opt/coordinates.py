"""Low-rank updates whose basis is cut as the weight is: between refreshes coordinates alone travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from . import engine, sharding
from .boxes import Box
from .boxes import whole as all_of
from .layout import BASIS, Message
from .sharding import Exchange, Team
from .shared import Item, apply, given, messages
from .stacks import Memory, due
from .work import Options, Phase


def refreshes(item: Item) -> bool:
    """Whether a basis that is cut as the weight is will be taken anew: the whole gradient travels then. Known to all ranks."""
    split = item.share.row.splits[0][1]
    return due(item.work, split, Phase.BEGUN)


def runs(items: Sequence[Item], limit: int) -> Iterator[list[Item]]:
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


def gather_basis(team: Team, item: Item) -> None:
    """Have the whole basis on the owner for this step."""
    state = item.work.state
    held = [item.share.state_box(BASIS, rank) for rank in range(team.size)]
    basis = sharding.moved(team, held, state[BASIS], _on_owner(team, item), state[BASIS].dtype, item.weight.device)
    item.kept, item.work.state = state, {**state, BASIS: basis}


def scatter_basis(team: Team, item: Item) -> None:
    """Give every rank its rows of the basis again."""
    state = item.kept
    held = [item.share.state_box(BASIS, rank) for rank in range(team.size)]
    rows = sharding.moved(team, _on_owner(team, item), item.work.state[BASIS], held, state[BASIS].dtype, item.weight.device)
    state[BASIS].copy_(rows.reshape(state[BASIS].shape))
    item.work.state = state


def _on_owner(team: Team, item: Item) -> list[Box | None]:
    shape = item.share.row.state[BASIS][0]
    return [all_of(shape) if rank in item.share.parts[0].owners else None for rank in range(team.size)]
