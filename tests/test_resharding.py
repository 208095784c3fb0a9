"""Checkpoints of sharded parameters, saved on one number of ranks and loaded on another. The same number of ranks gives the same bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pool import run_ranks
from ranks import differences, give, make_zoo, mesh_of, own_shard, place, whole_weights
from test_sharding import build
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import subspace_opt
from subspace_opt.distributed import checkpoint

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


def cut_points(kind: str, presets: list[str], dtype: torch.dtype) -> list[str]:
    """The weights and state tensors in which a resumed run differs by a bit from a run without a cut: this rank's shards of them."""
    wrong = []
    for preset in presets:
        model, optimizer = made(preset, kind, dtype)
        saved = {}
        for step in range(9):
            steps(model, optimizer, step, step + 1)
            saved[step + 1] = _own_weights(model), _copied(optimizer.state_dict())
        other, resumed = made(preset, kind, dtype)  # every cut after the first is loaded over other state
        for cut in (1, 3, 4, 5, 8):  # bases are refreshed every fourth update
            torch.manual_seed(cut + dist.get_rank())
            with torch.no_grad():
                for name, p in other.named_parameters():
                    _own(p).copy_(saved[cut][0][name])
            resumed.load_state_dict(saved[cut][1])
            end = 9 if cut == 1 else min(cut + 2, 9)  # then all weights and all state are compared: equal ones continue equally
            steps(other, resumed, cut, end)
            weights, state = saved[end]
            wrong += [f"{preset} cut at {cut}: {name}" for name, w in _own_weights(other).items() if not torch.equal(w, weights[name])]
            mine = resumed.state_dict()["state"]
            for i, slots in state["state"].items():
                for key, value in slots.items():
                    if not torch.equal(_own(value), _own(mine[i][key])):
                        wrong.append(f"{preset} cut at {cut}: slot {key} of parameter {i}")
    return wrong


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


def load(folder: str, kind: str | None, presets: list[str], flat: bool) -> list[str]:
    wrong = []
    for preset in presets:
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
        alone = make_zoo(torch.float64)
        own = build(preset, alone, None)
        steps(alone, own, 0, 10)
        gaps = differences(model, alone)
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in gaps if not gap < 1e-9]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(("flat", "before", "after"), [(True, "fsdp", "fsdp"), (False, "fsdp", "fsdp"), (True, "tp", "fsdp+tp")])
def test_saved_on_four_ranks_and_loaded_on_others(tmp_path: Path, flat: bool, before: str, after: str) -> None:
    presets = ["cosmos", "muon", "galore", "soap", "adamw", "sumo"] if flat and before == after else ["cosmos", "galore", "adamw"]
    run_ranks(4, save, str(tmp_path), before, presets, flat)
    for world in (2, 1, 3) if before == after else (4,):
        assert run_ranks(world, load, str(tmp_path), after, presets, flat) == [[]] * world


@pytest.mark.slow
def test_saved_on_one_process_and_loaded_on_several_and_back(tmp_path: Path) -> None:
    presets = ["cosmos", "galore", "adamw"]
    for before, after, world in ((None, "fsdp", 1), ("ddp", "fsdp", 2), ("fsdp", "ddp", 2)):
        folder = tmp_path / f"{before}-{after}"
        run_ranks(world, save, str(folder), before, presets, True)
        assert run_ranks(2, load, str(folder), after, presets, True) == [[]] * 2


def full_state(presets: list[str]) -> list[str]:
    """A full state dictionary, gathered on every rank, loads into an optimizer of ordinary parameters, and back."""
    wrong = []
    options = StateDictOptions(full_state_dict=True)
    for preset in presets:
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
            alone = make_zoo(torch.float64)
            own = build(preset, alone, None)
            steps(alone, own, 0, 8)
            gaps = differences(other, alone)
            wrong += [f"{preset} to {kind}: {name} differs by {gap:.1e}" for name, gap in gaps if not gap < 1e-9]
    return wrong


@pytest.mark.slow
def test_a_full_state_dictionary_goes_anywhere() -> None:
    assert run_ranks(2, full_state, ["cosmos", "muon", "galore", "soap", "adamw"]) == [[]] * 2


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

    torch.manual_seed(3)
    model = Small().double()
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


def train(kind: str, presets: list[str]) -> list[str]:
    """Train with real gradients, through the wrapper's hooks."""
    warnings.simplefilter("ignore")
    draws = torch.Generator().manual_seed(5)
    x, y = (torch.randint(0, 31, (12, 8, 6), generator=draws) for _ in range(2))
    wrong = []
    for preset in presets:
        torch.manual_seed(3)
        alone = Small().double()
        models = [alone, wrapped(kind)]
        for model in models:
            optimizer = subspace_opt.build(preset, model, lr=1e-3, overrides={"matrix.selector.rank": 3} if preset == "cosmos" else {})
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 6)
            for i in range(12):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[i]).flatten(0, 1), y[i].flatten()).backward()
                optimizer.step()
                schedule.step()
        ranked = models[1].module if kind == "ddp" else models[1]
        gaps = differences(ranked, alone)
        wrong += [f"{preset}: {name} differs by {gap:.1e}" for name, gap in gaps if not gap < 1e-9]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("ddp", 2), ("tp", 2), ("fsdp+tp", 4)])
def test_training_as_users_write_it(kind: str, world: int) -> None:
    assert run_ranks(world, train, kind, ["cosmos", "muon", "galore", "adamw", "trion"]) == [[]] * world


def backward_steps(kind: str, preset: str) -> list[str]:
    """Compare updates during `backward()` on ranks with the ordinary optimizer on one process."""
    warnings.simplefilter("ignore")
    draws = torch.Generator().manual_seed(5)
    x, y = (torch.randint(0, 31, (8, 8, 6), generator=draws) for _ in range(2))
    torch.manual_seed(3)
    alone = Small().double()
    own = subspace_opt.build(preset, alone, lr=1e-3)
    model = wrapped(kind)
    optimizer = subspace_opt.step_in_backward(model, preset, lr=1e-3)
    for i in range(8):
        for one, opt in ((alone, own), (model, optimizer)):
            opt.zero_grad()
            nn.functional.cross_entropy(one(x[i]).flatten(0, 1), y[i].flatten()).backward()
            if one is model:
                assert all(p.grad is None for p in model.parameters())
            opt.step()
    gaps = differences(model, alone)
    return [f"{preset}: {name} differs by {gap:.1e}" for name, gap in gaps if not gap < 1e-9]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_updates_in_backward_of_shards(kind: str) -> None:
    for preset in ("muon", "galore", "adamw"):
        assert run_ranks(2, backward_steps, kind, preset) == [[]] * 2


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
