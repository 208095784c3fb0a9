"""Sharded parameters: their layout, one parameter in one step, the update of this rank's shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..engine import strategies
from ..engine.rounding import rounding_draw
from ..engine.weights import Rates, update_weight
from ..engine.work import Options, Work
from ..plan import Row
from . import exchange
from .boxes import Box, full_box
from .exchange import MeshGroups, RankGroup
from .parts import Part, sent_weight_dtype
from .placement import Layout, Message, MessageKind, Sharding


@dataclass(eq=False)
class ShardedParam:
    """One sharded parameter in one step."""

    group: RankGroup
    sharding: Sharding
    part: Part | None  # None if this rank computes no part of it
    tensor: Tensor  # the parameter itself
    work: Work  # the work of `part`
    weight: Tensor  # this rank's shard
    grad: Tensor | None  # this rank's shard of the gradient
    kept_state: dict[str, Any] = field(default_factory=dict)  # the state with this rank's rows, while `work.state` has the whole basis

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.sharding.row.entry.name

    @property
    def needs_status(self) -> bool:
        """True if an owner must report the outcome to all ranks, because a decomposition may fail."""
        return any(frame.opens or strategies.decomposes(frame) for _, frame in self.sharding.row.splits)

    @property
    def filled_grad(self) -> Tensor:
        """This rank's shard of the gradient, after `step.agree_on_gradients` has filled a missing one with zeros."""
        assert self.grad is not None
        return self.grad

    @property
    def box(self) -> Box:
        """The box of this rank's shard."""
        return self.sharding.boxes[self.group.rank]

    def sent_weight(self, box: Box) -> Tensor:
        """A piece of this rank's shard as owners need it: with Kahan's compensation, if rules in `apply` see it."""
        here, dtype = box.slices_in(self.box), sent_weight_dtype(self.sharding.row)
        weight = self.weight[here]
        if dtype in (None, weight.dtype):
            return weight
        lost: Tensor = self.work.state["compensation"]
        return weight.to(dtype) + lost[here].to(dtype)


def sharded_param(group: RankGroup, sharding: Sharding, tensor: Tensor, work: Work, maximize: bool) -> ShardedParam:
    """A parameter for one step. `work` describes the whole parameter; the work of the result describes this rank's part."""
    part = sharding.part_of(group.rank)
    weight, grad = exchange.local_tensor(tensor.detach()), exchange.local_grad(tensor, sharding.row.entry.name)
    if grad is not None and maximize:
        grad = -grad
    own = replace(work, row=sharding.row if part is None else part.row, param=weight, grad=weight if grad is None else grad)
    return ShardedParam(group, sharding, part, tensor, own, weight, grad)


# ------------------------------------------------------------------------------------------------------------------- layout


def find_shardings(
    params: Sequence[Tensor], rows: Sequence[Row], sizes: Sequence[int], process_group: Any, mesh_groups: MeshGroups
) -> dict[int, tuple[RankGroup, Sharding]]:
    """The group and sharding of every parameter that several ranks hold, by `id` of the parameter.

    Args:
        sizes: The number of parameters in each parameter group. Groups are laid out one after the other, so that a group that is added
            later does not change the owners of the earlier ones.
        process_group: The ranks that hold ordinary parameters whole; None if every process is on its own.
        mesh_groups: Keeps one process group for each mesh; pass the same object at every call.
    """
    replicated = None if process_group is None else exchange.replicated_group(process_group)
    layouts: dict[RankGroup, Layout] = {}
    out: dict[int, tuple[RankGroup, Sharding]] = {}
    start = 0
    for size in sizes:
        by_group: dict[RankGroup, list[tuple[Tensor, Row]]] = {}
        for p, row in zip(params[start : start + size], rows[start : start + size], strict=True):
            group = mesh_groups.group_of(p) if exchange.is_dtensor(p) else replicated
            if group is not None:
                by_group.setdefault(group, []).append((p, row))
        for group, pairs in by_group.items():
            layout = layouts.setdefault(group, Layout(group.size, group.replicated))
            names = [row.entry.name for _, row in pairs]
            cuts = [exchange.mesh_cuts(p, name) if exchange.is_dtensor(p) else () for (p, _), name in zip(pairs, names, strict=True)]
            boxes = [exchange.checked_boxes(p, cut, group, name) for (p, _), cut, name in zip(pairs, cuts, names, strict=True)]
            for (p, _), sharding in zip(pairs, layout.add([row for _, row in pairs], boxes, cuts), strict=True):
                out[id(p)] = (group, sharding)
        start += size
    return out


# ------------------------------------------------------------------------------------------------------------------- a step


def rank_messages(group: RankGroup, params: Sequence[ShardedParam], kind: MessageKind) -> tuple[list[Message], bool]:
    """The messages of this rank, with `tensor_index` the position in `params`, and whether any rank sends one to another rank."""
    found = [param.sharding.messages(kind, group.rank) for param in params]
    messages = [message._replace(tensor_index=i) for i, (own, _) in enumerate(found) for message in own]
    return messages, any(has_traffic for _, has_traffic in found)


def local_work(param: ShardedParam, part: Part) -> Work:
    """The work of this rank's part, on its own piece of the shard."""
    here = part.box.slices_in(param.box)
    param.work.param, param.work.grad, param.work.holders = param.weight[here], param.filled_grad[here], part.owners
    return param.work


def update_shard(param: ShardedParam, box: Box, weight: Tensor, update: Tensor, options: Options) -> None:
    """Decay and update a piece of this rank's shard in place.

    Args:
        box: The piece, as a box of the parameter.
        weight: The entries of the piece.
        update: The update of the piece, of the same shape.
    """
    row, here = param.sharding.row, box.slices_in(param.box)
    low = weight.dtype != update.dtype
    compensation = param.work.state["compensation"][here] if row.compensated else None
    noise = _rounding_noise(row, box, param.work.count, options, update) if low and options.rounding == "stochastic" else None
    rates = Rates.of(row.splits[0][1].pipeline, param.work.lr, param.work.weight_decay)
    update_weight(weight, update, rates, rounding=options.rounding, compensation=compensation, noise=noise)


def _rounding_noise(row: Row, box: Box, count: int, options: Options, like: Tensor) -> Tensor:
    """The uniform draws of stochastic rounding for a box: those that one process would draw for these entries."""
    whole = torch.empty(row.entry.shape, dtype=like.dtype, device=like.device)
    blocks = row.view.cut(row.view.whole(whole))
    for block, matrices in zip(row.view.blocks, blocks, strict=True):
        for i, one in enumerate(matrices):
            one.copy_(rounding_draw(row.key, block, i, count, options.seed, like))
    if blocks and blocks[0].untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        whole = row.view.restore(blocks, whole.shape)
    return whole[box.slices_in(full_box(whole.shape))]
