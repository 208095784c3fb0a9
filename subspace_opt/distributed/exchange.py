"""The only file of this package that imports torch.distributed: groups of ranks, shards of DTensors, all-to-all, state as DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from ..algebra.storage import Codes
from ..engine import lowbit
from ..plan import COUNTERS
from .boxes import EMPTY, Box, Cut, box_holders, full_box, shard_boxes
from .placement import Message, Sharding


class ShardingError(ValueError):
    """The optimizer cannot update a parameter that is distributed in this way; nothing has been changed."""


@dataclass(frozen=True)
class RankGroup:
    """The ranks over which parameters are distributed: those of a mesh in row-major order, or those of a DDP process group."""

    members: tuple[int, ...]  # global ranks
    process_group: Any  # of exactly these ranks
    rank: int  # the position of this process in `members`
    replicated: bool  # every rank holds the whole parameters (DDP), and the ranks divide work and state
    group_ranks: tuple[int, ...]  # for each member, its rank in the process group

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.members)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, computed in place. A collective."""
        dist.all_reduce(value, dist.ReduceOp.SUM, group=self.process_group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """The maximum of each entry over the ranks, computed in place. A collective."""
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.process_group)
        return value


def is_dtensor(tensor: Tensor) -> bool:
    """True if a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def replicated_group(process_group: Any) -> RankGroup:
    """The ranks of a process group that all hold the same parameters, as under DistributedDataParallel."""
    members = tuple(dist.get_process_group_ranks(process_group))
    return RankGroup(members, process_group, members.index(dist.get_rank()), True, tuple(range(len(members))))


class MeshGroups:
    """The rank groups of device meshes. Each set of ranks gets one process group, which is made at its first use."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], RankGroup] = {}

    def group_of(self, tensor: Tensor) -> RankGroup:
        """The ranks of a DTensor's mesh."""
        assert isinstance(tensor, DTensor)
        mesh = tensor.device_mesh
        members = tuple(mesh.mesh.flatten().tolist())
        if members not in self._groups:
            process_group = _process_group(mesh, members)
            group_ranks = tuple(dist.get_group_rank(process_group, member) for member in members)
            self._groups[members] = RankGroup(members, process_group, members.index(dist.get_rank()), False, group_ranks)
        return self._groups[members]


def _process_group(mesh: DeviceMesh, members: tuple[int, ...]) -> Any:
    if mesh.ndim == 1:
        return mesh.get_group()
    if sorted(members) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(sorted(members), use_local_synchronization=True)


# ------------------------------------------------------------------------------------------------------- shards of DTensors


def mesh_cuts(tensor: Tensor, name: str) -> tuple[Cut | None, ...]:
    """How each dimension of the mesh cuts a DTensor; None for a dimension that replicates it.

    Raises:
        ShardingError: a placement is neither `Shard` nor `Replicate`.
    """
    assert isinstance(tensor, DTensor)
    out: list[Cut | None] = []
    for placement in tensor.placements:
        if isinstance(placement, _StridedShard):
            out.append(Cut(placement.dim, strided=True))
        elif isinstance(placement, Shard):
            out.append(Cut(placement.dim))
        elif isinstance(placement, Replicate):
            out.append(None)
        else:
            raise ShardingError(
                f"parameter '{name}' has the placement {placement!r}; only Shard and Replicate can be updated: redistribute it first"
            )
    return tuple(out)


def checked_boxes(tensor: Tensor, cuts: tuple[Cut | None, ...], group: RankGroup, name: str) -> tuple[Box, ...]:
    """The box that each rank of the group holds of a parameter.

    Raises:
        ShardingError: the shard of this rank does not have the shape of its box.
    """
    if not isinstance(tensor, DTensor):
        return (full_box(tensor.shape),) * group.size
    found = shard_boxes(tuple(tensor.shape), tuple(tensor.device_mesh.shape), cuts)
    expected, held = found[group.rank].shape, tuple(tensor.to_local().shape)
    if expected != held and (found[group.rank].numel or tensor.to_local().numel()):
        raise ShardingError(
            f"parameter '{name}' with placements {tuple(tensor.placements)} on a mesh of {tuple(tensor.device_mesh.shape)} holds {held} on "
            f"rank {dist.get_rank()}, where {expected} was expected; only chunks of contiguous rows or columns can be updated"
        )
    return found


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its storage; an ordinary tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_grad(param: Tensor, name: str) -> Tensor | None:
    """This rank's shard of the gradient, with the placements of the parameter; None if there is no gradient.

    Raises:
        ShardingError: the parameter is a DTensor and its gradient is an ordinary tensor.
    """
    grad = param.grad
    if grad is None or not isinstance(param, DTensor):
        return grad
    if not isinstance(grad, DTensor):
        raise ShardingError(
            f"the parameter '{name}' is a DTensor and its gradient is an ordinary tensor; let autograd compute the gradient"
        )
    if tuple(grad.placements) != tuple(param.placements):
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


# ----------------------------------------------------------------------------------------------------------------- exchange


class Exchange:
    """One all-to-all of boxes between the ranks of a group. It starts when the object is made; `wait` returns what arrived."""

    def __init__(
        self,
        group: RankGroup,
        messages: Sequence[Message],
        has_traffic: bool,
        fetch: Callable[[Message], Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Start the exchange. A collective if `has_traffic`.

        Args:
            messages: At least those that this rank sends or receives; others are ignored.
            has_traffic: Whether any rank sends a message to another rank. All ranks must pass the same value.
            fetch: Returns the tensor of a message that this rank sends, of the message's shape and of `dtype`.
        """
        self._own = [(message, fetch(message)) for message in messages if message.source == message.target == group.rank]
        between = [message for message in messages if message.source != message.target]
        self._work: Any = None
        self._arriving: list[Message] = []
        if not has_traffic:
            return
        leaving = _by_group_rank(group, [m for m in between if m.source == group.rank], lambda m: m.target)
        arriving = _by_group_rank(group, [m for m in between if m.target == group.rank], lambda m: m.source)
        self._arriving = [message for messages in arriving for message in messages]
        flat = [fetch(message).reshape(-1) for messages in leaving for message in messages]
        self._sent = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
        self._received = torch.empty(sum(m.box.numel for m in self._arriving), dtype=dtype, device=device)
        received, sent = self._received.view(torch.uint8), self._sent.view(torch.uint8)  # some backends do not support every dtype
        sizes = [[dtype.itemsize * sum(m.box.numel for m in messages) for messages in side] for side in (arriving, leaving)]
        self._work = dist.all_to_all_single(received, sent, sizes[0], sizes[1], group=group.process_group, async_op=True)

    def wait(self) -> Iterator[tuple[Message, Tensor]]:
        """Wait, then yield each message to this rank with its tensor, of the shape of the box. Its messages to itself come first."""
        yield from self._own
        if self._work is None:
            return
        self._work.wait()
        start = 0
        for message in self._arriving:
            yield message, self._received[start : start + message.box.numel].view(message.box.shape)
            start += message.box.numel


def _by_group_rank(group: RankGroup, messages: Sequence[Message], end: Callable[[Message], int]) -> list[list[Message]]:
    """Messages by the process-group rank of their source or target, in the same order on sender and receiver."""
    out: list[list[Message]] = [[] for _ in range(group.size)]
    for message in messages:
        out[group.group_ranks[end(message)]].append(message)
    return out


class Redistribution(NamedTuple):
    """A tensor to redistribute from the boxes `held` to the boxes `target`, one for each rank.

    `value` is the data of this rank's held box, in any shape.
    """

    held: Sequence[Box | None]
    target: Sequence[Box | None]
    value: Tensor


def redistribute(group: RankGroup, moves: Sequence[Redistribution], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Redistribute tensors of one dtype with one exchange. Returns this rank's target boxes. A collective."""
    messages = [message for index, move in enumerate(moves) for message in _messages_between(index, move)]

    def fetch(message: Message) -> Tensor:
        move = moves[message.tensor_index]
        own = move.held[group.rank]
        assert own is not None
        return move.value.reshape(own.shape)[message.box.slices_in(own)]

    wanted = [move.target[group.rank] for move in moves]
    out = [torch.zeros((0,) if box is None else box.shape, dtype=dtype, device=device) for box in wanted]
    has_traffic = any(message.source != message.target for message in messages)
    for message, tensor in Exchange(group, messages, has_traffic, fetch, dtype, device).wait():
        box = wanted[message.tensor_index]
        assert box is not None
        out[message.tensor_index][message.box.slices_in(box)] = tensor
    return out


def _messages_between(index: int, move: Redistribution) -> Iterator[Message]:
    holders = box_holders(tuple(box or EMPTY for box in move.held))
    for target, wanted in enumerate(move.target):
        for box, ranks in holders if wanted is not None else ():
            both = box.intersection(wanted) if wanted is not None else None
            if both is not None:
                yield Message(target if target in ranks else ranks[0], target, both, index)


# --------------------------------------------------------------------------------------------------- state in checkpoints


def state_to_dtensors(group: RankGroup, sharding: Sharding, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter for a checkpoint: tensors as DTensors on the parameter's mesh, counters unchanged. A collective.

    A slot of the parameter's shape gets the parameter's placements. Any other slot is cut along its longest side.
    """
    mesh = _mesh(group, param)
    out: dict[str, Any] = {}
    placements: dict[str, tuple[Placement, ...]] = {}
    moves: dict[torch.dtype, dict[str, Redistribution]] = {}
    for key, (shape, dtype) in sharding.row.state.items():
        value = state[key]
        if key in COUNTERS:
            out[key] = group.max(value.to(param.device)).to(value.device) if key == "refreshed" else value
            continue
        value = lowbit.whole(value).to(dtype)  # codes are saved as numbers, because their blocks differ with the number of ranks
        placements[key], target = _target(group, sharding, param, mesh, shape)
        held = [sharding.state_box(key, rank) for rank in range(group.size)]
        if all(box == t or (box is None and not t.numel) for box, t in zip(held, target, strict=True)):
            out[key] = value.reshape(target[group.rank].shape)
        else:
            out[key] = value  # keeps the order of the keys; `redistribute` replaces the value below
            moves.setdefault(dtype, {})[key] = Redistribution(held, target, value)
    for dtype, some in moves.items():
        out |= dict(zip(some, redistribute(group, list(some.values()), dtype, param.device), strict=True))
    for key, own in placements.items():
        size = torch.Size(sharding.row.state[key][0])
        stride = torch.empty(size, device="meta").stride()
        out[key] = DTensor.from_local(out[key], mesh, own, run_check=False, shape=size, stride=stride)
    return out


def slot_from_checkpoint(group: RankGroup, sharding: Sharding, param: Tensor, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """This rank's part of a slot, from a checkpoint's tensor: a whole tensor, or a DTensor with any placements.

    A collective if the tensor is a DTensor.

    Raises:
        ShardingError: The tensor holds the shard of another rank.
    """
    if isinstance(value, DTensor):
        _check_own(value, sharding.row.entry.name, key)  # before any operation: DTensor caches the meshes of results
    held = [sharding.state_box(key, rank) for rank in range(group.size)]
    own = held[group.rank]
    part = sharding.part_of(group.rank)
    if own is None:
        kept_shape: tuple[int, ...] = (0,)
    elif part is not None and key in part.row.state and prod(part.row.state[key][0]) == own.numel:
        kept_shape = part.row.state[key][0]
    else:
        kept_shape = own.shape
    codes = None if part is None or own is None else part.row.codes.get(key)
    value = lowbit.whole(value.detach())
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        if tuple(mesh.mesh.flatten().tolist()) != group.members:
            value = value.full_tensor()
    if not isinstance(value, DTensor):
        taken = value[own.slices_in(full_box(shape))] if own is not None else value.new_zeros(0)
        return _encoded(taken.reshape(kept_shape).to(param.device, copy=True), codes)
    saved = shard_boxes(shape, tuple(mesh.shape), mesh_cuts(value, sharding.row.entry.name))
    (taken,) = redistribute(group, [Redistribution(saved, held, value.to_local())], value.dtype, param.device)
    return _encoded(taken.reshape(kept_shape), codes)


def _check_own(value: DTensor, name: str, key: str) -> None:
    """Raise unless a DTensor of a checkpoint holds this rank's shard. If rank 0 alone has saved it, all ranks read the shard of rank 0."""
    mesh, rank = value.device_mesh, dist.get_rank()
    place = (mesh.mesh == rank).nonzero().flatten().tolist()
    if place and list(mesh.get_coordinate() or ()) != place:
        raise ShardingError(
            f"'{name}': slot '{key}' of the checkpoint holds the shard of another rank, because one rank alone has saved it; the shards of "
            "the other ranks are lost. Save with subspace_opt.snapshots or torch.distributed.checkpoint, to which all ranks contribute"
        )


def _encoded(value: Tensor, codes: Codes | None) -> Tensor:
    return value if codes is None else lowbit.coded(value, codes)


def _mesh(group: RankGroup, param: Tensor) -> DeviceMesh:
    return param.device_mesh if isinstance(param, DTensor) else DeviceMesh.from_group(group.process_group, param.device.type)


def _target(
    group: RankGroup, sharding: Sharding, param: Tensor, mesh: DeviceMesh, shape: tuple[int, ...]
) -> tuple[tuple[Placement, ...], tuple[Box, ...]]:
    """The placements of a slot in a checkpoint, and the box of each rank."""
    if shape == sharding.row.entry.shape and isinstance(param, DTensor):
        return tuple(param.placements), sharding.boxes
    if not shape:
        return (Replicate(),) * mesh.ndim, (full_box(shape),) * group.size
    dim = max(range(len(shape)), key=lambda d: shape[d])
    return (Shard(dim),) * mesh.ndim, shard_boxes(shape, tuple(mesh.shape), (Cut(dim),) * mesh.ndim)
