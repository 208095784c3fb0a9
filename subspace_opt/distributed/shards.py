"""Parameters that several ranks share: who computes what, what this rank holds, how its state stands in a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..engine import strategies
from ..engine.rounding import rounding_draw
from ..engine.weights import Rates, update_weight
from ..engine.work import Options, Work
from ..plan import Row
from . import exchange as sharding
from .boxes import Box
from .exchange import Team, Teams
from .parts import Part
from .placement import Layout, Message, Share, Way


@dataclass(eq=False)
class Item:
    """A parameter of a team in one step."""

    team: Team
    share: Share
    part: Part | None  # what this rank computes of it
    param: Tensor
    work: Work  # of that part; of no matrix, where there is none
    weight: Tensor  # this rank's shard
    grad: Tensor | None  # the same of the gradient
    kept: dict[str, Any] = field(default_factory=dict)  # the state itself, while the work has a whole basis for one step

    @property
    def name(self) -> str:
        return self.share.row.entry.name

    @property
    def decay(self) -> float:
        coupled = self.share.row.splits[0][1].pipeline.decay == "coupled"
        return 0.0 if coupled else self.work.weight_decay

    @property
    def fallible(self) -> bool:
        """Whether a decomposition may fail, of which all ranks must be told."""
        return any(split.opens or strategies.decomposes(split) for _, split in self.share.row.splits)


def item(team: Team, share: Share, param: Tensor, work: Work, maximize: bool) -> Item:
    """A parameter of this step. `work`: as if it were whole."""
    part = share.part_of(team.rank)
    weight, grad = sharding.local(param.detach()), sharding.local_grad(param, share.row.entry.name)
    if grad is not None and maximize:
        grad = -grad
    own = replace(work, row=share.row if part is None else part.row, param=weight, grad=weight if grad is None else grad)
    return Item(team, share, part, param, own, weight, grad)


def given(item: Item) -> Tensor:
    """This rank's shard of the gradient, once all ranks have looked."""
    assert item.grad is not None  # `look` put zeros where there was none
    return item.grad


# ------------------------------------------------------------------------------------------------------------------- shares


def shares(params: Sequence[Tensor], rows: Sequence[Row], sizes: Sequence[int], group: Any, teams: Teams) -> dict[int, tuple[Team, Share]]:
    """Team and share of every parameter that several ranks hold, by `id`.

    Args:
        sizes: Of the parameter groups: a group that is added later leaves the owners of the others as they are.
        group: Of ranks that hold ordinary parameters whole, None if there is none.
        teams: Those that are known, which makes no second process group for one mesh.
    """
    whole = None if group is None else sharding.team_of_group(group)
    layouts: dict[Team, Layout] = {}
    out: dict[int, tuple[Team, Share]] = {}
    start = 0
    for size in sizes:
        members: dict[Team, list[tuple[Tensor, Row]]] = {}
        for p, row in zip(params[start : start + size], rows[start : start + size], strict=True):
            team = teams.of(p) if sharding.is_sharded(p) else whole
            if team is not None:
                members.setdefault(team, []).append((p, row))
        for team, pairs in members.items():
            layout = layouts.setdefault(team, Layout(team.size, team.divided))
            names = [row.entry.name for _, row in pairs]
            cut = [sharding.cuts(p, name) if sharding.is_sharded(p) else () for (p, _), name in zip(pairs, names, strict=True)]
            boxes = [sharding.boxes(p, c, team, name) for (p, _), c, name in zip(pairs, cut, names, strict=True)]
            for (p, _), share in zip(pairs, layout.add([row for _, row in pairs], boxes, cut), strict=True):
                out[id(p)] = (team, share)
        start += size
    return out


def exported(known: dict[int, tuple[Team, Share]], state: dict[Any, dict[str, Any]]) -> defaultdict[Any, dict[str, Any]]:
    """The optimizer's state with that of shared parameters as DTensors. A collective."""
    out: defaultdict[Any, dict[str, Any]] = defaultdict(dict, state)
    for param, own in state.items():
        if own and id(param) in known:
            team, share = known[id(param)]
            out[param] = sharding.exported(team, share, param, own)
    return out


def reader(team: Team, share: Share) -> Callable[[Tensor, str, Tensor, tuple[int, ...]], Tensor]:
    """A function of (parameter, slot, a checkpoint's tensor, its shape) that returns this rank's part of the slot."""
    return lambda param, key, value, shape: sharding.imported(team, share, param, key, value, shape)


def apply(team: Team, item: Item, box: Box, weight: Tensor, update: Tensor, options: Options) -> None:
    """Decay and update a piece of this rank's shard."""
    row, here = item.share.row, box.slices_in(item.share.boxes[team.rank])
    low = weight.dtype != update.dtype
    compensation = item.work.state["compensation"][here] if row.compensated else None
    noise = _rounding_noise(row, box, item.work.count, options, update) if low and options.rounding == "stochastic" else None
    rates = Rates(item.work.lr, item.decay, decay_after=row.splits[0][1].pipeline.decay == "after")
    update_weight(weight, update, rates, rounding=options.rounding, compensation=compensation, noise=noise)


def messages(team: Team, items: Sequence[Item], way: Way) -> tuple[list[Message], bool]:
    """Those of this rank, numbered by item, and whether any rank has one for another."""
    told = [item.share.messages(way, team.rank) for item in items]
    return [m._replace(item=i) for i, (own, _) in enumerate(told) for m in own], any(travels for _, travels in told)


def _rounding_noise(row: Row, box: Box, count: int, options: Options, like: Tensor) -> Tensor:
    """The uniform draws of stochastic rounding for a box of a parameter, as they would be if it were whole."""
    whole = torch.empty(row.entry.shape, dtype=like.dtype, device=like.device)
    blocks = row.view.cut(row.view.whole(whole))
    for block, matrices in zip(row.view.blocks, blocks, strict=True):
        for i, one in enumerate(matrices):
            one.copy_(rounding_draw(row.entry.name, block, i, count, options.seed, like))
    if blocks and blocks[0].untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        whole = row.view.restore(blocks, whole.shape)
    return whole[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
