"""Checkpoints of sharded parameters, saved on one number of ranks and loaded on another. The same number of ranks gives the same bits."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pool import run_ranks
from ranks import differences, give, make_zoo, mesh_of, own_shard, place, whole_weights
from test_sharding import alone, build
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import subspace_opt
from subspace_opt.distributed import checkpoint

Ends = dict[str, dict[str, torch.Tensor]]  # by preset: the weights that one process ends with

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def steps(model: nn.Module, optimizer: subspace_opt.SubspaceOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give(model, step)
        optimizer.step()


def made(preset: str, kind: str | None, dtype: torch.dtype) -> tuple[nn.Module, subspace_opt.SubspaceOptimizer]:
    model = make_zoo(dtype)
    if kind is not None:
        place(model, kind, mesh_of(kind, dist.get_world_size()))
    return model, build(preset, model, kind)


def set_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            whole = weights[name]
            p.copy_(own_shard(whole, p) if isinstance(p, DTensor) else whole)


# ---------------------------------------------------------------------------------------------------- to the bit, on the same ranks


CUTS = (1, 3, 4, 5, 8)  # bases are refreshed every fourth update


def cut_points(kind: str, presets: list[str], dtype: torch.dtype) -> list[str]:
    """The weights and state tensors in which a resumed run differs by a bit from a run without a cut: this rank's parts of them."""
    wrong = []
    for preset in presets:
        model, optimizer = made(preset, kind, dtype)
        saved, held = {}, {}
        for step in range(1, 10):
            steps(model, optimizer, step - 1, step)
            if step in CUTS:
                saved[step] = _copied(optimizer.state_dict())
            held[step] = _held(model, optimizer)
        other, resumed = made(preset, kind, dtype)  # every cut after the first is loaded over other state
        weights = dict(other.named_parameters())
        for cut in CUTS:
            torch.manual_seed(cut + dist.get_rank())
            with torch.no_grad():
                for name, p in weights.items():
                    _own(p).copy_(held[cut][name])
            resumed.load_state_dict(saved[cut])
            end = 9 if cut == 1 else min(cut + 2, 9)  # then all weights and all state are compared: equal ones continue equally
            steps(other, resumed, cut, end)
            found = _held(other, resumed)
            assert found.keys() == held[end].keys()
            wrong += [f"{preset} cut at {cut}: {name}" for name, value in found.items() if not torch.equal(value, held[end][name])]
    return wrong


def _held(model: nn.Module, optimizer: subspace_opt.SubspaceOptimizer) -> dict[str, torch.Tensor]:
    """A copy of this rank's shards of the weights, and of the state that it keeps. Only owners count refreshes."""
    names = {p: name for name, p in model.named_parameters()}
    owned = {key for key, (group, sharding) in optimizer._shardings().items() if sharding.part_of(group.rank) is not None}
    state = {
        f"{names[p]}: {key}": value.clone()
        for p, slots in optimizer.state.items()
        for key, value in slots.items()
        if key != "refreshed" or id(p) in owned
    }
    return {**_own_weights(model), **state}


def _own(value: torch.Tensor) -> torch.Tensor:
    """This rank's shard, which shares its storage with the tensor."""
    return value.detach().to_local() if isinstance(value, DTensor) else value.detach()


def _own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: _own(p).clone() for name, p in model.named_parameters()}


def _copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy, because the optimizer keeps writing to its own tensors."""
    state = {
        i: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in slots.items()}
        for i, slots in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("fsdp", torch.float32), ("fsdp", torch.bfloat16), ("ddp", torch.bfloat16), ("tp", torch.float32)], ids=str
)
def test_a_resumed_run_is_the_same_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    presets = ["cosmos", "muon", "galore", "soap", "adamw", "frugal", "trion", "golore"]
    assert run_ranks(2, cut_points, kind, presets, dtype) == [[]] * 2


def exchanges(kind: str, preset: str, dtype: torch.dtype, limit: int) -> tuple[list[str], int, dict[str, list[int]]]:
    """Slots that differ by a bit after they were saved and loaded, the number of slots, and the bytes of each exchange of this rank."""
    model = place(make_zoo(dtype), kind, mesh_of(kind, dist.get_world_size()))
    optimizer = build(preset, model, kind, rounding="kahan" if dtype == torch.bfloat16 else "nearest")
    steps(model, optimizer, 0, 4)
    before = {(p, key): value.clone() for p, slots in optimizer.state.items() for key, value in slots.items()}
    sent: dict[str, list[int]] = {"save": [], "load": [], "reductions": []}
    all_to_all, all_reduce = dist.all_to_all_single, dist.all_reduce
    doing = "save"

    def counted(to: torch.Tensor, own: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        sent[doing].append(to.numel() + own.numel())
        return all_to_all(to, own, *arguments, **named)

    def reduced(value: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        sent["reductions"].append(value.numel())
        return all_reduce(value, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "BUCKET_BYTES", limit)
        patch.setattr(dist, "all_to_all_single", counted)
        patch.setattr(dist, "all_reduce", reduced)
        saved = optimizer.state_dict()
        doing = "load"
        optimizer.load_state_dict(saved)
    wrong = [str(key) for (p, key), value in before.items() if key != "refreshed" and not torch.equal(value, optimizer.state[p][key])]
    return wrong, len(before), sent


@pytest.mark.slow
def test_state_travels_in_one_exchange_a_dtype() -> None:
    for kind, preset, dtype, dtypes in (
        ("fsdp", "cosmos", torch.float32, 1),
        ("ddp", "soap", torch.float32, 1),
        ("tp", "muon", torch.bfloat16, 1),  # Kahan's compensation stays with the shards
        ("fsdp", "subspace-momentum", torch.float32, 2),  # momenta and indices
    ):
        for wrong, _, sent in run_ranks(2, exchanges, kind, preset, dtype, checkpoint.BUCKET_BYTES):
            assert wrong == []
            assert (len(sent["save"]), len(sent["load"])) == (dtypes, dtypes)
            assert len(sent["reductions"]) <= 1


@pytest.mark.slow
def test_an_exchange_of_state_is_bounded() -> None:
    for wrong, slots, sent in run_ranks(2, exchanges, "fsdp", "soap", torch.float32, 600):
        assert wrong == []
        for sizes in (sent["save"], sent["load"]):
            assert 5 < len(sizes) < slots
            assert max(sizes) <= 2 * 13 * 13 * 4  # the largest slot alone: the factor of 13 rows, which leaves and arrives
    for wrong, _, sent in run_ranks(2, exchanges, "fsdp", "soap", torch.float32, 1500):
        assert wrong == []
        assert max(sent["save"] + sent["load"]) <= 1500


# ------------------------------------------------------------------------------------------------- from any number of ranks to any other


def save(folder: str, kind: str | None, presets: list[str], flat: bool) -> None:
    for preset in presets:
        model, optimizer = made(preset, kind, torch.float64)
        steps(model, optimizer, 0, 5)
        options = FLAT if flat else StateDictOptions()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = get_optimizer_state_dict(model, optimizer, options=options)
            dcp.save({"optimizer": state, "weights": whole_weights(model)}, checkpoint_id=f"{folder}/{preset}")


def load(folder: str, kind: str | None, ends: Ends, flat: bool) -> list[str]:
    """The weights that differ from those of one process after five more steps."""
    wrong = []
    for preset, end in ends.items():
        model, optimizer = made(preset, kind, torch.float64)
        options = FLAT if flat else StateDictOptions()
        before = _own_weights(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch makes the state of a fresh optimizer by a step of zero gradients
            state = get_optimizer_state_dict(model, optimizer, options=options)
            wrong += [f"{preset}: {name} moved" for name, w in _own_weights(model).items() if not torch.equal(w, before[name])]
            weights = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
            dcp.load({"optimizer": state, "weights": weights}, checkpoint_id=f"{folder}/{preset}")
            set_optimizer_state_dict(model, optimizer, state, options=options)
        set_weights(model, weights)
        steps(model, optimizer, 5, 10)
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in differences(model, end) if not gap < 1e-9]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(("flat", "before", "after"), [(True, "fsdp", "fsdp"), (False, "fsdp", "fsdp"), (True, "tp", "fsdp+tp")])
def test_saved_on_four_ranks_and_loaded_on_others(tmp_path: Path, flat: bool, before: str, after: str) -> None:
    presets = ["cosmos", "muon", "galore", "soap", "adamw", "sumo"] if flat and before == after else ["cosmos", "galore", "adamw"]
    run_ranks(4, save, str(tmp_path), before, presets, flat)
    for world in (2, 1, 3) if before == after else (4,):
        assert run_ranks(world, load, str(tmp_path), after, {preset: alone(preset, 10) for preset in presets}, flat) == [[]] * world


@pytest.mark.slow
def test_saved_on_one_process_and_loaded_on_several_and_back(tmp_path: Path) -> None:
    presets = ["cosmos", "galore", "adamw"]
    for before, after, world in ((None, "fsdp", 1), ("ddp", "fsdp", 2), ("fsdp", "ddp", 2)):
        folder = tmp_path / f"{before}-{after}"
        run_ranks(world, save, str(folder), before, presets, True)
        assert run_ranks(2, load, str(folder), after, {preset: alone(preset, 10) for preset in presets}, True) == [[]] * 2


def full_state(ends: Ends) -> list[str]:
    """A full state dictionary, gathered on every rank, loads into an optimizer of ordinary parameters, and back."""
    wrong = []
    options = StateDictOptions(full_state_dict=True)
    for preset, end in ends.items():
        model, optimizer = made(preset, "fsdp", torch.float64)
        steps(model, optimizer, 0, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            full = get_optimizer_state_dict(model, optimizer, options=options)
        weights = whole_weights(model)
        for kind in (None, "fsdp"):
            other, resumed = made(preset, kind, torch.float64)
            set_weights(other, weights)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                set_optimizer_state_dict(other, resumed, full, options=options)
            steps(other, resumed, 5, 8)
            wrong += [f"{preset} to {kind}: {name} differs by {gap:.1e}" for name, gap in differences(other, end) if not gap < 1e-9]
    return wrong


@pytest.mark.slow
def test_a_full_state_dictionary_goes_anywhere() -> None:
    assert run_ranks(2, full_state, {preset: alone(preset, 8) for preset in ("cosmos", "muon", "galore", "soap", "adamw")}) == [[]] * 2


# ------------------------------------------------------------------------------------------------------------ training with wrappers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 22), nn.Linear(22, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Small(nn.Module):
    """A model with the layers that FSDP2 and tensor parallelism shard."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks, self.head = nn.Embedding(31, 12), nn.ModuleList(Block() for _ in range(2)), nn.Linear(12, 31)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def wrapped(kind: str) -> nn.Module:
    """Wrap the model as users do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model: nn.Module = small()
    world = dist.get_world_size()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    elif kind in ("tp", "fsdp+tp"):
        sides = (world,) if kind == "tp" else (2, world // 2)
        mesh = init_device_mesh("cpu", sides, mesh_dim_names=("tp",) if kind == "tp" else ("dp", "tp"))
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind == "tp":
            return model
        mesh = mesh["dp"]
    else:
        mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of eight steps."""
    draws = torch.Generator().manual_seed(5)
    x, y = (torch.randint(0, 31, (8, 8, 6), generator=draws) for _ in range(2))
    return x, y


def learned(model: nn.Module, preset: str) -> nn.Module:
    """The model after eight steps with real gradients, as users write them."""
    optimizer = subspace_opt.build(preset, model, lr=1e-3, overrides={"matrix.selector.rank": 3} if preset == "cosmos" else {})
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 6)
    for x, y in zip(*tokens(), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        schedule.step()
    return model


def small() -> Small:
    """The same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Small().double()


@cache
def learned_alone(preset: str) -> dict[str, torch.Tensor]:
    return whole_weights(learned(small(), preset))


def train(kind: str, ends: Ends) -> list[str]:
    """The weights that differ from those of one process after training through the wrapper's hooks."""
    warnings.simplefilter("ignore")
    wrong = []
    for preset, end in ends.items():
        model = learned(wrapped(kind), preset)
        gaps = differences(model.module if kind == "ddp" else model, end)
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in gaps if not gap < 1e-9]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("ddp", 2), ("tp", 2), ("fsdp+tp", 4)])
def test_training_as_users_write_it(kind: str, world: int) -> None:
    ends = {preset: learned_alone(preset) for preset in ("cosmos", "muon", "galore", "adamw", "trion")}
    assert run_ranks(world, train, kind, ends) == [[]] * world


@cache
def stepped_alone(preset: str) -> dict[str, torch.Tensor]:
    """The weights after the ordinary optimizer's steps on one process."""
    model = small()
    optimizer = subspace_opt.build(preset, model, lr=1e-3)
    for x, y in zip(*tokens(), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    return whole_weights(model)


def backward_steps(kind: str, ends: Ends) -> list[str]:
    """Compare updates during `backward()` on ranks with the ordinary optimizer on one process."""
    warnings.simplefilter("ignore")
    wrong = []
    for preset, end in ends.items():
        model = wrapped(kind)
        optimizer = subspace_opt.step_in_backward(model, preset, lr=1e-3)
        for x, y in zip(*tokens(), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in differences(model, end) if not gap < 1e-9]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_updates_in_backward_of_shards(kind: str) -> None:
    ends = {preset: stepped_alone(preset) for preset in ("muon", "galore", "adamw")}
    assert run_ranks(2, backward_steps, kind, ends) == [[]] * 2


def few_bits(kind: str) -> list[str]:
    """State in 8 bits and in bfloat16 on ranks is close to that of one process, resumes to the bit, and has the planned bytes."""
    from subspace_opt.lab.run.measure import measured_bytes

    mesh = mesh_of(kind, dist.get_world_size())
    wrong = []
    for preset, dtypes in (
        ("muon", {"exp_avg": "8bit"}),
        ("adamw", {"exp_avg": "bf16", "exp_avg_sq": "8bit"}),
        ("galore", {"exp_avg_sq": "4bit"}),
    ):
        runs = []
        for where in (None, mesh):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 256, bias=False))
            if where is not None:
                place(model, kind, where)
            optimizer = subspace_opt.build(preset, model, lr=1e-3, state_dtype=dtypes)
            steps(model, optimizer, 0, 6)
            runs.append((model, optimizer))
        (alone, _), (model, optimizer) = runs
        gaps = differences(model, alone)
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in gaps if not gap < 3e-3]
        planned = sum(sharding.bytes_held(group.rank) for group, sharding in optimizer._shardings().values())
        if planned != measured_bytes(optimizer):
            wrong.append(f"{preset}: {planned} bytes planned, {measured_bytes(optimizer)} held")
        saved, weights = _copied(optimizer.state_dict()), whole_weights(model)
        steps(model, optimizer, 6, 9)
        end = whole_weights(model)
        set_weights(model, weights)
        optimizer.load_state_dict(saved)
        steps(model, optimizer, 6, 9)
        wrong += [f"{preset} resumed: {name}" for name, w in whole_weights(model).items() if not torch.equal(w, end[name])]
    return wrong


@pytest.mark.slow
def test_state_in_few_bits_on_ranks() -> None:
    assert run_ranks(2, few_bits, "fsdp") == [[]] * 2


def loads_what_rank_0_saved(folder: str) -> str:
    """The message of the error that a rank gets; rank 0 does not load, because it would wait for the others."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)))
    optimizer = subspace_opt.build("cosmos", model, overrides={"matrix.selector.rank": 3}, roles={"1.weight": "hidden"})
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    for slots in state["state"].values():
        assert all(value.detach().shape == value.shape for value in slots.values())  # fills DTensor's cache of meshes
    if dist.get_rank() == 0:
        torch.save(state, f"{folder}/optimizer.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        return ""
    with pytest.raises(ValueError, match="holds the shard of another rank") as error:
        optimizer.load_state_dict(torch.load(f"{folder}/optimizer.pt", weights_only=True))
    return str(error.value)


@pytest.mark.slow
def test_shards_that_one_rank_alone_has_saved_are_refused(tmp_path: Path) -> None:
    _, message = run_ranks(2, loads_what_rank_0_saved, str(tmp_path))
    assert message == (
        "'0.weight': slot 'selector.basis' of the checkpoint holds the shard of another rank, because one rank alone has saved it; "
        "the shards of the other ranks are lost. Save with subspace_opt.snapshots or torch.distributed.checkpoint, to which all ranks "
        "contribute"
    )
