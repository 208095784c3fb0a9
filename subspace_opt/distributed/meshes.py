"""Plans on meshes that need not exist: shards, state and traffic of every rank. Pure functions of shapes.

    fsdp      every parameter is cut along its first dimension, as FSDP2's fully_shard does
    hsdp      the same within each group of ranks; the groups are replicas of each other
    ddp       every rank holds every parameter; the ranks divide work and state
    tp        tensor parallelism cuts the layers of attention and feed-forward (below); every rank holds all other parameters
    fsdp+tp   FSDP2 cuts all parameters over the other dimension of the mesh; it cuts the shards of tensor parallelism again

Ranks are numbered in row-major order of their coordinates. Tensor parallelism has the last dimension, the replicas of HSDP the first.
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
from .parts import bytes_to_owner
from .placement import Layout, Sharding, add_state_bytes

MeshKind = Literal["fsdp", "hsdp", "ddp", "tp", "fsdp+tp"]
MESH_KINDS: tuple[MeshKind, ...] = get_args(MeshKind)

# Megatron's tensor parallelism (arXiv:1909.08053) cuts the first layer of a pair by its outputs and the second by its inputs, so that
# nothing is communicated in between. The names are those of LLaMA and models derived from it.
BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")


class MeshError(ValueError):
    """The ranks do not form the mesh, or the mesh cuts no parameter of the model."""


@dataclass(frozen=True)
class Mesh:
    """Ranks on a grid."""

    kind: MeshKind
    shape: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return prod(self.shape)

    def position(self, rank: int, axes: Sequence[int]) -> int:
        """The position of a rank, in row-major order, among the ranks whose coordinates differ from its own along `axes` only."""
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
    """A mesh of `ranks` ranks.

    Without `shape`, a mesh of two dimensions has 2 in one of them: hsdp 2 replicas, fsdp+tp 2 tensor-parallel ranks.

    Raises:
        MeshError: the kind is unknown, or the shape does not fit the kind and the number of ranks.
    """
    known = next((one for one in MESH_KINDS if one == kind), None)
    if known is None:
        raise MeshError(f"mesh '{kind}' is unknown; choose one of {', '.join(MESH_KINDS)}")
    dims = 2 if known in ("hsdp", "fsdp+tp") else 1
    if shape is None:
        if dims == 2 and (ranks < 2 or ranks % 2):
            raise MeshError(f"mesh {known} of {ranks} ranks has two dimensions; give an even number, or the shape: --shape 1x{ranks}")
        shape = (ranks,) if dims == 1 else (2, ranks // 2) if known == "hsdp" else (ranks // 2, 2)
    if len(shape) != dims or prod(shape) != ranks or min(shape) < 1:
        given = "x".join(map(str, shape))
        raise MeshError(
            f"shape {given} does not fit mesh {known} of {ranks} ranks: it takes {dims} number{'s' * (dims > 1)}, product {ranks}"
        )
    return Mesh(known, tuple(shape))


def tensor_parallel_cuts(name: str) -> tuple[Cut | None] | None:
    """How tensor parallelism cuts the parameter `name`; None if it leaves the parameter as an ordinary tensor on every rank."""
    module, leaf = (["", *name.split(".")])[-2:]
    if module in BY_OUTPUTS:
        return (Cut(0),)
    if module in BY_INPUTS:
        return (Cut(1) if leaf == "weight" else None,)  # the bias is added after the sum over ranks
    return None


def _axes_and_cuts(entry: Entry, kind: MeshKind) -> tuple[tuple[int, ...], tuple[Cut | None, ...]]:
    """The dimensions of the mesh over which a parameter is distributed, and how each of them cuts it."""
    own = tensor_parallel_cuts(entry.name)
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
            # FSDP2 cuts the shards of tensor parallelism: if both cut rows, a rank holds one chunk of a chunk.
            return ((0,), (Cut(0),)) if own is None else ((0, 1), (Cut(0, strided=own[0] == Cut(0)), *own))


@dataclass(frozen=True)
class PlacedPlan:
    """The parameters of a plan on a mesh."""

    mesh: Mesh
    plan: Plan
    axes: tuple[tuple[int, ...], ...]  # for each parameter, the mesh dimensions that distribute it; empty if every rank has all of it
    shardings: tuple[Sharding | None, ...]

    def box(self, number: int, rank: int) -> Box:
        """The shard that a rank holds of the parameter `number`."""
        sharding = self.shardings[number]
        if sharding is None:
            return full_box(self.plan.rows[number].entry.shape)
        return sharding.boxes[self.mesh.position(rank, self.axes[number])]

    @cached_property
    def bytes_held(self) -> tuple[int, ...]:
        """Bytes of state of each rank once every parameter has had a gradient."""
        alone = sum(row.state_bytes for row, sharding in zip(self.plan.rows, self.shardings, strict=True) if sharding is None)
        return tuple(alone + distributed for distributed in self._sum_over_groups(total_bytes_held))

    @cached_property
    def bytes_sent(self) -> tuple[int, ...]:
        """Bytes that each rank sends to others in a step without a refresh.

        Gradients go to owners, and updates or new weights come back. A parameter that is cut along its basis sends only coordinates.
        """
        return self._sum_over_groups(total_bytes_sent)

    @cached_property
    def bytes_sent_at_refresh(self) -> tuple[int, ...]:
        """Bytes that each rank sends to others in a step that refreshes every basis, such as the first."""
        return self._sum_over_groups(partial(total_bytes_sent, refresh=True))

    def _sum_over_groups(self, count: Callable[[Sequence[Sharding], int], Sequence[int]]) -> tuple[int, ...]:
        total = [0] * self.mesh.ranks
        for axes in sorted({own for own, sharding in zip(self.axes, self.shardings, strict=True) if sharding is not None}):
            found = [sharding for own, sharding in zip(self.axes, self.shardings, strict=True) if sharding is not None and own == axes]
            each = count(found, prod(self.mesh.shape[axis] for axis in axes))
            for rank in range(self.mesh.ranks):
                total[rank] += each[self.mesh.position(rank, axes)]
        return tuple(total)


def place(plan: Plan, mesh: Mesh) -> PlacedPlan:
    """Compute the layout that the optimizer would make of a plan's parameters on a mesh.

    Raises:
        MeshError: the mesh is for tensor parallelism and no parameter has the name of a layer that it cuts.
    """
    if mesh.kind in ("tp", "fsdp+tp") and not any(tensor_parallel_cuts(row.entry.name) for row in plan):
        raise MeshError(
            f"mesh {mesh.kind} cuts {', '.join(BY_OUTPUTS)} by outputs and {', '.join(BY_INPUTS)} by inputs, and the model has none of "
            "these; choose fsdp, hsdp or ddp"
        )
    pairs = [_axes_and_cuts(row.entry, mesh.kind) for row in plan]
    shardings: list[Sharding | None] = [None] * len(pairs)
    for axes in {own for own, _ in pairs if own}:
        numbers = [i for i, (own, _) in enumerate(pairs) if own == axes]
        sizes = tuple(mesh.shape[axis] for axis in axes)
        layout = Layout(prod(sizes), replicated=mesh.kind == "ddp")
        rows, cuts = [plan.rows[i] for i in numbers], [pairs[i][1] for i in numbers]
        boxes = [shard_boxes(row.entry.shape, sizes, cut or (None,)) for row, cut in zip(rows, cuts, strict=True)]
        for i, sharding in zip(numbers, layout.add(rows, boxes, cuts), strict=True):
            shardings[i] = sharding
    return PlacedPlan(mesh, plan, tuple(own for own, _ in pairs), tuple(shardings))


# ------------------------------------------------------------------------------------------- all ranks of a group at once


def total_bytes_held(shardings: Sequence[Sharding], ranks: int) -> list[int]:
    """The sum of `Sharding.bytes_held` over parameters, for every rank."""
    total = [0] * ranks
    everywhere = 0
    for sharding in shardings:
        row = sharding.row
        if row.entry.frozen or not row.entry.numel:
            everywhere += row.state_bytes
        elif row.codes:  # codes come in blocks, and the last block of a part may be incomplete
            total = [own + sharding.bytes_held(rank) for rank, own in enumerate(total)]
        else:
            add_state_bytes(total, sharding)
            everywhere += sum(dtype.itemsize for key, (_, dtype) in row.state.items() if key in COUNTERS)
    return [own + everywhere for own in total]


def total_bytes_sent(shardings: Sequence[Sharding], ranks: int, *, refresh: bool = False) -> list[int]:
    """The sum of `Sharding.bytes_sent` over parameters, for every rank.

    Computed with tensors of parts x shards: on thousands of ranks, counting message by message would take hours.
    """
    total = torch.zeros(ranks, dtype=torch.int64)
    known: dict[tuple[int, tuple[Box, ...]], Overlap] = {}
    for sharding in shardings:
        if sharding.row.entry.frozen or _is_computed_by_holders(sharding):
            continue
        if sharding.basis_dim is not None:
            size = sharding.row.compute_dtype.itemsize
            if not refresh:
                for message in chain(sharding.projection_messages(), sharding.lift_messages()):
                    total[message.source] += message.box.numel * size * (message.source != message.target)
                continue
            for rank, numel in sharding.basis_entries_sent.items():
                total[rank] += numel * size
        key = (id(sharding.boxes), tuple(part.box for part in sharding.parts))  # parameters of one shape have the same tuple of boxes
        if key not in known:
            known[key] = Overlap(sharding, ranks)
        _add_bytes_sent(total, sharding, known[key])
    return [int(own) for own in total]


def _is_computed_by_holders(sharding: Sharding) -> bool:
    """True if the parts are the shards and every holder of a shard computes it, so that nothing is sent."""
    return tuple((part.box, part.owners) for part in sharding.parts) == box_holders(sharding.boxes)


class Overlap:
    """The intersections of parts and shards, in entries, for all parameters with the same parts and shards."""

    def __init__(self, sharding: Sharding, ranks: int) -> None:
        boxes = box_holders(sharding.boxes)
        self.common = _common_entries([part.box for part in sharding.parts], [box for box, _ in boxes])  # (parts, boxes)
        self.holders = torch.tensor([rank for _, ranks in boxes for rank in ranks])  # the holders of box 0, then of box 1, ...
        self.count = torch.tensor([len(ranks) for _, ranks in boxes])
        self.first = self.count.cumsum(0) - self.count
        self.replica_index = torch.tensor(replica_index(sharding.boxes))
        self.box_of = torch.full((ranks,), -1)
        self.box_of[self.holders] = torch.arange(len(boxes)).repeat_interleave(self.count)


def _common_entries(parts: Sequence[Box], boxes: Sequence[Box]) -> Tensor:
    """The number of entries that each part has in common with each box, `(parts, boxes)`."""
    out = torch.ones(len(parts), len(boxes), dtype=torch.int64)
    for d in range(len(parts[0].start)):
        low = torch.maximum(torch.tensor([box.start[d] for box in parts])[:, None], torch.tensor([box.start[d] for box in boxes]))
        high = torch.minimum(torch.tensor([box.stop[d] for box in parts])[:, None], torch.tensor([box.stop[d] for box in boxes]))
        out *= (high - low).clamp_(min=0)
    return out


def _add_bytes_sent(total: Tensor, sharding: Sharding, overlap: Overlap) -> None:
    """Add the bytes of `gradient_messages`, `update_messages` and `replica_messages` to `total` at their sources."""
    row, common = sharding.row, overlap.common
    owner = torch.tensor([part.owners[0] for part in sharding.parts])
    all_holders = (common * overlap.count).sum(1)  # entries of each part, counted once for every rank that holds them
    if sharding.updates_in_place:
        own = torch.tensor([part.box.numel * len(part.owners) for part in sharding.parts])
        total.index_add_(0, owner, (all_holders - own) * row.entry.dtype.itemsize)
        return
    assert all(len(part.owners) == 1 for part in sharding.parts)
    at_home = overlap.box_of[owner][:, None] == torch.arange(common.size(1))  # the box that the owner itself holds
    near = overlap.first + overlap.replica_index[owner][:, None] % overlap.count  # as `Sharding._holder_near`
    source = overlap.holders[near]
    size = bytes_to_owner(row)
    total.index_add_(0, source.flatten(), common.masked_fill(at_home, 0).flatten() * size)
    compute = row.compute_dtype.itemsize
    total.index_add_(0, owner, common.masked_fill(at_home, 0).sum(1) * compute)
    total.index_add_(0, source.flatten(), (common * (overlap.count - 1)).flatten() * compute)
