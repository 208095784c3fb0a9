"""The only file of this package that imports torch.distributed: groups of ranks, shards of DTensors, all-to-all, tensors of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from .boxes import EMPTY, Box, Cut, box_holders, full_box, shard_boxes
from .placement import Message


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


# --------------------------------------------------------------------------------------------------- tensors of checkpoints


class SavedLayout(NamedTuple):
    """A tensor in a checkpoint: the mesh and the placements of its DTensor, and the box of each rank."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    boxes: tuple[Box, ...]

    def dtensor(self, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The DTensor of this shape whose shard on this rank is `local`. No rank sends anything."""
        size = torch.Size(shape)
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=size, stride=stride)


def checkpoint_mesh(group: RankGroup, param: Tensor) -> DeviceMesh:
    """The mesh of a parameter's state in a checkpoint: the parameter's own, or all ranks of the group in one dimension."""
    return param.device_mesh if isinstance(param, DTensor) else DeviceMesh.from_group(group.process_group, param.device.type)


def saved_layout(mesh: DeviceMesh, param: Tensor, boxes: tuple[Box, ...], shape: tuple[int, ...]) -> SavedLayout:
    """The layout of a slot in a checkpoint: that of the parameter if the shapes are equal, else cut along the longest side.

    Args:
        boxes: The box that each rank holds of the parameter.
        shape: The shape of the whole slot.
    """
    if shape == tuple(param.shape) and isinstance(param, DTensor):
        return SavedLayout(mesh, tuple(param.placements), boxes)
    if not shape:
        return SavedLayout(mesh, (Replicate(),) * mesh.ndim, (full_box(shape),) * len(boxes))
    dim = max(range(len(shape)), key=lambda d: shape[d])
    return SavedLayout(mesh, (Shard(dim),) * mesh.ndim, shard_boxes(shape, tuple(mesh.shape), (Cut(dim),) * mesh.ndim))


def check_saved(value: Tensor, name: str, key: str) -> None:
    """Check that a checkpoint's DTensor holds this rank's shard. If rank 0 alone has saved it, all ranks read the shard of rank 0.

    Call it before any operation on the tensor, because DTensor caches the meshes of results.

    Raises:
        ShardingError: The tensor holds the shard of another rank.
    """
    if not isinstance(value, DTensor):
        return
    mesh, rank = value.device_mesh, dist.get_rank()
    place = (mesh.mesh == rank).nonzero().flatten().tolist()
    if place and list(mesh.get_coordinate() or ()) != place:
        raise ShardingError(
            f"'{name}': slot '{key}' of the checkpoint holds the shard of another rank, because one rank alone has saved it; the shards of "
            "the other ranks are lost. Save with subspace_opt.snapshots or torch.distributed.checkpoint, to which all ranks contribute"
        )


def saved_shard(group: RankGroup, value: Tensor, name: str) -> tuple[Tensor, tuple[Box, ...] | None]:
    """This rank's shard of a checkpoint's tensor and the boxes of all ranks; None for the boxes if the tensor is whole.

    A collective if the tensor is a DTensor on other ranks than those of the group: it is then gathered.
    """
    if isinstance(value, DTensor) and tuple(value.device_mesh.mesh.flatten().tolist()) != group.members:
        value = value.full_tensor()
    if not isinstance(value, DTensor):
        return value, None
    return value.to_local(), shard_boxes(tuple(value.shape), tuple(value.device_mesh.shape), mesh_cuts(value, name))
