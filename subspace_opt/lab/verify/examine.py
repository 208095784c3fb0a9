"""A trial on every rank: train, count, and compare with one process.

`subspace_opt.distributed.meshes` computes, without a process group, which shards a rank should hold and how many bytes it should keep and
send. Shards, bytes and traffic of the optimizer are therefore compared with figures that do not come from the optimizer itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import SubspaceOptimizer, load_plugin
from ...distributed.boxes import Box, full_box
from ...distributed.meshes import BY_INPUTS, BY_OUTPUTS, Mesh, PlacedPlan, place
from ..run.measure import measured_bytes
from .certificate import TOLERANCES, Certificate, Difference, RankBytes
from .traffic import Traffic, count_traffic
from .trial import Trial, check_heads, make_gradient, make_tokens, run_backward, tokens_of_rank


def examine(trial: Trial, device: torch.device) -> Certificate:
    """Run a trial on all ranks of the default process group, and on one process in rank 0. Every rank returns the same certificate."""
    import torch.distributed as dist

    for plugin in trial.plugins:
        load_plugin(Path(plugin))
    rank = dist.get_rank()
    torch.manual_seed(1 + rank)  # ranks differ in their global generators, so that a draw from one shows as a difference
    model = trial.make_model(device)
    names = [name for name, _ in model.named_parameters()]
    placed = place(trial.build(model).plan, trial.grid)
    if trial.train:
        check_heads(model, trial)
    begun = [p.detach().clone() for p in model.parameters()]
    final, alone = _run_one_process(trial, device) if rank == 0 else ([torch.empty_like(p) for p in begun], 0)
    sharded, core = _distribute(model, placed.mesh, device)
    optimizer = trial.build(sharded)
    traffic = [_step(trial, step, sharded, core, optimizer, placed) for step in range(trial.steps)]
    differences = []
    for number, (name, p) in enumerate(zip(names, core.parameters(), strict=True)):
        dist.broadcast(final[number], 0)
        differences.append(_difference(name, begun[number], final[number], placed.box(number, rank), p))
    ranks, one_process_bytes = _gather_bytes(optimizer, placed, traffic, alone, device)
    return Certificate(
        trial=trial,
        spec_name=optimizer.spec.name,
        device=device.type,
        parameters=sum(p.numel() for p in begun),
        full=tuple(row.entry.name for row in placed.plan if any(_has_full_rank(frame) for _, frame in row.splits)),
        one_process_bytes=one_process_bytes,
        tolerance=TOLERANCES[trial.dtype],
        differences=tuple(differences),
        ranks=ranks,
    )


def _has_full_rank(frame: Any) -> bool:
    return bool(frame.rank is not None and frame.pipeline.complement and frame.rank == min(frame.rows.size, frame.cols.size))


def _gather_bytes(
    optimizer: SubspaceOptimizer, placed: PlacedPlan, traffic: Sequence[Traffic], alone: int, device: torch.device
) -> tuple[tuple[RankBytes, ...], int]:
    """The bytes of every rank, and the state that one process holds (`alone` on rank 0)."""
    import torch.distributed as dist

    sent = [step.moved for step in traffic]
    later = sent[1:] or sent
    numbers = torch.zeros(placed.mesh.ranks, 6, dtype=torch.int64, device=device)
    most_agreed = max(step.agreed for step in traffic)
    numbers[dist.get_rank()] = torch.tensor([measured_bytes(optimizer), sent[0], min(later), max(later), most_agreed, alone])
    dist.all_reduce(numbers)
    rows = numbers.tolist()
    first, between = placed.bytes_sent_at_refresh, placed.bytes_sent
    ranks = tuple(
        RankBytes(r, held, placed.bytes_held[r], one, least, most, first[r], between[r], agreed)
        for r, (held, one, least, most, agreed, _) in enumerate(rows)
    )
    return ranks, rows[0][5]


def _difference(name: str, begun: Tensor, final: Tensor, box: Box, p: Tensor) -> Difference:
    """The largest difference on any rank. Every rank compares its own shard, since replicas of a shard may differ."""
    import torch.distributed as dist

    local = _local(p)
    gap = (local - final[box.slices_in(full_box(final.shape))]).abs().max() if local.numel() else local.new_zeros(())
    pair = torch.stack([gap.double(), (final - begun).abs().max().double()]).nan_to_num(nan=math.inf)
    dist.all_reduce(pair, dist.ReduceOp.MAX)
    return Difference(name, *pair.tolist())


def _run_one_process(trial: Trial, device: torch.device) -> tuple[list[Tensor], int]:
    """The weights after all steps, and the bytes of state."""
    model = trial.make_model(device)
    optimizer = trial.build(model)
    for step in range(trial.steps):
        if trial.train:
            run_backward(model, make_tokens(trial, step, model, device))
        else:
            for number, p in enumerate(model.parameters()):
                p.grad = make_gradient(trial, step, number, p.shape).to(p)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], measured_bytes(optimizer)


def _distribute(model: nn.Module, mesh: Mesh, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Shard the model as a user would. Returns the module to build the optimizer for, and the module that owns the parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if mesh.kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return wrapped, wrapped.module
    names = {"fsdp": ("shard",), "hsdp": ("copies", "shard"), "tp": ("tensor",), "fsdp+tp": ("shard", "tensor")}[mesh.kind]
    devices = init_device_mesh(device.type, mesh.shape, mesh_dim_names=names)
    if "tensor" in names:
        styles = {path: path.rpartition(".")[2] for path, _ in model.named_modules()}
        parallelize_module(
            model,
            devices["tensor"],
            {path: ColwiseParallel() for path, last in styles.items() if last in BY_OUTPUTS}
            | {path: RowwiseParallel() for path, last in styles.items() if last in BY_INPUTS},
        )
    if "shard" in names:
        over = devices["shard"] if mesh.kind == "fsdp+tp" else devices
        for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over)
    return model, model


def _step(trial: Trial, step: int, model: nn.Module, core: nn.Module, optimizer: SubspaceOptimizer, placed: PlacedPlan) -> Traffic:
    """Make one update. Returns the bytes that this rank handed to collectives."""
    import torch.distributed as dist

    rank = dist.get_rank()
    if trial.train:
        tokens = make_tokens(trial, step, core, _local(next(core.parameters())).device)
        run_backward(model, tokens_of_rank(tokens, placed.mesh, rank))
    else:
        for number, p in enumerate(core.parameters()):
            grad = make_gradient(trial, step, number, p.shape)
            p.grad = _shard_like(p, grad[placed.box(number, rank).slices_in(full_box(p.shape))])
    with count_traffic() as traffic:
        optimizer.step()
    optimizer.zero_grad()
    return traffic


def _local(p: Tensor) -> Tensor:
    """This rank's shard of a parameter."""
    from torch.distributed.tensor import DTensor

    return p.to_local().detach() if isinstance(p, DTensor) else p.detach()


def _shard_like(p: Tensor, local: Tensor) -> Tensor:
    """This rank's shard of a gradient as a DTensor if the parameter is one, else as an ordinary tensor."""
    from torch.distributed.tensor import DTensor

    local = local.to(p.device, p.dtype).contiguous()
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(local.reshape(p.to_local().shape), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
