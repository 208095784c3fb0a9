"""timm's factory, groups, schedulers, scaler and checkpoints with optimizers of this package, on a tiny vision transformer."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import vision  # noqa: F401 -- before timm, which imports torchvision

pytest.importorskip("timm")

import timm
from timm.models import resume_checkpoint
from timm.optim import OptimizerRegistry, create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, NativeScaler
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import subspace_opt
from subspace_opt.integrations.timm import register

sys.path.insert(0, str(Path(__file__).parents[1]))
from pool import run_ranks

LIBRARY = "timm"
LR = 1e-2

NAMES = register()  # once for all tests, as a training script does


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(step)
    images, labels = torch.randn(4, 3, 16, 16, generator=source), torch.randint(5, (4,), generator=source)
    return nn.functional.cross_entropy(net(images), labels)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------------------- creation


@pytest.mark.shows("builds", "names")
def test_a_preset_gets_names_and_roles_from_the_model() -> None:
    net = model()
    made = create_optimizer_v2(net, "cosmos", lr=LR, rank=4)
    built = subspace_opt.build("cosmos", net, overrides={"matrix.selector.rank": 4})
    wanted = {row.entry.name: (row.pipeline, row.role.name, row.ranks) for row in built.plan.rows}
    assert {row.entry.name: (row.pipeline, row.role.name, row.ranks) for row in made.plan.rows} == wanted
    assert wanted["head.weight"][:2] == ("other", "head")
    assert set(wanted["blocks.0.attn.qkv.weight"][2]) == {4}


def test_steps_equal_those_of_build() -> None:
    nets = [model(), model()]
    train(nets[0], create_optimizer_v2(nets[0], "cosmos", lr=LR), range(3))
    train(nets[1], subspace_opt.build("cosmos", nets[1], lr=LR, weight_decay=0.0), range(3))
    assert same_weights(*nets)


def test_names_of_presets_and_those_that_timm_has_itself() -> None:
    assert set(NAMES) <= set(list_optimizers())
    assert {"cosmos", "soap", "subspace-adamw", "subspace-muon", "subspace"} <= set(NAMES)
    assert type(create_optimizer_v2(model(), "adamw")) is torch.optim.AdamW
    assert create_optimizer_v2(model(), "subspace-adamw").spec.name == "adamw"


def test_a_spec_by_name_and_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\npipelines:\n  matrix:\n    complement: {kind: muon}\nroutes:\n  - {use: matrix}\n")
    registry = OptimizerRegistry()
    assert register({"house-blend": file}, registry) == ["house-blend"]
    net = model()
    assert registry.create_optimizer(net, "house-blend").plan.rows[0].entry.name == "cls_token"
    assert create_optimizer_v2(net, "subspace", spec=str(file)).spec.name == "mine"


def test_registering_twice_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert register() == NAMES
    assert "already registered" not in caplog.text


def test_options_of_the_optimizer_words_of_others_and_dotted_paths() -> None:
    options = {
        "seed": 3,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "matrix.mix.complement": 0.5,
        "overrides": {"matrix.selector.rank": 2},
        "rank": 7,
    }
    optimizer = create_optimizer_v2(model(), "cosmos", **options)
    matrix = optimizer.spec.pipelines["matrix"]
    assert (matrix.selector.rank, matrix.mix.complement, matrix.inside[0].eps) == (2, 0.5, 1e-6)
    assert (optimizer.spec.pipelines["other"].complement[0].beta1, optimizer._options.seed) == (0.8, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnk": 3}, "'rnk' is no option"),
        ({"opt": "lookahead_cosmos"}, "write 'cosmos'"),
        ({"foreach": True}, "'foreach' is not needed"),
        ({"opt": "subspace"}, "needs the option `spec`"),
        ({"opt": "subspace-adamw", "fallback_list": ["*proj*"]}, "'adamw' has all; leave the list out"),
        ({"param_group_fn": lambda net: [{"params": list(net.parameters()), "lr_mult": 2}]}, "unknown key 'lr_mult'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        create_optimizer_v2(model(), **{"opt": "cosmos", **options})


def test_parameters_without_names_are_refused_and_named_ones_are_not() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"has no name.*give the model, create_optimizer_v2\(model, \.\.\.\)"):
        create_optimizer_v2(net.parameters(), "cosmos")
    with pytest.warns(UserWarning, match="no model was given, and no name tells the role of 'patch_embed.proj.weight'"):
        optimizer = create_optimizer_v2(net.named_parameters(), "cosmos")
    assert optimizer.plan.rows[-2].entry.name == "head.weight"


def test_the_model_of_one_call_is_forgotten_after_it() -> None:
    net = model()
    create_optimizer_v2(net, "cosmos")
    with pytest.raises(ValueError, match="has no name"):
        get_optimizer_class("cosmos")(net.parameters())


@pytest.mark.parametrize(("name", "message"), [("a_b", "cannot look up 'a_b'"), ("Mine", "lower-case"), ("adamw", "of its own")])
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register({name: "cosmos"})


# ------------------------------------------------------------------------------------------------------ groups and schedules


@pytest.mark.shows("decay groups")
def test_weight_decay_filters() -> None:
    net = model()
    optimizer = create_optimizer_v2(net, "cosmos", lr=LR, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    skipped = net.no_weight_decay()
    assert decay == {name: 0.0 if p.ndim <= 1 or name in skipped else 0.1 for name, p in net.named_parameters()}


@pytest.mark.shows("schedulers")
def test_layer_decay_counts_once_with_and_without_a_scheduler() -> None:
    optimizer = create_optimizer_v2(model(), "cosmos", lr=LR, layer_decay=0.5)

    def rates() -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert set(scales) == {0.125, 0.25, 0.5, 1.0}
    assert rates() == pytest.approx([LR * scale for scale in scales])
    scheduler = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-4, warmup_t=2, warmup_lr_init=1e-5)
    assert rates() == pytest.approx([1e-5 * scale for scale in scales])
    scheduler.step(2)
    full = max(rates())
    assert rates() == pytest.approx([full * scale for scale in scales])
    plain = CosineLRScheduler(
        create_optimizer_v2(model(), "adamw", lr=LR, layer_decay=0.5), t_initial=10, lr_min=1e-4, warmup_t=2, warmup_lr_init=1e-5
    )
    plain.step(2)
    assert rates() == [group["lr"] for group in plain.optimizer.param_groups]


def test_a_layers_scale_changes_the_step() -> None:
    nets = [model(), model()]
    train(nets[0], create_optimizer_v2(nets[0], "cosmos", lr=LR, layer_decay=0.5), range(1))
    train(nets[1], create_optimizer_v2(nets[1], "cosmos", lr=LR), range(1))
    moved = [(net.blocks[0].mlp.fc1.weight - model().blocks[0].mlp.fc1.weight).norm().item() for net in nets]
    assert moved[0] == pytest.approx(moved[1] * 0.25, rel=1e-4)


def test_the_fallback_list_selects_the_pipeline_other() -> None:
    optimizer = create_optimizer_v2(model(), "cosmos", fallback_list=["*.proj.weight"], weight_decay=0.1)
    assert {row.entry.name: row.pipeline for row in optimizer.plan.rows}["blocks.0.attn.proj.weight"] == "other"
    assert all("use_fallback" not in group for group in optimizer.param_groups)


# ------------------------------------------------------------------------------------------------------------- the training loop


@pytest.mark.shows("clipping", "AMP")
def test_the_scaler_clips_and_skips_an_overflow() -> None:
    net = model()
    optimizer, scaler = create_optimizer_v2(net, "cosmos", lr=LR), NativeScaler(device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(net, 0)
    scaler(loss, optimizer, clip_grad=0.01, parameters=net.parameters())
    norms = torch.stack([p.grad.norm() for p in net.parameters()])
    assert norms.norm() == pytest.approx(0.01, rel=1e-3)
    assert optimizer.state[net.head.weight]["step"] == 1
    before, optimizer.param_groups[0]["lr"] = copy.deepcopy(net), LR
    optimizer.zero_grad()
    scaler(loss_of(net, 1) * float("inf"), optimizer)
    assert same_weights(net, before)


@pytest.mark.shows("accumulation")
def test_accumulated_gradients_equal_one_batch() -> None:
    nets = [model().double(), model().double()]
    optimizers = [create_optimizer_v2(net, "cosmos", lr=LR) for net in nets]
    scaler = NativeScaler(device="cpu")
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    for half in (slice(0, 2), slice(2, 4)):
        loss = nn.functional.cross_entropy(nets[0](images[half]), labels[half]) / 2
        scaler(loss, optimizers[0], need_update=half.start == 2)
    nn.functional.cross_entropy(nets[1](images), labels).backward()
    optimizers[1].step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # Newton-Schulz runs in bfloat16; a step moves entries by 1e-3


@pytest.mark.shows("resume bit-equal")
def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, Any, CosineLRScheduler]:
        net = model()
        optimizer = create_optimizer_v2(net, "cosmos", lr=LR, layer_decay=0.75, weight_decay=0.1, rank=4)
        return net, optimizer, CosineLRScheduler(optimizer, t_initial=12, t_in_epochs=False)

    def run(net: nn.Module, optimizer: Any, scheduler: CosineLRScheduler, steps: range) -> None:
        for step in steps:
            train(net, optimizer, range(step, step + 1))
            scheduler.step_update(step + 1)

    net, optimizer, scheduler = start()
    run(net, optimizer, scheduler, range(7))
    saver = CheckpointSaver(net, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0)
    run(net, optimizer, scheduler, range(7, 12))
    again, optimizer, scheduler = start()
    assert resume_checkpoint(again, str(tmp_path / "last.pth.tar"), optimizer) == 1
    run(again, optimizer, scheduler, range(7, 12))
    assert same_weights(net, again)


# ---------------------------------------------------------------------------------------------------------------- distributed


def sharded_weights() -> list[torch.Tensor]:
    """The weights of a rank's model after three steps under FSDP2."""
    register()
    net = model().double()
    mesh = init_device_mesh("cpu", (2,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = create_optimizer_v2(net, "cosmos", lr=LR, layer_decay=0.75, weight_decay=0.1, rank=4)
    for step in range(3):
        optimizer.zero_grad()
        double_loss(net, step).backward()
        optimizer.step()
    return [p.full_tensor().detach() for p in net.parameters()]


def double_loss(net: nn.Module, step: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(step)
    return nn.functional.cross_entropy(net(torch.randn(4, 3, 16, 16, generator=source, dtype=torch.float64)), torch.arange(4))


@pytest.mark.slow
@pytest.mark.shows("FSDP2")
def test_two_ranks_equal_one_process() -> None:
    net = model().double()
    optimizer = create_optimizer_v2(net, "cosmos", lr=LR, layer_decay=0.75, weight_decay=0.1, rank=4)
    for step in range(3):
        optimizer.zero_grad()
        double_loss(net, step).backward()
        optimizer.step()
    for weights in run_ranks(2, sharded_weights):
        for p, q in zip(net.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ missing library


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, r"needs timm, which is not installed: pip install 'subspace-opt\[timm\]'"), ("0.9.1", "needs timm 1.0.12 or newer, and 0.9.1")],
)
def test_a_missing_or_old_timm(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "subspace_opt.integrations.timm")
    if version is None:
        monkeypatch.setitem(sys.modules, "timm", None)
    else:
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("subspace_opt.integrations.timm")
