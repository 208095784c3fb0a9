"""Is a snapshot complete or absent after a process dies, does any number of ranks load it, and does an error name everything that does not
fit?
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import RANK, Params, gradient, parameters, same, small
from launch import end, received, start
from pool import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import subspace_opt
from subspace_opt import CheckpointError, snapshots
from subspace_opt.checkpoint import migrations as checkpoint
from subspace_opt.snapshots import SnapshotError, manifest

# Functions that make an optimizer of named parameters. SHARDED has those that take sharded parameters.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda named: torch.optim.AdamW(named, lr=0.01),
    "SGD": lambda named: torch.optim.SGD(named, lr=0.01, momentum=0.9),
    "cosmos": lambda named: preset("cosmos", named),
    "galore": lambda named: preset("galore", named),
    "soap": lambda named: preset("soap", named),
}
SHARDED = ["AdamW", "SGD", "cosmos", "galore", "soap"]
ROUNDED = ["cosmos", "galore", "soap"]  # matrices of one stack have different owners, so the last bits differ
EXTRA = {"epoch": 3, "order": torch.tensor([2, 0, 1]), "schedule": {"last": 0.5, "name": "cosine"}}
Saved = dict[str, Tensor]


def near(one: Saved, other: Saved) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)


def preset(name: str, named: Any) -> torch.optim.Optimizer:
    named = list(named)
    kinds = {n: frozenset({"linear"}) for n, _ in named}
    return subspace_opt.SubspaceOptimizer(named, small(name, rank=RANK), modules=kinds)


class Model(nn.Module):
    """A model with values by seed, row counts that three ranks do not divide, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        values = parameters({"embed": (10, 8), "first": (7, 8), "bias": (7,), "last": (8, 7)}, seed=seed)
        for name, p in values.items():
            self.register_parameter(name, p)
        self.register_buffer("seen", torch.tensor([seed, 5]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.embed @ self.first.T + self.bias


def made(kind: str, wrap: str = "plain", seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Sharding replaces parameters, so the optimizer is made after it. DDP keeps parameters and changes their names, on which draws
    depend.
    """
    model = Model(seed)
    if wrap == "sharded":
        fully_shard(model)
    optimizer = OPTIMIZERS[kind](model.named_parameters())
    return (nn.parallel.DistributedDataParallel(model) if wrap == "ddp" else model), optimizer


def named(model: nn.Module) -> Params:
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, missing: tuple[str, ...] = ()) -> None:
    """Steps with gradients by name and number of the step, the same on all ranks."""
    for step in steps:
        for name, p in named(model).items():
            whole = gradient(name, tuple(p.shape), step)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole
            if name in missing:
                p.grad = None
        optimizer.step()
        model.get_buffer("module.seen" if isinstance(model, nn.parallel.DistributedDataParallel) else "seen").add_(1)
    optimizer.zero_grad()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> Saved:
    """All tensors of model and optimizer, gathered from their shards, by name."""
    own = optimizer.state_dict()  # in which the parts that ranks hold of a state are put together
    names = [n for group in own["param_groups"] for n in group.get("param_names", map(str, group["params"]))]
    state = {f"{names[i].removeprefix('module.')}.{key}": value for i, slots in own["state"].items() for key, value in slots.items()}
    values = {**{n.removeprefix("module."): v for n, v in model.state_dict().items()}, **state}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else torch.as_tensor(v)).detach().clone() for name, v in values.items()}


def groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


# ------------------------------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_was_saved_is_loaded_and_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    model, optimizer = made(kind)
    run(model, optimizer, range(4))
    optimizer.param_groups[0]["lr"] = 0.125
    path = snapshots.save(tmp_path, model, optimizer, step=4, extra=EXTRA)
    assert path == tmp_path / "step-00000004"
    saved = whole(model, optimizer)
    again, fresh = made(kind, seed=7)
    found = snapshots.load(tmp_path, again, fresh)
    assert (found.step, found.path) == (4, path)
    assert torch.equal(found.extra["order"], EXTRA["order"])
    assert {k: v for k, v in found.extra.items() if k != "order"} == {k: v for k, v in EXTRA.items() if k != "order"}
    assert same(whole(again, fresh), saved)
    assert groups(fresh) == groups(optimizer)
    run(model, optimizer, range(4, 8))
    run(again, fresh, range(4, 8))
    assert same(whole(again, fresh), whole(model, optimizer))


def test_the_newest_are_kept_and_listed(tmp_path: Path) -> None:
    model, optimizer = made("AdamW")
    assert snapshots.latest(tmp_path / "none") is None
    states = {}
    for step in (0, 5, 100, 123456789):
        run(model, optimizer, range(step, step + 1))
        states[step] = whole(model, optimizer)
        snapshots.save(tmp_path, model, optimizer, step=step, keep=3)
    assert snapshots.complete(tmp_path) == [5, 100, 123456789]
    assert snapshots.latest(tmp_path) == 123456789
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000100", "step-123456789"]
    again, fresh = made("AdamW", seed=7)
    snapshots.load(tmp_path, again, fresh, step=5)
    assert same(whole(again, fresh), states[5])
    assert snapshots.load(tmp_path, again, fresh).step == 123456789
    with pytest.raises(SnapshotError, match="has no snapshot of step 6; it has 5, 100, 123456789"):
        snapshots.load(tmp_path, again, fresh, step=6)


def test_what_killed_runs_left_is_not_seen_and_goes_with_the_next_save(tmp_path: Path) -> None:
    model, optimizer = made("AdamW")
    snapshots.save(tmp_path, model, optimizer, step=1)
    for left in (".step-00000009.0a1b2c3d.partial", ".step-00000000.0a1b2c3d.removed"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / left)
    (tmp_path / "notes").mkdir()
    assert snapshots.complete(tmp_path) == [1]
    assert snapshots.load(tmp_path, model, optimizer).step == 1
    snapshots.save(tmp_path, model, optimizer, step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("step", [2, 3])
def test_a_step_that_would_not_be_the_newest_is_refused_until_later_ones_are_discarded(tmp_path: Path, step: int) -> None:
    """Otherwise the next load would continue the abandoned branch."""
    model, optimizer = made("AdamW")
    for earlier in (1, 3):
        snapshots.save(tmp_path, model, optimizer, step=earlier)
    with pytest.raises(SnapshotError, match=rf"has step-00000003 already.*snapshots.discard\(.*, after={step - 1}\)"):
        snapshots.save(tmp_path, model, optimizer, step=step)
    assert snapshots.complete(tmp_path) == [1, 3]
    snapshots.discard(tmp_path, after=step - 1)
    snapshots.save(tmp_path, model, optimizer, step=step)
    assert snapshots.complete(tmp_path) == [1, step]


@pytest.mark.parametrize(("name", "value"), [("step", -1), ("step", 1.0), ("step", True), ("keep", 0), ("keep", None)])
def test_a_number_that_cannot_be_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    model, optimizer = made("AdamW")
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be a whole number"):
        snapshots.save(tmp_path, model, optimizer, **{"step": 1, name: value})
    assert list(tmp_path.iterdir()) == []


def test_extra_that_could_not_be_loaded_is_refused_when_saving(tmp_path: Path) -> None:
    model, optimizer = made("AdamW")
    with pytest.raises(SnapshotError, match=r"`extra`, an option .* could not be loaded again .*; turn it into tensors"):
        snapshots.save(tmp_path, model, optimizer, step=1, extra={"random": random.Random(0)})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_leaves_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made("AdamW")
    snapshots.save(tmp_path, model, optimizer, step=1)
    with monkeypatch.context() as patched:
        patched.setattr(dcp.FileSystemWriter, "write_data", no_space)
        with pytest.raises(SnapshotError, match=r"step 2 could not be saved in .*: rank 0: OSError: .*No space.*; make room"):
            snapshots.save(tmp_path, model, optimizer, step=2)
    assert snapshots.load(tmp_path, model, optimizer).step == 1
    snapshots.save(tmp_path, model, optimizer, step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_an_interrupt_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model, optimizer = made("AdamW")
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        snapshots.save(tmp_path, model, optimizer, step=1)
    monkeypatch.undo()
    snapshots.save(tmp_path, model, optimizer, step=1)
    assert snapshots.complete(tmp_path) == [1]


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_has_made_no_step_is_saved_and_loaded_as_such(tmp_path: Path, kind: str) -> None:
    """torch asks for state by a step with zero gradients, which AdamW counts."""
    model, optimizer = made(kind)
    snapshots.save(tmp_path, model, optimizer, step=0)
    assert not optimizer.state
    again, used = made(kind, seed=7)
    run(again, used, range(2))
    snapshots.load(tmp_path, again, used)
    assert not used.state
    untouched, fresh = made(kind)
    for pair in ((model, optimizer), (again, used), (untouched, fresh)):
        run(*pair, range(3))
    model.load_state_dict({**model.state_dict(), "seen": untouched.state_dict()["seen"]})
    assert same(whole(model, optimizer), whole(untouched, fresh))
    assert same(whole(again, used), whole(untouched, fresh))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("used", [False, True])
def test_a_parameter_without_state_has_none_again(tmp_path: Path, kind: str, used: bool) -> None:
    """A parameter without a gradient so far may lack state in the snapshot or in the loading optimizer; neither is an error."""
    model, optimizer = made(kind)
    run(model, optimizer, range(2), missing=("first",))
    snapshots.save(tmp_path, model, optimizer, step=2)
    saved = whole(model, optimizer)
    assert not any(key.startswith("first/") for key in saved)
    again, fresh = made(kind, seed=7)
    if used:
        run(again, fresh, range(3), missing=("last",))
    snapshots.load(tmp_path, again, fresh)
    assert same(whole(again, fresh), saved)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_parameters_in_another_order_and_in_other_groups_are_matched_by_name(tmp_path: Path, kind: str) -> None:
    def split(seed: int, names: list[list[str]]) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Model(seed)
        own = dict(model.named_parameters())
        optimizer = OPTIMIZERS[kind]([(n, own[n]) for n in names[0]])
        optimizer.add_param_group({"params": [(n, own[n]) for n in names[1]], "weight_decay": 0.5})
        return model, optimizer

    model, optimizer = split(0, [["embed", "first"], ["bias", "last"]])
    run(model, optimizer, range(3))
    snapshots.save(tmp_path, model, optimizer, step=3)
    again, other = split(7, [["last", "bias"], ["first", "embed"]])
    snapshots.load(tmp_path, again, other)
    assert same(whole(again, other), whole(model, optimizer))
    assert [g["weight_decay"] for g in other.param_groups] == [g["weight_decay"] for g in reversed(optimizer.param_groups)]
    run(model, optimizer, range(3, 6))
    run(again, other, range(3, 6))
    assert same(whole(again, other), whole(model, optimizer))

    again, other = made(kind, seed=7)
    refused(tmp_path, again, other, "the saved groups of the parameters of group 0 differ in weight_decay")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Model(seed)
        model.register_parameter("head", model.embed)
        return model, OPTIMIZERS["cosmos"](model.named_parameters())

    model, optimizer = tied(0)
    run(model, optimizer, range(3))
    snapshots.save(tmp_path, model, optimizer, step=3)
    again, fresh = tied(7)
    snapshots.load(tmp_path, again, fresh)
    assert again.head is again.embed
    assert same(whole(again, fresh), whole(model, optimizer))


def test_a_learning_rate_may_be_a_tensor(tmp_path: Path) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25))
    run(model, optimizer, range(2))
    snapshots.save(tmp_path, model, optimizer, step=2)
    optimizer.param_groups[0]["lr"].fill_(0.5)  # the snapshot is a copy
    fresh = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.75))
    snapshots.load(tmp_path, model, fresh)
    assert fresh.param_groups[0]["lr"].item() == 0.25


# ------------------------------------------------------------------------------------------------------------------------ refusals


def refused(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *said: str, **options: Any) -> CheckpointError:
    """The load is refused with this message, and neither model nor optimizer has changed."""
    before, options_before = whole(model, optimizer), groups(optimizer)
    with pytest.raises(CheckpointError) as caught:
        snapshots.load(folder, model, optimizer, **options)
    for words in said:
        assert words in str(caught.value)
    assert same(whole(model, optimizer), before)
    assert groups(optimizer) == options_before
    return caught.value


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "it is truncated"),
    "longer": (lengthen, "it is too long"),
    "flipped": (flip, "is damaged: its SHA-256 does not match the manifest"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Saved]:
    """Snapshots of steps 1 and 2, and the contents of the first."""
    model, optimizer = made("cosmos")
    run(model, optimizer, range(1))
    first = whole(model, optimizer)
    snapshots.save(tmp_path, model, optimizer, step=1)
    run(model, optimizer, range(1, 2))
    snapshots.save(tmp_path, model, optimizer, step=2)
    return tmp_path, first


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "rest.pt"])
def test_a_damaged_file_is_refused_by_name_and_the_one_before_loads(two: tuple[Path, Saved], file: str, damage: str) -> None:
    folder, first = two
    spoil, said = DAMAGE[damage]
    spoil(folder / "step-00000002" / file)
    model, optimizer = made("cosmos", seed=7)
    run(model, optimizer, range(1))
    remedy = f"Load the snapshot before it, snapshots.load({str(folder)!r}, model, optimizer, step=1)"
    refused(folder, model, optimizer, f"{folder / 'step-00000002'} cannot be loaded: {file}", said, remedy)
    snapshots.load(folder, model, optimizer, step=1)
    assert same(whole(model, optimizer), first)
    snapshots.discard(folder, after=1)  # the remedy of the message
    snapshots.save(folder, model, optimizer, step=2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "manifest.json is truncated or damaged"),
        (lambda path: path.write_bytes(b""), "manifest.json is truncated or damaged"),
        (lambda path: path.write_bytes(b"[]"), "manifest.json is truncated or damaged"),
        (lambda path: path.write_text(path.read_text().replace('"step": 2', '"step": 3')), "manifest.json is damaged"),
        (Path.unlink, "has no manifest.json: it was lost, or another program wrote the folder"),
    ],
)
def test_a_damaged_manifest_is_refused(two: tuple[Path, Saved], spoil: Callable[[Path], None], said: str) -> None:
    """A newest snapshot without a manifest raises; the load does not skip it."""
    folder, first = two
    spoil(folder / "step-00000002" / "manifest.json")
    model, optimizer = made("cosmos", seed=7)
    refused(folder, model, optimizer, said, "Load the snapshot before it", "step=1)")
    snapshots.load(folder, model, optimizer, step=1)
    assert same(whole(model, optimizer), first)


def test_every_flipped_bit_of_a_manifest_is_noticed(two: tuple[Path, Saved]) -> None:
    folder, _ = two
    file = folder / "step-00000002" / "manifest.json"
    content = file.read_bytes()
    meant = manifest.choose(folder, 2)[1]
    model, optimizer = made("cosmos")
    unnoticed = []
    for place, bit in itertools.product(range(len(content)), (0, 3, 6)):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << bit
        file.write_bytes(spoilt)
        try:
            if manifest.choose(folder, 2)[1] != meant:  # spaces between entries have no meaning
                unnoticed.append((place, bit))
        except SnapshotError:
            pass
    assert unnoticed == []
    refused(folder, model, optimizer, "manifest.json")


def test_a_foreign_file_is_refused_by_name(two: tuple[Path, Saved]) -> None:
    folder, _ = two
    (folder / "step-00000002" / "__1_0.distcp").write_bytes(b"of another run")
    model, optimizer = made("cosmos", seed=7)
    refused(folder, model, optimizer, "__1_0.distcp does not belong to this snapshot: move it out of the folder")
    (folder / "step-00000002" / "__1_0.distcp").unlink()
    assert snapshots.load(folder, model, optimizer).step == 2


def test_the_only_snapshot_has_none_before_it(tmp_path: Path) -> None:
    model, optimizer = made("AdamW")
    snapshots.save(tmp_path, model, optimizer, step=1)
    flip(tmp_path / "step-00000001" / "rest.pt")
    refused(tmp_path, model, optimizer, "rest.pt is damaged", "There is no earlier complete snapshot")


def test_a_snapshot_under_another_name_is_refused(two: tuple[Path, Saved]) -> None:
    folder, _ = two
    (folder / "step-00000002").rename(folder / "step-00000009")
    model, optimizer = made("cosmos")
    refused(folder, model, optimizer, "step-00000009 is the snapshot of step 2 under another name; rename it to step-00000002")


def test_a_snapshot_of_a_later_format_is_refused(two: tuple[Path, Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "FORMAT", 0)
    model, optimizer = made("cosmos")
    refused(two[0], model, optimizer, "has format 1 and this subspace_opt reads format 0; load it with subspace_opt 0.1.0, which wrote it")


def test_a_checkpoint_of_torch_alone_is_refused(tmp_path: Path) -> None:
    model, optimizer = made("AdamW")
    state = {"model": model.state_dict()}
    for folder in (tmp_path / "bare", tmp_path / "runs" / "step-00000003"):
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            dcp.save(state, checkpoint_id=folder)
    refused(tmp_path / "bare", model, optimizer, "It is a checkpoint of torch.distributed.checkpoint")
    refused(tmp_path / "runs", model, optimizer, "has no manifest.json", "a checkpoint that torch.distributed.checkpoint wrote by itself")
    refused(tmp_path / "none", model, optimizer, "none has no complete snapshot.")
    assert snapshots.latest(tmp_path / "runs") is None
    with pytest.raises(SnapshotError, match="has step-00000003 already"):
        snapshots.save(tmp_path / "runs", model, optimizer, step=2)


def test_another_model_is_refused(two: tuple[Path, Saved]) -> None:
    folder, _ = two

    def changed(change: Callable[[Model], None]) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Model(7)
        change(model)
        return model, OPTIMIZERS["cosmos"](model.named_parameters())

    refused(
        folder,
        *changed(lambda m: m.register_parameter("more", nn.Parameter(torch.ones(2)))),
        "belongs to another model: the snapshot lacks more;",
    )
    refused(folder, *changed(lambda m: delattr(m, "last")), "belongs to another model: the snapshot has in addition last;")
    refused(folder, *changed(lambda m: delattr(m, "seen")), "belongs to another model: the snapshot has in addition seen;")
    wider = nn.Parameter(torch.ones(9, 8))
    refused(folder, *changed(lambda m: setattr(m, "first", wider)), "'first' has shape (7, 8) there and (9, 8) here")
    refused(folder, *changed(lambda m: m.double()), "has dtype torch.float32 there and torch.float64 here")


def test_another_spec_is_refused_with_the_first_difference(two: tuple[Path, Saved]) -> None:
    folder, _ = two
    for used in (False, True):
        model, optimizer = made("galore", seed=7)
        if used:
            run(model, optimizer, range(1))
        error = refused(folder, model, optimizer, "the checkpoint has spec 'cosmos' and this optimizer has 'galore': pipelines.")
        assert type(error) is CheckpointError
        assert bool(optimizer.state) == used
    model = Model(7)
    spec = subspace_opt.load_spec(small("cosmos"), {"matrix.selector.rank": RANK - 1})
    linear = {name: frozenset({"linear"}) for name in named(model)}
    ranked = subspace_opt.SubspaceOptimizer(model.named_parameters(), spec, modules=linear)
    refused(folder, model, ranked, f"pipelines.matrix.selector.rank is {RANK} there and {RANK - 1} here")


def test_a_load_that_is_refused_changes_nothing_that_follows(two: tuple[Path, Saved]) -> None:
    """A step finds the layout of a fresh optimizer's state, and a refused load undoes that step."""
    for kind in OPTIMIZERS:
        other = "galore" if kind == "cosmos" else kind
        model, optimizer = made(other, seed=7)
        refused(two[0], model, optimizer)
        twin, untouched = made(other, seed=7)
        run(model, optimizer, range(3))
        run(twin, untouched, range(3))
        assert same(whole(model, optimizer), whole(twin, untouched))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = made("AdamW")
    run(model, optimizer, range(1))
    snapshots.save(tmp_path, model, optimizer, step=1)
    refused(tmp_path, *made("cosmos"), "another optimizer saved this checkpoint: its parameter groups have no `spec`")
    refused(tmp_path, *made("SGD"), "has the state of AdamW, and this is SGD: build the optimizer as it was saved")
    model = Model()
    refused(
        tmp_path,
        model,
        torch.optim.AdamW(model.parameters(), amsgrad=True),
        "the optimizer has other options than the saved one: 'bias' has slots exp_avg, ",
    )
    refused(
        tmp_path,
        model,
        torch.optim.AdamW(list(model.parameters())[:2]),
        "the optimizer has other parameters than the saved one: the snapshot has in addition ",
    )


def test_a_slot_of_another_precision_is_refused(tmp_path: Path) -> None:
    """torch.distributed.checkpoint would cast it."""
    model, optimizer = made("AdamW")
    run(model, optimizer, range(1))
    snapshots.save(tmp_path, model, optimizer, step=1)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].double()
    refused(tmp_path, model, optimizer, "has dtype torch.float32 there and torch.float64 here")


def test_a_slot_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    """The spec is the same and the rounding differs."""
    model = Model().bfloat16()
    linear = {name: frozenset({"linear"}) for name in named(model)}
    kahan, nearest = (
        subspace_opt.SubspaceOptimizer(model.named_parameters(), small("cosmos"), modules=linear, rounding=rounding)
        for rounding in ("kahan", "nearest")
    )
    for optimizer in (kahan, nearest):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    snapshots.save(tmp_path, model, kahan, step=2)
    refused(tmp_path, model, nearest, "slot 'compensation' is unknown here")


def test_state_of_a_later_version_is_refused_and_of_an_earlier_one_brought_up_to_date(
    two: tuple[Path, Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = two
    model, optimizer = made("cosmos", seed=7)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "STATE_VERSION", 0)
        refused(folder, model, optimizer, "the checkpoint's state has version 2 and this subspace_opt reads versions up to 0; install the")

    def halved(state_dict: Any) -> Any:
        half = {name: {k: v / 2 if k.endswith("momentum") else v for k, v in s.items()} for name, s in state_dict["state"].items()}
        return {**state_dict, "state": half}

    monkeypatch.setattr(checkpoint, "STATE_VERSION", 3)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {**checkpoint.MIGRATIONS, 2: halved})
    keys = {key for key in first if key.endswith("momentum")}
    snapshots.load(folder, model, optimizer, step=1)
    assert optimizer.param_groups[0]["state_version"] == 3
    assert same(whole(model, optimizer), {key: value / 2 if key in keys else value for key, value in first.items()})


# ---------------------------------------------------------------------------------------------------------------- in the background


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event: saves in the background begin to write when it is set."""
    event, begin = threading.Event(), manifest.begin

    def waiting(folder: Path, step: int) -> Path:
        assert event.wait(60)
        return begin(folder, step)

    monkeypatch.setattr(manifest, "begin", waiting)
    return event


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_while_the_state_at_the_call_is_saved(tmp_path: Path, kind: str, gate: threading.Event) -> None:
    model, optimizer = made(kind)
    run(model, optimizer, range(3))
    saved = whole(model, optimizer)
    extra = {"list": [1, 2]}
    pending = snapshots.async_save(tmp_path, model, optimizer, step=3, extra=extra)
    extra["list"].append(3)
    run(model, optimizer, range(3, 6))
    optimizer.param_groups[0]["lr"] = 0.5
    assert not pending.done()
    assert snapshots.latest(tmp_path) is None
    gate.set()
    assert pending.result(60) == tmp_path / "step-00000003"
    again, fresh = made(kind, seed=7)
    assert snapshots.load(tmp_path, again, fresh).extra == {"list": [1, 2]}
    assert same(whole(again, fresh), saved)
    assert fresh.param_groups[0]["lr"] != 0.5
    assert not same(whole(model, optimizer), saved)


def test_one_save_is_in_flight(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizer = made("AdamW")
    first = snapshots.async_save(tmp_path, model, optimizer, step=1)
    threading.Timer(0.05, gate.set).start()
    second = snapshots.async_save(tmp_path, model, optimizer, step=2)
    assert first.done()
    assert snapshots.load(tmp_path, model, optimizer).step == 2
    assert second.done()


def test_a_save_that_failed_in_the_background_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = made("AdamW")
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", no_space)
    asked = snapshots.async_save(tmp_path, model, optimizer, step=1)
    with caplog.at_level(logging.ERROR), pytest.raises(SnapshotError, match="No space left"):
        asked.result(60)
    ignored = snapshots.async_save(tmp_path, model, optimizer, step=2)
    with pytest.raises(SnapshotError, match=r"step 2 could not be saved in .*No space left"):
        snapshots.save(tmp_path, model, optimizer, step=3)
    assert ignored.done()
    monkeypatch.undo()
    snapshots.save(tmp_path, model, optimizer, step=3)
    assert "the snapshot of step 2 was not saved" in caplog.text


# -------------------------------------------------------------------------------------------------------------------- several ranks

SEVERAL = [(kind, wrap) for kind in OPTIMIZERS for wrap in ("plain", "ddp", "sharded") if wrap != "sharded" or kind in SHARDED]


def saves(folder: str, cases: list[tuple[str, str]]) -> str:
    for kind, wrap in cases:
        model, optimizer = made(kind, wrap)
        run(model, optimizer, range(3))
        snapshots.save(f"{folder}/{kind}-{wrap}", model, optimizer, step=3, extra=EXTRA if dist.get_rank() == 0 else None)
    return "done"


def loads(folder: str, cases: list[tuple[str, str, str]]) -> list[tuple[int, Any, Saved, Saved]]:
    """Model and optimizer after the load, and two steps later."""
    out = []
    for kind, saved, wrap in cases:
        model, optimizer = made(kind, wrap, seed=7)
        found = snapshots.load(f"{folder}/{kind}-{saved}", model, optimizer)
        loaded = whole(model, optimizer)
        run(model, optimizer, range(3, 5))
        out.append((found.step, found.extra["epoch"], loaded, whole(model, optimizer)))
    return out


@cache
def alone(kind: str, steps: int) -> Saved:
    """The same for one process that was never stopped."""
    model, optimizer = made(kind)
    run(model, optimizer, range(steps))
    return whole(model, optimizer)


@pytest.mark.slow
def test_another_number_of_ranks_loads_it(tmp_path: Path) -> None:
    """Two ranks save. One process, two ranks and three ranks load, with and without wrappers, and all equal a single process."""
    assert run_ranks(2, saves, str(tmp_path), SEVERAL) == ["done"] * 2
    for kind, wrap in SEVERAL:
        found = manifest.choose(tmp_path / f"{kind}-{wrap}", None)[1]
        assert found.world_size == 2
        assert {"__0_0.distcp", "__1_0.distcp"} <= set(found.files)
    assert not dist.is_initialized()
    for size in (0, 2, 3):  # 0: in this process
        targets = ("plain", "ddp", "sharded") if size else ("plain",)
        cases = [(kind, wrap, target) for kind, wrap in SEVERAL for target in targets if target != "sharded" or kind in SHARDED]
        for answers in run_ranks(size, loads, str(tmp_path), cases) if size else [loads(str(tmp_path), cases)]:
            for case, (step, epoch, loaded, later) in zip(cases, answers, strict=True):
                assert (step, epoch) == (3, 3), case
                compare = near if case[0] in ROUNDED and "sharded" in case else same
                assert compare(loaded, alone(case[0], 3)), case
                assert compare(later, alone(case[0], 5)), case


def with_the_wrappers_names(folder: str) -> Saved:
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = OPTIMIZERS["cosmos"](model.named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "module.embed"
    run(model, optimizer, range(3))
    snapshots.save(folder, model, optimizer, step=3)
    return whole(model, optimizer)


@pytest.mark.slow
def test_an_optimizer_that_was_made_of_a_wrapped_model_is_matched_too(tmp_path: Path) -> None:
    (saved,) = run_ranks(1, with_the_wrappers_names, str(tmp_path))
    model, optimizer = made("cosmos", seed=7)
    snapshots.load(tmp_path, model, optimizer)
    assert same(whole(model, optimizer), saved)
    assert optimizer.param_groups[0]["param_names"][0] == "embed"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_load_between_backward_and_step_keeps_the_gradients(tmp_path: Path, kind: str) -> None:
    model, optimizer = made(kind)
    run(model, optimizer, range(3))
    snapshots.save(tmp_path, model, optimizer, step=3)
    again, fresh = made(kind, seed=7)
    for p in again.parameters():
        p.grad = torch.ones_like(p)
    snapshots.load(tmp_path, again, fresh)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in again.parameters())
    assert same(whole(again, fresh), whole(model, optimizer))


def loads_with_gradients(folder: str) -> tuple[Saved, bool]:
    model, optimizer = made("AdamW", "sharded", seed=7)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    snapshots.load(folder, model, optimizer)
    return whole(model, optimizer), all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())


@pytest.mark.slow
def test_state_is_sharded_as_its_parameter_where_the_optimizer_has_none_yet(tmp_path: Path) -> None:
    model, optimizer = made("AdamW")
    run(model, optimizer, range(3))
    snapshots.save(tmp_path, model, optimizer, step=3)
    for loaded, sharded in run_ranks(2, loads_with_gradients, str(tmp_path)):
        assert sharded
        assert same(loaded, alone("AdamW", 3))


def is_refused(folder: str) -> tuple[str, bool]:
    model, optimizer = made("AdamW", "sharded", seed=7)
    run(model, optimizer, range(1))
    before = whole(model, optimizer)
    with pytest.raises(SnapshotError) as caught:
        snapshots.load(folder, model, optimizer)
    return str(caught.value), same(whole(model, optimizer), before)


@pytest.mark.slow
def test_all_ranks_refuse_what_one_has_found(tmp_path: Path) -> None:
    """One rank verifies each file."""
    run_ranks(2, saves, str(tmp_path), [("AdamW", "sharded")])
    folder = tmp_path / "AdamW-sharded"
    for file in ("__0_0.distcp", "__1_0.distcp"):
        flip(folder / "step-00000003" / file)
        answers = run_ranks(2, is_refused, str(folder))
        assert answers[0] == answers[1]
        assert f"cannot be loaded: {file} is damaged" in answers[0][0]
        assert answers[0][1]
        flip(folder / "step-00000003" / file)


def one_is_of_another_spec(folder: str) -> tuple[str, bool]:
    model, optimizer = made("galore" if dist.get_rank() else "cosmos", seed=7)
    before = whole(model, optimizer)
    with pytest.raises(CheckpointError) as caught:
        snapshots.load(folder, model, optimizer)
    return str(caught.value), same(whole(model, optimizer), before)


@pytest.mark.slow
def test_no_rank_loads_what_another_cannot_take(tmp_path: Path) -> None:
    model, optimizer = made("cosmos")
    run(model, optimizer, range(1))
    snapshots.save(tmp_path, model, optimizer, step=1)
    (told, unchanged), (found, also) = run_ranks(2, one_is_of_another_spec, str(tmp_path))
    assert "rank 1: CheckpointError: the checkpoint has spec 'cosmos' and this optimizer has 'galore'" in told
    assert found.startswith("the checkpoint has spec 'cosmos' and this optimizer has 'galore'")
    assert unchanged
    assert also


def one_disk_is_full(folder: str) -> tuple[str, list[int]]:
    model, optimizer = made("AdamW", "sharded")
    snapshots.save(folder, model, optimizer, step=1)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(dcp.FileSystemWriter, "write_data", no_space)
        with pytest.raises(SnapshotError) as caught:
            snapshots.save(folder, model, optimizer, step=2)
    snapshots.save(folder, model, optimizer, step=3)
    return str(caught.value), snapshots.complete(folder)


@pytest.mark.slow
def test_all_ranks_are_told_that_one_could_not_write(tmp_path: Path) -> None:
    for text, steps in run_ranks(2, one_disk_is_full, str(tmp_path)):
        assert "step 2 could not be saved" in text
        assert "rank 1: OSError: [Errno 28] No space left on device" in text
        assert steps == [1, 3]


def in_the_background(folder: str) -> tuple[list[str], list[int], Saved]:
    model, optimizer = made("AdamW", "sharded")
    run(model, optimizer, range(3))
    refusals = []
    for group in (None, dist.group.WORLD):
        try:
            snapshots.async_save(folder, model, optimizer, step=3, process_group=group)
        except SnapshotError as error:
            refusals.append(str(error))
    own = dist.new_group(backend="gloo")
    pending = snapshots.async_save(folder, model, optimizer, step=3, process_group=own)
    for step in range(3, 20):
        run(model, optimizer, range(step, step + 1))
        dist.all_reduce(torch.ones(1))  # like training
    pending.result(60)
    snapshots.async_save(folder, model, optimizer, step=20, process_group=own)
    again, fresh = made("AdamW", "sharded", seed=7)
    snapshots.load(folder, again, fresh, step=3)
    return refusals, snapshots.complete(folder), whole(again, fresh)


@pytest.mark.slow
def test_several_ranks_save_in_the_background_on_a_group_of_their_own(tmp_path: Path) -> None:
    for refusals, steps, loaded in run_ranks(2, in_the_background, str(tmp_path)):
        assert len(refusals) == 2
        assert all("needs a process group that training does not use: make one once" in text for text in refusals)
        assert steps == [3, 20]
        assert same(loaded, alone("AdamW", 3))


@pytest.mark.slow
def test_fsdp_of_the_first_kind_is_refused(tmp_path: Path) -> None:
    (answer,) = run_ranks(1, wraps_flat, str(tmp_path))
    assert "snapshots support fully_shard (FSDP2)" in answer


def wraps_flat(folder: str) -> str:
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(SnapshotError) as caught:
        snapshots.save(folder, model, torch.optim.AdamW(model.parameters()), step=1)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------------- kills

Send = Callable[[Any], None]
KILLS = {"save": 20, "async_save": 15, "two ranks": 15}


def trains(rank: int, size: int, send: Send, folder: str, background: bool) -> None:
    """A run that is started again and again. It continues from the newest snapshot, saves at every step, and reports each save."""
    model, optimizer = made("cosmos", seed=7)
    step = 0
    if snapshots.latest(folder) is None:
        model, optimizer = made("cosmos")
    else:
        step = snapshots.load(folder, model, optimizer).step
    while True:
        step += 1
        run(model, optimizer, range(step - 1, step))
        send(("begin", step))
        if background:
            snapshots.async_save(folder, model, optimizer, step=step).result()
        else:
            snapshots.save(folder, model, optimizer, step=step)
        send(("end", step))


@pytest.mark.slow
@pytest.mark.parametrize("way", KILLS)
def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path: Path, way: str) -> None:
    """SIGKILL ends one rank or all at random moments. The run starts again from the files, fifty times in all."""
    size = 2 if way == "two ranks" else 0
    dice = random.Random(way)
    expected: list[Saved] = []
    twin, other = made("cosmos")
    tries = hits = partial = 0
    seconds = 0.05  # duration of a save; measured below
    while hits < KILLS[way]:
        tries += 1
        assert tries <= 6 * KILLS[way], "too few of the kills fell into a save"
        processes, pipes = start(trains, size, str(tmp_path), way == "async_save")
        victims = processes if not size or dice.random() < 0.3 else [dice.choice(processes)]
        told = [[received(pipe)] for pipe in pipes]
        for _ in range(2 * dice.randrange(2)):  # a whole save
            before = time.monotonic()
            told[0].append(received(pipes[0]))
            if told[0][-1][0] == "end":
                seconds = time.monotonic() - before
        time.sleep(dice.uniform(0, seconds))
        for victim in victims:
            victim.kill()
        if len(victims) < len(processes):
            time.sleep(dice.uniform(0, 2 * seconds))  # the survivor gets an error, or waits
        assert set(end(processes, kill=True)) <= {-signal.SIGKILL, 1}  # 1: a survivor whose peer is gone
        for messages, pipe in zip(told, pipes, strict=True):
            while (message := received(pipe)) is not None:
                messages.append(message)
        hits += any(messages[-1][0] == "begin" for messages in told)
        partial += any(path.name.startswith(".") for path in tmp_path.iterdir())

        saved = max([step for messages in told for word, step in messages if word == "end"], default=0)
        newest = snapshots.latest(tmp_path)
        assert (newest or 0) >= saved, "a snapshot that was reported as saved is gone"
        if newest is not None:
            while len(expected) <= newest:
                expected.append(whole(twin, other))
                run(twin, other, range(len(expected) - 1, len(expected)))
            again, fresh = made("cosmos", seed=7)
            assert snapshots.load(tmp_path, again, fresh).step == newest
            assert same(whole(again, fresh), expected[newest])
    assert partial, "no kill has left a partial folder: none fell into the writing"
    print(f"{way}: {hits} of {tries} kills during a save, {partial} left a hidden folder, newest step {snapshots.latest(tmp_path)}")


def saves_until(rank: int, size: int, send: Send, folder: str, last: int) -> None:
    """Make one more save, and kill it at file operation number `last`."""
    model, optimizer = made("AdamW", seed=7)
    step = snapshots.load(folder, model, optimizer).step
    run(model, optimizer, range(step, step + 1))
    seen = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir") and folder in str(args[0]):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    snapshots.save(folder, model, optimizer, step=step + 1)
    send("done")


@pytest.mark.slow
def test_a_kill_before_every_single_file_operation_loses_nothing(tmp_path: Path) -> None:
    """Kills before the first file operation, before the second, and so on until a save finishes. Removal of older snapshots is included."""
    states: dict[int, Saved] = {}
    model, optimizer = made("AdamW")
    for step in (1, 2):
        run(model, optimizer, range(step - 1, step))
        states[step] = whole(model, optimizer)
        snapshots.save(tmp_path / "start", model, optimizer, step=step)
    run(model, optimizer, range(2, 3))
    states[3] = whole(model, optimizer)
    newest = []
    for last in itertools.count(1):
        assert last < 200
        folder = tmp_path / str(last)
        shutil.copytree(tmp_path / "start", folder)
        processes, pipes = start(saves_until, 0, str(folder), last)
        done = received(pipes[0]) == "done"
        codes = end(processes)
        assert codes == ([0] if done else [-signal.SIGKILL])
        again, fresh = made("AdamW", seed=7)
        found = snapshots.load(folder, again, fresh).step
        assert same(whole(again, fresh), states[found])
        newest.append(found)
        snapshots.save(folder, again, fresh, step=found + 1)
        assert [path.name for path in sorted(folder.iterdir())] == [f"step-{step:08d}" for step in (found, found + 1)]
        if done:
            break
    assert newest == sorted(newest)
    assert newest.count(2) > 5  # it was killed while writing,
    assert newest.count(3) > 2  # and while removing the oldest
