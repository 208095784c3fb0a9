"""The only file that knows torch.distributed: teams of ranks, what a rank holds of a parameter, exchanges, state as DTensors."""

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
from .placement import Message, Share


class ShardingError(ValueError):
    """A parameter lies on the ranks in a way that cannot be updated rightly; nothing has been changed."""


@dataclass(frozen=True)
class Team:
    """The ranks that share parameters: those of a mesh, in row-major order of its coordinates, or of a group that holds them all whole."""

    members: tuple[int, ...]  # global ranks
    group: Any  # a process group of exactly these
    rank: int  # this process, counted in `members`
    divided: bool  # parameters are whole on all ranks, and work and state are divided all the same
    places: tuple[int, ...]  # of each member, its rank in the group

    @property
    def size(self) -> int:
        return len(self.members)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        dist.all_reduce(value, dist.ReduceOp.SUM, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """The largest of each entry over the ranks, in place."""
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one of PyTorch's distributed tensors."""
    return isinstance(tensor, DTensor)


def team_of_group(group: Any) -> Team:
    """The team of a process group whose ranks hold the same parameters, as under DistributedDataParallel."""
    members = tuple(dist.get_process_group_ranks(group))
    return Team(members, group, members.index(dist.get_rank()), True, tuple(range(len(members))))


class Teams:
    """The teams of meshes, each with one process group of all its ranks."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Team] = {}

    def of(self, tensor: Tensor) -> Team:
        """The team of a distributed tensor."""
        assert isinstance(tensor, DTensor)
        mesh = tensor.device_mesh
        members = tuple(mesh.mesh.flatten().tolist())
        if members not in self._known:
            group = _group_of(mesh, members)
            places = tuple(dist.get_group_rank(group, member) for member in members)
            self._known[members] = Team(members, group, members.index(dist.get_rank()), False, places)
        return self._known[members]


def _group_of(mesh: DeviceMesh, members: tuple[int, ...]) -> Any:
    if mesh.ndim == 1:
        return mesh.get_group()
    if sorted(members) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(sorted(members), use_local_synchronization=True)


# ------------------------------------------------------------------------------------------------------- what a rank holds


def cuts(tensor: Tensor, name: str) -> tuple[Cut | None, ...]:
    """How each dimension of the mesh cuts a distributed tensor.

    Raises:
        ShardingError: a placement that is neither a shard nor a copy.
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
            raise ShardingError(f"parameter '{name}' has the placement {placement!r}; shards and copies can be updated, nothing else")
    return tuple(out)


def boxes(tensor: Tensor, own: tuple[Cut | None, ...], team: Team, name: str) -> tuple[Box, ...]:
    """The box of every rank of the team.

    Raises:
        ShardingError: this rank's shard is not the box that the placements tell of.
    """
    if not isinstance(tensor, DTensor):
        return (full_box(tensor.shape),) * team.size
    found = shard_boxes(tuple(tensor.shape), tuple(tensor.device_mesh.shape), own)
    here, held = found[team.rank].shape, tuple(tensor.to_local().shape)
    if here != held and (found[team.rank].numel or tensor.to_local().numel()):
        raise ShardingError(
            f"parameter '{name}' with placements {tuple(tensor.placements)} on a mesh of {tuple(tensor.device_mesh.shape)} holds {held} on "
            f"rank {dist.get_rank()}, where {here} was expected; only chunks of contiguous rows or columns can be updated"
        )
    return found


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the tensor itself where it is an ordinary one; shares its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_grad(param: Tensor, name: str) -> Tensor | None:
    """This rank's shard of a gradient, laid out as the parameter is.

    Raises:
        ShardingError: a distributed parameter with an ordinary gradient.
    """
    grad = param.grad
    if grad is None or not isinstance(param, DTensor):
        return grad
    if not isinstance(grad, DTensor):
        raise ShardingError(f"the gradient of '{name}' is an ordinary tensor, and the parameter is distributed; let autograd make it")
    if tuple(grad.placements) != tuple(param.placements):
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


# ----------------------------------------------------------------------------------------------------------------- exchange


class Exchange:
    """Boxes on their way between the ranks of a team: one all-to-all, begun at once."""

    def __init__(
        self,
        team: Team,
        messages: Sequence[Message],
        travels: bool,
        fetch: Callable[[Message], Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Begin.

        Args:
            messages: Those that this rank sends and receives, and perhaps others.
            travels: Whether any rank sends to another, as all ranks know.
            fetch: The tensor of a message that this rank sends, of the message's shape and `dtype`.
        """
        self._own = [(message, fetch(message)) for message in messages if message.source == message.target == team.rank]
        moving = [message for message in messages if message.source != message.target]
        self._work: Any = None
        self._arriving: list[Message] = []
        if not travels:
            return
        leaving = _by_place(team, [m for m in moving if m.source == team.rank], lambda m: m.target)
        arriving = _by_place(team, [m for m in moving if m.target == team.rank], lambda m: m.source)
        self._arriving = [message for messages in arriving for message in messages]
        parts = [fetch(message).reshape(-1) for messages in leaving for message in messages]
        self._sent = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        self._got = torch.empty(sum(m.box.numel for m in self._arriving), dtype=dtype, device=device)
        # As bytes: not every backend knows every dtype.
        got, sent = self._got.view(torch.uint8), self._sent.view(torch.uint8)
        sizes = [[dtype.itemsize * sum(m.box.numel for m in messages) for messages in side] for side in (arriving, leaving)]
        self._work = dist.all_to_all_single(got, sent, sizes[0], sizes[1], group=team.group, async_op=True)

    def wait(self) -> Iterator[tuple[Message, Tensor]]:
        """What has come, each with the shape of its box; this rank's own among it."""
        yield from self._own
        if self._work is None:
            return
        self._work.wait()
        start = 0
        for message in self._arriving:
            yield message, self._got[start : start + message.box.numel].view(message.box.shape)
            start += message.box.numel


def _by_place(team: Team, messages: Sequence[Message], end: Callable[[Message], int]) -> list[list[Message]]:
    """Messages by the group rank of one end, in one order on both ends."""
    out: list[list[Message]] = [[] for _ in range(team.size)]
    for message in messages:
        out[team.places[end(message)]].append(message)
    return out


# --------------------------------------------------------------------------------------------------- state in checkpoints


def exported(team: Team, share: Share, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as it stands in a checkpoint: tensors as DTensors on the parameter's mesh, counters as they are.

    A slot of the parameter's own shape is placed as the parameter is; others are cut along their longest side. A collective.
    """
    mesh = _mesh(team, param)
    out: dict[str, Any] = {}
    where: dict[str, tuple[Placement, ...]] = {}
    away: dict[torch.dtype, dict[str, Move]] = {}
    for key, (shape, dtype) in share.row.state.items():
        value = state[key]
        if key in COUNTERS:
            out[key] = team.max(value.to(param.device)).to(value.device) if key == "refreshed" else value
            continue
        value = lowbit.whole(value).to(dtype)  # codes go as numbers: their blocks are those of this rank's part
        where[key], target = _target(team, share, param, mesh, shape)
        held = [share.state_box(key, rank) for rank in range(team.size)]
        if all(box == t or (box is None and not t.numel) for box, t in zip(held, target, strict=True)):
            out[key] = value.reshape(target[team.rank].shape)
        else:
            out[key] = value  # in its place among the keys; its tensor follows
            away.setdefault(dtype, {})[key] = Move(held, target, value)
    for dtype, moves in away.items():
        out |= dict(zip(moves, moved(team, list(moves.values()), dtype, param.device), strict=True))
    for key, placements in where.items():
        size = torch.Size(share.row.state[key][0])
        stride = torch.empty(size, device="meta").stride()
        out[key] = DTensor.from_local(out[key], mesh, placements, run_check=False, shape=size, stride=stride)
    return out


def imported(team: Team, share: Share, param: Tensor, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """This rank's part of a slot, from a checkpoint's tensor: a DTensor of any placement on the team's ranks, or a whole one. A collective
    where it is a DTensor."""
    held = [share.state_box(key, rank) for rank in range(team.size)]
    own = held[team.rank]
    part = share.part_of(team.rank)
    if own is None:
        like: tuple[int, ...] = (0,)
    elif part is not None and key in part.row.state and prod(part.row.state[key][0]) == own.numel:
        like = part.row.state[key][0]
    else:
        like = own.shape
    how = None if part is None or own is None else part.row.codes.get(key)
    value = lowbit.whole(value)
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        if tuple(mesh.mesh.flatten().tolist()) != team.members:
            value = value.full_tensor()
    if not isinstance(value, DTensor):
        taken = value[own.slices_in(full_box(shape))] if own is not None else value.new_zeros(0)
        return _kept(taken.reshape(like).to(param.device, copy=True), how)
    there = shard_boxes(shape, tuple(mesh.shape), cuts(value, share.row.entry.name))
    (taken,) = moved(team, [Move(there, held, value.to_local())], value.dtype, param.device)
    return _kept(taken.reshape(like), how)


def _kept(value: Tensor, how: Codes | None) -> Tensor:
    return value if how is None else lowbit.coded(value, how)


def _mesh(team: Team, param: Tensor) -> DeviceMesh:
    return param.device_mesh if isinstance(param, DTensor) else DeviceMesh.from_group(team.group, param.device.type)


def _target(
    team: Team, share: Share, param: Tensor, mesh: DeviceMesh, shape: tuple[int, ...]
) -> tuple[tuple[Placement, ...], tuple[Box, ...]]:
    if shape == share.row.entry.shape and isinstance(param, DTensor):
        return tuple(param.placements), share.boxes
    if not shape:
        return (Replicate(),) * mesh.ndim, (full_box(shape),) * team.size
    along = max(range(len(shape)), key=lambda d: shape[d])
    return (Shard(along),) * mesh.ndim, shard_boxes(shape, tuple(mesh.shape), (Cut(along),) * mesh.ndim)


class Move(NamedTuple):
    """A tensor whose ranks hold the boxes `held` and are to hold the boxes `target`; `value` is this rank's, whatever its shape."""

    held: Sequence[Box | None]
    target: Sequence[Box | None]
    value: Tensor


def moved(team: Team, moves: Sequence[Move], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """This rank's boxes of tensors of one dtype, all by one exchange. A collective."""
    messages = [message for item, move in enumerate(moves) for message in _between(item, move)]

    def fetch(message: Message) -> Tensor:
        move = moves[message.item]
        own = move.held[team.rank]
        assert own is not None
        return move.value.reshape(own.shape)[message.box.slices_in(own)]

    mine = [move.target[team.rank] for move in moves]
    out = [torch.zeros((0,) if box is None else box.shape, dtype=dtype, device=device) for box in mine]
    travels = any(message.source != message.target for message in messages)
    for message, tensor in Exchange(team, messages, travels, fetch, dtype, device).wait():
        box = mine[message.item]
        assert box is not None
        out[message.item][message.box.slices_in(box)] = tensor
    return out


def _between(item: int, move: Move) -> Iterator[Message]:
    holders = box_holders(tuple(box or EMPTY for box in move.held))
    for to, wanted in enumerate(move.target):
        for box, ranks in holders if wanted is not None else ():
            both = box.intersection(wanted) if wanted is not None else None
            if both is not None:
                yield Message(to if to in ranks else ranks[0], to, item, both)
