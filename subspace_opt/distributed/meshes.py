"""Meshes that need not exist: where the parameters of a plan would lie on so many ranks, what each would hold and send. Pure.

    fsdp      every parameter is cut along its first dimension, as FSDP2's fully_shard does
    hsdp      the same within groups of ranks; the groups are copies of each other
    ddp       every rank has every parameter, and work and state are divided all the same
    tp        layers of attention and feed-forward are cut as tensor parallelism cuts them (below); every rank has all the rest
    fsdp+tp   what tensor parallelism has cut, and all the rest, is cut by FSDP2 over the other dimension of the mesh

Ranks stand in row-major order of their coordinates; tensor parallelism has the last dimension, copies of HSDP the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from ..plan import COUNTERS, Entry, Plan
from .boxes import Box, Cut, box_holders, full_box, replica_index, shard_boxes
from .placement import Layout, Share, add_state

MeshKind = Literal["fsdp", "hsdp", "ddp", "tp", "fsdp+tp"]
MESH_KINDS: tuple[MeshKind, ...] = get_args(MeshKind)

# Megatron's way (arXiv:1909.08053): the first layer of a pair is cut by its outputs, the second by its inputs, so that nothing
# travels between the two. By the names that LLaMA and its relatives give to them.
BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")


class MeshError(ValueError):
    """Ranks that make no such mesh, or a model of which it has nothing to cut."""


@dataclass(frozen=True)
class Mesh:
    """Ranks on a grid."""

    kind: MeshKind
    shape: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return prod(self.shape)

    def position(self, rank: int, axes: Sequence[int]) -> int:
        """Where a rank stands among those that differ from it along `axes` alone, in row-major order."""
        at = []
        for size in reversed(self.shape):
            rank, index = divmod(rank, size)
            at.append(index)
        at.reverse()
        out = 0
        for axis in axes:
            out = out * self.shape[axis] + at[axis]
        return out

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))}"


def make_mesh(kind: str, ranks: int, shape: Sequence[int] | None = None) -> Mesh:
    """A mesh of so many ranks; one of two dimensions is 2 x half of them unless `shape` says otherwise, tensor parallelism having the 2.

    Raises:
        MeshError: an unknown kind, or a shape that does not fit kind and ranks.
    """
    known = next((one for one in MESH_KINDS if one == kind), None)
    if known is None:
        raise MeshError(f"mesh '{kind}' is unknown; take {', '.join(MESH_KINDS)}")
    dims = 2 if known in ("hsdp", "fsdp+tp") else 1
    if shape is None:
        if dims == 2 and (ranks < 2 or ranks % 2):
            raise MeshError(f"mesh {known} of {ranks} ranks has two dimensions; give an even number, or the shape: --shape 1x{ranks}")
        shape = (ranks,) if dims == 1 else (2, ranks // 2) if known == "hsdp" else (ranks // 2, 2)
    if len(shape) != dims or prod(shape) != ranks or min(shape) < 1:
        told = "x".join(map(str, shape))
        raise MeshError(
            f"shape {told} does not fit mesh {known} of {ranks} ranks: it takes {dims} number{'s' * (dims > 1)}, product {ranks}"
        )
    return Mesh(known, tuple(shape))


def tensor_cuts(name: str) -> tuple[Cut | None] | None:
    """How tensor parallelism cuts a parameter, by its name; None for one that it leaves as an ordinary tensor on every rank."""
    module, leaf = (["", *name.split(".")])[-2:]
    if module in BY_OUTPUTS:
        return (Cut(0),)
    if module in BY_INPUTS:
        return (Cut(1) if leaf == "weight" else None,)  # a bias is added after the sum over ranks
    return None


def _cuts(entry: Entry, kind: MeshKind) -> tuple[tuple[int, ...], tuple[Cut | None, ...]]:
    """The dimensions of the mesh that share a parameter, and how each cuts it."""
    own = tensor_cuts(entry.name)
    match kind:
        case "fsdp":
            return (0,), (Cut(0),)
        case "hsdp":
            return (0, 1), (None, Cut(0))
        case "ddp":
            return (0,), ()
        case "tp":
            return ((), ()) if own is None else ((0,), own)
        case "fsdp+tp":
            # FSDP2 comes second and cuts what is left: where both cut rows, a rank's are those of one chunk of a chunk.
            return ((0,), (Cut(0),)) if own is None else ((0, 1), (Cut(0, strided=own[0] == Cut(0)), *own))


@dataclass(frozen=True)
class PlacedPlan:
    """The parameters of a plan on a mesh."""

    mesh: Mesh
    plan: Plan
    axes: tuple[tuple[int, ...], ...]  # of each parameter: the dimensions of the mesh that share it; none: every rank has it for itself
    shares: tuple[Share | None, ...]

    def box(self, number: int, rank: int) -> Box:
        """What a rank holds of a parameter."""
        share = self.shares[number]
        return full_box(self.plan.rows[number].entry.shape) if share is None else share.boxes[self.mesh.position(rank, self.axes[number])]

    @cached_property
    def bytes_held(self) -> tuple[int, ...]:
        """State of each rank once every parameter has had a gradient."""
        alone = sum(row.state_bytes for row, share in zip(self.plan.rows, self.shares, strict=True) if share is None)
        return tuple(alone + both for both in self._over_teams(held))

    @cached_property
    def bytes_sent(self) -> tuple[int, ...]:
        """What each rank sends to others in a step without a refresh: gradients to owners, updates or new weights from them, or
        coordinates where these are enough."""
        return self._over_teams(sent)

    @cached_property
    def bytes_sent_at_refresh(self) -> tuple[int, ...]:
        """The same where every basis is taken anew, as at the first step."""
        return self._over_teams(partial(sent, refresh=True))

    def _over_teams(self, count: Callable[[Sequence[Share], int], Sequence[int]]) -> tuple[int, ...]:
        total = [0] * self.mesh.ranks
        for axes in sorted({own for own, share in zip(self.axes, self.shares, strict=True) if share is not None}):
            shares = [share for own, share in zip(self.axes, self.shares, strict=True) if share is not None and own == axes]
            each = count(shares, prod(self.mesh.shape[axis] for axis in axes))
            for rank in range(self.mesh.ranks):
                total[rank] += each[self.mesh.position(rank, axes)]
        return tuple(total)


def place(plan: Plan, mesh: Mesh) -> PlacedPlan:
    """Lay the parameters of a plan out on a mesh, as the optimizer does with those it is given.

    Raises:
        MeshError: a mesh for tensor parallelism, and no parameter with the name of a layer that it cuts.
    """
    if mesh.kind in ("tp", "fsdp+tp") and not any(tensor_cuts(row.entry.name) for row in plan):
        raise MeshError(
            f"mesh {mesh.kind} cuts {', '.join(BY_OUTPUTS)} by outputs and {', '.join(BY_INPUTS)} by inputs, and the model has none of "
            "these; take fsdp, hsdp or ddp"
        )
    pairs = [_cuts(row.entry, mesh.kind) for row in plan]
    shares: list[Share | None] = [None] * len(pairs)
    for axes in {own for own, _ in pairs if own}:
        numbers = [i for i, (own, _) in enumerate(pairs) if own == axes]
        sizes = tuple(mesh.shape[axis] for axis in axes)
        layout = Layout(prod(sizes), divided=mesh.kind == "ddp")
        rows, cuts = [plan.rows[i] for i in numbers], [pairs[i][1] for i in numbers]
        boxes = [shard_boxes(row.entry.shape, sizes, cut or (None,)) for row, cut in zip(rows, cuts, strict=True)]
        for i, share in zip(numbers, layout.add(rows, boxes, cuts), strict=True):
            shares[i] = share
    return PlacedPlan(mesh, plan, tuple(own for own, _ in pairs), tuple(shares))


# ------------------------------------------------------------------------------------------- all ranks of a team at once


def held(shares: Sequence[Share], ranks: int) -> list[int]:
    """`Share.bytes_held` added up over shares, for every rank."""
    total = [0] * ranks
    everywhere = 0
    for share in shares:
        row = share.row
        if row.entry.frozen or not row.entry.numel:
            everywhere += row.state_bytes
        elif row.codes:  # in blocks, which a cut may leave unfilled
            total = [own + share.bytes_held(rank) for rank, own in enumerate(total)]
        else:
            add_state(total, share)
            everywhere += sum(dtype.itemsize for key, (_, dtype) in row.state.items() if key in COUNTERS)
    return [own + everywhere for own in total]


def sent(shares: Sequence[Share], ranks: int, refresh: bool = False) -> list[int]:
    """`Share.bytes_sent` added up over shares, for every rank: of thousands of ranks, message by message would take hours."""
    total = torch.zeros(ranks, dtype=torch.int64)
    known: dict[tuple[int, tuple[Box, ...]], Overlap] = {}
    for share in shares:
        if share.row.entry.frozen or _stays(share):
            continue
        if share.along is not None:
            size = share.row.compute_dtype.itemsize
            if not refresh:
                for message in chain(share.projected(0), share.lifted(0)):
                    total[message.source] += message.box.numel * size * (message.source != message.target)
                continue
            for rank, numel in share.basis_sent.items():
                total[rank] += numel * size
        key = (id(share.boxes), tuple(part.box for part in share.parts))  # boxes of one shape are one tuple
        if key not in known:
            known[key] = Overlap(share, ranks)
        _add_sent(total, share, known[key])
    return [int(own) for own in total]


def _stays(share: Share) -> bool:
    """Whether every part is computed where it lies, by all that hold it. Boxes of a mesh are the same or have nothing in common."""
    return tuple((part.box, part.owners) for part in share.parts) == box_holders(share.boxes)


class Overlap:
    """What the parts and the shards of one shape have in common."""

    def __init__(self, share: Share, ranks: int) -> None:
        boxes = box_holders(share.boxes)
        self.common = _common([part.box for part in share.parts], [box for box, _ in boxes])  # (parts, boxes)
        self.holders = torch.tensor([rank for _, ranks in boxes for rank in ranks])  # box after box
        self.count = torch.tensor([len(ranks) for _, ranks in boxes])
        self.first = self.count.cumsum(0) - self.count
        self.replica_index = torch.tensor(replica_index(share.boxes))
        self.box_of = torch.full((ranks,), -1)
        self.box_of[self.holders] = torch.arange(len(boxes)).repeat_interleave(self.count)


def _common(parts: Sequence[Box], boxes: Sequence[Box]) -> Tensor:
    """How many entries each part has in common with each box."""
    out = torch.ones(len(parts), len(boxes), dtype=torch.int64)
    for d in range(len(parts[0].start)):
        low = torch.maximum(torch.tensor([box.start[d] for box in parts])[:, None], torch.tensor([box.start[d] for box in boxes]))
        high = torch.minimum(torch.tensor([box.stop[d] for box in parts])[:, None], torch.tensor([box.stop[d] for box in boxes]))
        out *= (high - low).clamp_(min=0)
    return out


def _add_sent(total: Tensor, share: Share, overlap: Overlap) -> None:
    """`Share.incoming`, `outgoing` and `copies`, summed by source."""
    row, common = share.row, overlap.common
    owner = torch.tensor([part.owners[0] for part in share.parts])
    everyone = (common * overlap.count).sum(1)  # entries that all holders of a part have of it
    if share.resident:
        own = torch.tensor([part.box.numel * len(part.owners) for part in share.parts])
        total.index_add_(0, owner, (everyone - own) * row.entry.dtype.itemsize)
        return
    assert all(len(part.owners) == 1 for part in share.parts)
    at_home = overlap.box_of[owner][:, None] == torch.arange(common.size(1))  # the box that the owner itself holds
    source = overlap.holders[overlap.first + overlap.replica_index[owner][:, None] % overlap.count]  # what `Share._near` finds
    size = row.entry.dtype.itemsize * (2 if any(split.needs_weight for _, split in row.splits) else 1)
    total.index_add_(0, source.flatten(), common.masked_fill(at_home, 0).flatten() * size)
    there = row.compute_dtype.itemsize
    total.index_add_(0, owner, common.masked_fill(at_home, 0).sum(1) * there)
    total.index_add_(0, source.flatten(), (common * (overlap.count - 1)).flatten() * there)
