"""Several ranks of gloo on this machine, for tests: start, time limit, results; and models whose parameters lie on a mesh."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from launch import context
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

LIMIT = 240  # seconds until ranks that do not come back are stopped


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks of a process group.

    Raises:
        AssertionError: a rank failed, with its traceback, or did not end in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, world, port, folder, function, arguments), daemon=True) for rank in range(world)]
        for process in ranks:
            process.start()
        ends = time.monotonic() + LIMIT
        while any(process.is_alive() for process in ranks) and time.monotonic() < ends and not list(Path(folder).glob("*.error")):
            time.sleep(0.05)
        for process in ranks:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        errors = [file.read_text() for file in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert all(process.exitcode == 0 for process in ranks), [process.exitcode for process in ranks]
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world)]


def _rank(rank: int, world: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)  # nothing may depend on the global generator
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(function(*arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise


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


def make_zoo(dtype: torch.dtype = torch.float64) -> Zoo:
    """The same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Zoo().to(dtype)


def gradient(name: str, shape: torch.Size, step: int, dtype: torch.dtype) -> Tensor:
    """The gradient that every run is given: full rank, the same wherever it is made."""
    generator = torch.Generator().manual_seed(hash_of(name) + step)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 2**31


def mesh_of(kind: str, world: int) -> DeviceMesh | None:
    """`fsdp`, `tp`: one dimension; `hsdp`, `fsdp+tp`: two; `ddp`: none."""
    if kind == "ddp":
        return None
    sides = (world,) if kind in ("fsdp", "tp") else (2, world // 2)
    return init_device_mesh("cpu", sides)


def placements(kind: str, name: str, p: Tensor) -> tuple[Placement, ...]:
    """Rows for FSDP; columns or rows in turn for tensor parallel, vectors copied."""
    along = Shard(1) if p.dim() > 1 and hash_of(name) % 2 else Shard(0)
    parallel = along if p.dim() > 1 else Replicate()
    return {
        "fsdp": (Shard(0),),
        "tp": (parallel,),
        "hsdp": (Replicate(), Shard(0)),
        "fsdp+tp": (Shard(0), parallel),
    }[kind]


def place(model: nn.Module, kind: str, mesh: DeviceMesh | None) -> nn.Module:
    """Every parameter as a DTensor on the mesh; tied ones stay tied. `ddp` leaves them whole."""
    if mesh is None:
        return model
    moved: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in moved:
                where = placements(kind, f"{path}.{name}", p)
                placed = distribute_tensor(p.detach(), mesh, where)
                moved[id(p)] = nn.Parameter(placed, requires_grad=p.requires_grad)
            setattr(module, name, moved[id(p)])
    return model


def give(model: nn.Module, step: int, without: Callable[[str, int], bool] = lambda name, step: False) -> None:
    """Set every gradient, whole or as this rank's shard; `without` says where there is none."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if without(name, step):
            p.grad = None
            continue
        whole = gradient(name, p.shape, step, p.dtype)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter gathered; a collective."""
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in model.named_parameters()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    """The largest difference of each parameter, as a part of its largest entry."""
    for name, a in one.items():
        yield name, float((a.double() - other[name].double()).abs().max() / a.double().abs().max().clamp_min(1e-12))
