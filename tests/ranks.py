"""Models whose parameters are placed on a mesh, their gradients, and comparisons of the weights of two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

# ------------------------------------------------------------------------------------------------------------------- models


class Experts(nn.Module):
    """A stack of matrices."""

    def __init__(self, number: int, rows: int, cols: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(number, rows, cols) / cols**0.5)


class Zoo(nn.Module):
    """Every shape that ranks may cut badly: uneven rows, fewer rows than ranks, one row, vectors, experts, a convolution, tied weights,
    a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.wide = nn.Linear(10, 7)
        self.tall = nn.Linear(6, 11, bias=False)
        self.square = nn.Linear(8, 8, bias=False)
        self.twin = nn.Linear(8, 8, bias=False)
        self.short = nn.Linear(9, 2)
        self.row = nn.Linear(5, 1)
        self.conv = nn.Conv2d(3, 5, 2)
        self.experts = Experts(5, 4, 6)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(4, 4, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embedding.weight


class HeadByHead(nn.Module):
    """A fused attention weight in which the rows of q, k and v alternate: q, k and v of one head after another."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "gpt_neox", "num_attention_heads": 2}
        self.query_key_value = nn.Linear(8, 24)


class GateUpExperts(nn.Module):
    """A stack of experts, each with gate and up in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = False
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6) / 6**0.5)


class Conv1D(nn.Module):
    """A fused attention weight stored as (in, out), as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 12
        self.weight = nn.Parameter(torch.randn(4, 12) / 2)


class Fused(nn.Module):
    """Weights that are cut into parts, whose rows no mesh respects."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.lstm = nn.LSTM(5, 7)
        self.by_head = HeadByHead()
        self.experts = GateUpExperts()
        self.c_attn = Conv1D()


def make_fused(dtype: torch.dtype = torch.float64) -> Fused:
    """The same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return Fused().to(dtype)


def make_zoo(dtype: torch.dtype = torch.float64) -> Zoo:
    """The same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Zoo().to(dtype)


def gradient(name: str, shape: torch.Size, step: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a parameter at a step: of full rank, and the same on every rank."""
    generator = torch.Generator().manual_seed(hash_of(name) + step)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 2**31


@cache  # cached: a mesh of two dimensions makes process groups, and a pool's ranks live long
def mesh_of(kind: str, world: int) -> DeviceMesh | None:
    """`fsdp`, `tp`: one dimension; `hsdp`, `fsdp+tp`: two; `ddp`: none."""
    if kind == "ddp":
        return None
    sides = (world,) if kind in ("fsdp", "tp") else (2, world // 2)
    return init_device_mesh("cpu", sides)


def placements(kind: str, name: str, p: Tensor) -> tuple[Placement, ...]:
    """FSDP shards rows. Tensor parallelism shards columns and rows in turn, and copies vectors."""
    along = Shard(1) if p.dim() > 1 and hash_of(name) % 2 else Shard(0)
    parallel = along if p.dim() > 1 else Replicate()
    return {
        "fsdp": (Shard(0),),
        "tp": (parallel,),
        "hsdp": (Replicate(), Shard(0)),
        "fsdp+tp": (Shard(0), parallel),
    }[kind]


def place(model: nn.Module, kind: str, mesh: DeviceMesh | None) -> nn.Module:
    """Replace every parameter by a DTensor on the mesh. Tied parameters stay tied; `ddp` leaves all whole."""
    if mesh is None:
        return model
    moved: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in moved:
                where = placements(kind, f"{path}.{name}", p)
                placed = distribute_tensor(p.detach(), mesh, where, src_data_rank=None)  # the same weights are on every rank
                moved[id(p)] = nn.Parameter(placed, requires_grad=p.requires_grad)
            setattr(module, name, moved[id(p)])
    return model


def own_shard(whole: Tensor, like: DTensor) -> DTensor:
    """Shard a tensor that every rank holds whole, with the placements of `like`. Each rank keeps its shard and sends nothing."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@cache  # many presets use the same gradients, and an optimizer only reads them
def _gradient_of(
    name: str, shape: torch.Size, step: int, dtype: torch.dtype, layout: tuple[DeviceMesh, tuple[Placement, ...]] | None
) -> Tensor:
    whole = gradient(name, shape, step, dtype)
    return whole if layout is None else distribute_tensor(whole, *layout, src_data_rank=None)


def give(model: nn.Module, step: int, without: Callable[[str, int], bool] = lambda name, step: False) -> None:
    """Set every gradient, whole or as this rank's shard; parameters for which `without` is true get none. Calls share the tensors, so clone
    a gradient before you change it.
    """
    for name, p in model.named_parameters():
        if p.requires_grad:
            layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
            p.grad = None if without(name, step) else _gradient_of(name, p.shape, step, p.dtype, layout)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather every parameter; a collective."""
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in model.named_parameters()}


Weights = nn.Module | Mapping[str, Tensor]


def differences(one: Weights, other: Weights) -> Iterator[tuple[str, float]]:
    """The largest difference of each parameter from weights given whole, as a part of the largest weight.

    If `one` is sharded, each rank compares its own shard and sends nothing, so look at the answers of all ranks.
    """
    wanted = _named(other)
    for name, p in _named(one).items():
        whole, own = wanted[name].detach(), p.detach()
        if isinstance(own, DTensor):
            part, own = own_shard(whole, own).to_local(), own.to_local()
        else:
            part = whole
        gap = (part.double() - own.double()).abs().amax() if own.numel() else 0.0
        yield name, float(gap / whole.double().abs().max().clamp_min(1e-12))


def _named(weights: Weights) -> Mapping[str, Tensor]:
    return weights if isinstance(weights, Mapping) else dict(weights.named_parameters())
