"""A certificate: the same spec on one process and on several ranks, their weights, state and traffic compared.

`certify` starts ranks of gloo on this machine; `examine` is what each of them does, and what the ranks of a cluster do that torchrun has
started. Where a rank's shards lie and what it should hold and send is computed by `meshes`, which asks no process group; so a wrong
layout does not pass by agreeing with itself.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import SubspaceOptimizer, build, load_plugin, load_spec
from ..distributed.boxes import Box, whole
from ..distributed.meshes import BY_INPUTS, BY_OUTPUTS, Mesh, Placed, make_mesh, place
from .errors import LabError
from .measure import measured_bytes
from .model import make_model

# The largest difference, as a part of the way that a parameter has gone. float64: round-off, amplified by a rule that is
# discontinuous at most. bfloat16: neighbouring numbers are 1/256 apart, and a way of 20 steps is not many of them.
TOLERANCES = {"float64": 1e-6, "float32": 1e-2, "bfloat16": 0.25}
SEQUENCES, LENGTH = 4, 32  # for each rank, and tokens of one: more than a small model's width, or its gradients have no full rank


class CertificateError(LabError):
    """Ranks that did not come to the end."""


@dataclass(frozen=True)
class Trial:
    """What is run on one process and on all ranks."""

    spec: str  # a name, a path, or a spec in JSON
    mesh: str
    ranks: int
    shape: tuple[int, ...] | None = None
    model: str = "tiny"
    vocab: int | None = 256
    steps: int = 20
    dtype: str = "float64"
    train: bool = False
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    @property
    def grid(self) -> Mesh:
        return make_mesh(self.mesh, self.ranks, self.shape)

    def build(self, model: nn.Module) -> SubspaceOptimizer:
        return build(load_spec(self.spec, self.overrides), model)

    def make_model(self, device: torch.device) -> nn.Module:
        return make_model(self.model, vocab_size=self.vocab, seed=self.seed).to(device, getattr(torch, self.dtype))


@dataclass(frozen=True)
class Difference:
    """One parameter on any rank against that of one process."""

    name: str
    largest: float
    way: float  # the furthest that an entry has gone from where it began

    @property
    def part(self) -> float:
        return 0.0 if self.largest == 0 else self.largest / self.way if self.way else math.inf


@dataclass(frozen=True)
class RankBytes:
    """What one rank held in the end and sent in the first step, the cheapest and the dearest after it, against the plan.

    The first step takes every basis; later ones take some or none, and where only coordinates travel between refreshes that is cheaper.
    """

    rank: int
    held: int
    planned: int
    sent_first: int
    sent_least: int
    sent_most: int
    expected_first: int
    expected: int  # of a step without a refresh
    agreed: int  # of the sums and maxima over ranks, in the dearest step

    @property
    def holds(self) -> bool:
        later = sorted((self.expected, self.expected_first))
        between = later[0] <= self.sent_least <= self.sent_most <= later[1]
        return self.held == self.planned and self.sent_first == self.expected_first and between


@dataclass(frozen=True)
class Certificate:
    """What came of a trial."""

    trial: Trial
    spec_name: str
    device: str
    parameters: int
    full: tuple[str, ...]  # parameters whose rank is clamped to all there is: their complement was not put to the test
    one_process_bytes: int
    tolerance: float
    differences: tuple[Difference, ...]
    ranks: tuple[RankBytes, ...]

    @property
    def largest(self) -> Difference:
        return max(self.differences, key=lambda each: each.part)

    @property
    def weights_hold(self) -> bool:
        return all(each.part <= self.tolerance for each in self.differences)

    @property
    def bytes_hold(self) -> bool:
        return all(rank.holds for rank in self.ranks)

    @property
    def holds(self) -> bool:
        return self.weights_hold and self.bytes_hold

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "differences": [{**asdict(each), "part": each.part} for each in self.differences],
            "weights_hold": self.weights_hold,
            "bytes_hold": self.bytes_hold,
            "holds": self.holds,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Certificate:
        shape = data["trial"]["shape"]
        trial = Trial(**{**data["trial"], "shape": shape and tuple(shape), "plugins": tuple(data["trial"]["plugins"])})
        differences = tuple(Difference(each["name"], each["largest"], each["way"]) for each in data["differences"])
        fields = {key: data[key] for key in ("spec_name", "device", "parameters", "one_process_bytes", "tolerance")}
        fields["full"] = tuple(data["full"])
        return Certificate(trial=trial, differences=differences, ranks=tuple(RankBytes(**each) for each in data["ranks"]), **fields)


# ------------------------------------------------------------------------------------------------------------ on every rank


def examine(trial: Trial, device: torch.device) -> Certificate:
    """Run a trial on this rank, among all of the default process group, and on one process by rank 0. The same answer on all ranks."""
    import torch.distributed as dist

    for plugin in trial.plugins:
        load_plugin(Path(plugin))
    rank, mesh = dist.get_rank(), trial.grid
    torch.manual_seed(1 + rank)  # what hangs on a rank's own generator shows
    model = trial.make_model(device)
    named = dict(model.named_parameters())
    placed = place(trial.build(model).plan, mesh)
    if trial.train:
        _check_heads(model, trial)
    begun = [p.detach().clone() for p in named.values()]
    final, alone = _one_process(trial, device) if rank == 0 else ([torch.empty_like(p) for p in begun], 0)
    sharded, core = _distribute(model, mesh, device)
    optimizer = trial.build(sharded)
    traffic = [_step(trial, step, sharded, core, optimizer, placed) for step in range(trial.steps)]
    differences = []
    for number, name in enumerate(named):
        dist.broadcast(final[number], 0)
        differences.append(_difference(name, begun[number], final[number], placed.box(number, rank), list(core.parameters())[number]))
    sent, agreed = [moved for moved, _ in traffic], [summed for _, summed in traffic]
    later = sent[1:] or sent
    numbers = torch.zeros(mesh.ranks, 6, dtype=torch.int64, device=device)
    numbers[rank] = torch.tensor([measured_bytes(optimizer), sent[0], min(later), max(later), max(agreed), alone])
    dist.all_reduce(numbers)
    rows = numbers.tolist()
    first, between = placed.bytes_sent_at_refresh, placed.bytes_sent
    ranks = tuple(
        RankBytes(r, held, placed.bytes_held[r], one, least, most, first[r], between[r], summed)
        for r, (held, one, least, most, summed, _) in enumerate(rows)
    )
    return Certificate(
        trial=trial,
        spec_name=optimizer.spec.name,
        device=device.type,
        parameters=sum(p.numel() for p in begun),
        full=tuple(row.entry.name for row in placed.plan if any(_is_full(split) for _, split in row.splits)),
        one_process_bytes=rows[0][5],
        tolerance=TOLERANCES[trial.dtype],
        differences=tuple(differences),
        ranks=ranks,
    )


def _is_full(split: Any) -> bool:
    return bool(split.rank is not None and split.pipeline.complement and split.rank == min(split.rows.size, split.cols.size))


def _difference(name: str, begun: Tensor, final: Tensor, box: Box, p: Tensor) -> Difference:
    """The largest over all ranks, each of which compares what it holds: copies may have gone apart."""
    import torch.distributed as dist

    local = _local(p)
    gap = (local - final[box.within(whole(final.shape))]).abs().max() if local.numel() else local.new_zeros(())
    pair = torch.stack([gap.double(), (final - begun).abs().max().double()]).nan_to_num(nan=math.inf)
    dist.all_reduce(pair, dist.ReduceOp.MAX)
    return Difference(name, *pair.tolist())


def _one_process(trial: Trial, device: torch.device) -> tuple[list[Tensor], int]:
    """The weights in the end, and the state that one process holds."""
    model = trial.make_model(device)
    optimizer = trial.build(model)
    for step in range(trial.steps):
        if trial.train:
            _backward(model, _tokens(trial, step, model, device))
        else:
            for number, p in enumerate(model.parameters()):
                p.grad = _gradient(trial, step, number, p.shape).to(p)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], measured_bytes(optimizer)


def _distribute(model: nn.Module, mesh: Mesh, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The model as a user lays it out on a mesh: what the optimizer is built for, and the module whose parameters they are."""
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


def _step(trial: Trial, step: int, model: nn.Module, core: nn.Module, optimizer: SubspaceOptimizer, placed: Placed) -> tuple[int, int]:
    """One update. Returns the bytes that this rank sent to others, and those that it gave into sums and maxima."""
    import torch.distributed as dist

    rank = dist.get_rank()
    if trial.train:
        _backward(model, _own_tokens(_tokens(trial, step, core, _local(next(core.parameters())).device), placed.mesh, rank))
    else:
        for number, p in enumerate(core.parameters()):
            p.grad = _shard_like(p, _gradient(trial, step, number, p.shape)[placed.box(number, rank).within(whole(p.shape))])
    with counted() as traffic:
        optimizer.step()
    optimizer.zero_grad()
    return traffic.moved, traffic.agreed


def _local(p: Tensor) -> Tensor:
    """This rank's shard of a parameter."""
    from torch.distributed.tensor import DTensor

    return p.to_local().detach() if isinstance(p, DTensor) else p.detach()


def _shard_like(p: Tensor, local: Tensor) -> Tensor:
    """This rank's part of a gradient, as a tensor of the parameter's own kind."""
    from torch.distributed.tensor import DTensor

    local = local.to(p.device, p.dtype).contiguous()
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(local.reshape(p.to_local().shape), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


# --------------------------------------------------------------------------------------------------- gradients and tokens


def _gradient(trial: Trial, step: int, number: int, shape: Sequence[int]) -> Tensor:
    """A gradient of full rank that hangs on the trial, the step and the parameter alone: the same bits on every rank.

    A model's own gradients differ in their last digits between layouts, and a rule that is discontinuous (signs, the choice of columns)
    makes more of that; with these, what differs in the end is the optimizer's doing.
    """
    generator = torch.Generator().manual_seed(((trial.seed * 100_003 + step) * 100_003 + number) % 2**63)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def _tokens(trial: Trial, step: int, model: nn.Module, device: torch.device) -> Tensor:
    """Sequences for all ranks, of uniformly drawn tokens."""
    generator = torch.Generator().manual_seed(trial.seed * 100_003 + step)
    vocabulary = int(getattr(model, "config").vocab_size)  # noqa: B009  a module's attributes are of no known type
    return torch.randint(vocabulary, (trial.ranks * SEQUENCES, LENGTH + 1), generator=generator).to(device)


def _own_tokens(tokens: Tensor, mesh: Mesh, rank: int) -> Tensor:
    """The sequences of one rank: those that share a layer by tensor parallelism take the same."""
    if mesh.kind == "tp":
        return tokens
    readers = mesh.shape[0] if mesh.kind == "fsdp+tp" else mesh.ranks
    at = mesh.place(rank, (0,)) if mesh.kind == "fsdp+tp" else rank
    return tokens.chunk(readers)[at]


def _backward(model: nn.Module, tokens: Tensor) -> None:
    logits = model(tokens[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def _check_heads(model: nn.Module, trial: Trial) -> None:
    """A forward pass cut by tensor parallelism needs whole heads on every rank."""
    if trial.mesh not in ("tp", "fsdp+tp"):
        return
    config, ranks = model.config, trial.grid.shape[-1]
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    if any(number is not None and number % ranks for number in heads):
        raise LabError(
            f"model: {trial.model} has {heads[0]} heads (keys: {heads[1]}), which tensor parallelism over {ranks} ranks does not divide; "
            "take another --model or --shape, or leave out --train, which alone needs a forward pass"
        )


# ----------------------------------------------------------------------------------------------------------------- traffic


@dataclass
class Traffic:
    """Bytes of one step."""

    moved: int = 0  # to other ranks, by all-to-all
    agreed: int = 0  # handed to sums and maxima over ranks


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this rank hands to all-to-alls and all-reduces, what it keeps for itself left out."""
    import torch.distributed as dist

    traffic = Traffic()
    distributed: Any = dist
    exchange, reduce = distributed.all_to_all_single, distributed.all_reduce

    def count_exchange(output: Tensor, given: Tensor, outputs: Any = None, inputs: Any = None, group: Any = None, **rest: Any) -> Any:
        world = dist.get_world_size(group)
        split = list(inputs) if inputs is not None else [given.size(0) // world] * world
        mine = split[dist.get_rank(group)]
        entries = given.numel() // given.size(0) if given.size(0) else 0
        traffic.moved += (sum(split) - mine) * entries * given.element_size()
        return exchange(output, given, outputs, inputs, group=group, **rest)

    def count_reduce(tensor: Tensor, *given: Any, **rest: Any) -> Any:
        traffic.agreed += tensor.numel() * tensor.element_size()
        return reduce(tensor, *given, **rest)

    distributed.all_to_all_single, distributed.all_reduce = count_exchange, count_reduce
    try:
        yield traffic
    finally:
        distributed.all_to_all_single, distributed.all_reduce = exchange, reduce


# -------------------------------------------------------------------------------------------------------- ranks on this machine


def certify(trials: Sequence[Trial], *, time_limit: float = 600.0, prepare: Callable[[int], None] | None = None) -> list[Certificate]:
    """Run trials, one after the other, on ranks of gloo that are started here, one thread each.

    Args:
        trials: All of one number of ranks.
        time_limit: Seconds for all of them.
        prepare: What every rank calls first, with its number; a function at the top of a module.

    Raises:
        CertificateError: a rank that failed or was killed, with its traceback; ranks that were not done in time, with where they stood.
    """
    (number,) = {trial.ranks for trial in trials}
    with tempfile.TemporaryDirectory() as folder:
        port, context = _free_port(), torch.multiprocessing.get_context("spawn")
        given = (tuple(trials), port, time_limit, folder, prepare)
        ranks = [context.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(number)]
        for process in ranks:
            process.start()
        try:
            late = _wait(ranks, time.monotonic() + time_limit)
            left = [process.exitcode for process in ranks]  # on their own
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        _check_ended(left, late, Path(folder), time_limit)
        return [Certificate.from_dict(each) for each in json.loads((Path(folder) / "certificates.json").read_text(encoding="utf-8"))]


def _wait(ranks: Sequence[Any], deadline: float) -> list[int]:
    """Wait for all, or until one has failed and the others have had a moment to say so too. Returns who was late."""
    while any(process.is_alive() for process in ranks):
        if time.monotonic() > deadline:
            late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            for rank in late:
                if hasattr(signal, "SIGUSR1"):
                    os.kill(ranks[rank].pid, signal.SIGUSR1)  # has it write down where it stands
            time.sleep(0.5)
            return late
        if any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(0.5)
            return []
        ranks[0].join(0.05)
        time.sleep(0.02)
    return []


def _check_ended(left: Sequence[int | None], late: Sequence[int], folder: Path, time_limit: float) -> None:
    found = {rank: file.read_text(encoding="utf-8") for rank in range(len(left)) if (file := folder / f"{rank}.error").exists()}
    killed = [] if late else [(rank, -code) for rank, code in enumerate(left) if code is not None and code < 0]
    first = min(found, key=lambda rank: (folder / f"{rank}.error").stat().st_mtime_ns, default=None)
    if killed:  # whoever else failed has lost a peer
        raise CertificateError(f"rank {killed[0][0]} was killed by signal {killed[0][1]}; 9 is mostly the kernel's, for want of memory")
    if first is not None:
        raise CertificateError(f"rank {first} failed\n{found[first].rstrip()}")
    if late:
        told = "\n".join(f"rank {rank} {_stand(folder / f'{rank}.trace')}" for rank in late)
        raise CertificateError(f"not done after {time_limit:g} seconds (--time-limit): ranks {', '.join(map(str, late))}\n{told}")
    if bad := [(rank, code) for rank, code in enumerate(left) if code]:
        raise CertificateError(f"rank {bad[0][0]} left with status {bad[0][1]} and said nothing")


def _stand(trace: Path) -> str:
    text = trace.read_text(encoding="utf-8").rstrip() if trace.exists() else ""
    return f"stood at\n{text}" if text else "had not begun"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def _rank(rank: int, trials: Sequence[Trial], port: int, time_limit: float, folder: str, prepare: Callable[[int], None] | None) -> None:
    """The life of a rank that `certify` starts."""
    import torch.distributed as dist

    with (Path(folder) / f"{rank}.trace").open("w") as trace:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=trace, all_threads=False)
        torch.set_num_threads(1)
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # libraries greet on stdout, where the answer goes
            os.dup2(nowhere.fileno(), 2)
        try:
            if prepare is not None:
                prepare(rank)
            late = timedelta(seconds=time_limit + 60)  # `certify` ends it before, and tells where all ranks stand
            store = dist.TCPStore("127.0.0.1", port, trials[0].ranks, rank == 0, late)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=trials[0].ranks, timeout=late)
            certificates = [examine(trial, torch.device("cpu")).to_dict() for trial in trials]
            if rank == 0:
                (Path(folder) / "certificates.json").write_text(json.dumps(certificates), encoding="utf-8")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            file = Path(folder) / f"{rank}.error"
            file.with_suffix(".part").write_text(traceback.format_exc(), encoding="utf-8")
            file.with_suffix(".part").rename(file)
            os._exit(1)  # without waiting for peers that will not come


# ------------------------------------------------------------------------------------------------------------ ranks of torchrun


def given_ranks() -> int | None:
    """How many ranks torchrun has started; None outside it."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None


def certify_here(trial: Trial, *, time_limit: float = 600.0) -> Certificate:
    """Run a trial on the ranks that torchrun has started, of which this process is one; on CUDA devices where there are any."""
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    late, on_cuda = timedelta(seconds=time_limit), device.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=late, device_id=device if on_cuda else None)
    try:
        return examine(trial, device)
    except Exception:
        print(f"rank {dist.get_rank()} failed", file=sys.stderr)
        raise
    finally:
        with suppress(Exception):  # of a group that is broken already, which is not what went wrong
            dist.destroy_process_group()
