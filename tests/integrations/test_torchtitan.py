"""torchtitan's containers, flat checkpoints and model parts with optimizers of this package, on a tiny model."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig
from torchtitan.distributed.utils import clip_grad_norm_

import subspace_opt
from subspace_opt.integrations.torchtitan import SubspaceOptimizersContainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from pool import run_ranks

LIBRARY = "torchtitan"
VOCABULARY, WIDTH, LR = 24, 8, 1e-2
RANK = {"matrix.selector.rank": 4}
SPECS = {"cosmos": RANK, "apollo": {**RANK, "matrix.selector.every": 3}, "galore": {**RANK, "matrix.selector.every": 3}}  # apollo draws


class Decoder(nn.Module):
    """A part of a decoder, with the module names of torchtitan's."""

    def __init__(self, layers: range = range(3), whole: range = range(3)) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH) if layers.start == whole.start else None
        self.layers = nn.ModuleDict({str(i): nn.Linear(WIDTH, WIDTH) for i in layers})
        self.norm = nn.RMSNorm(WIDTH) if layers.stop == whole.stop else None
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False) if layers.stop == whole.stop else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.tok_embeddings is None else self.tok_embeddings(x)
        for layer in self.layers.values():
            x = x + torch.tanh(layer(x))
        return x if self.lm_head is None else self.lm_head(self.norm(x))


def model(dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    return Decoder().to(dtype)


def cut(net: Decoder) -> list[Decoder]:
    """The model as two parts of a pipeline."""
    parts = [Decoder(range(2)), Decoder(range(2, 3))]
    for part in parts:
        part.to(net.lm_head.weight.dtype).load_state_dict(net.state_dict(), strict=False)
    return parts


def container(parts: list[nn.Module], spec: str = "cosmos", **fields: Any) -> SubspaceOptimizersContainer:
    config = SubspaceOptimizersContainer.Config(spec=spec, **{"lr": LR, "overrides": SPECS.get(spec, {}), **fields})
    return config.build(model_parts=parts)


def schedulers(optimizers: SubspaceOptimizersContainer) -> LRSchedulersContainer:
    return LRSchedulersContainer.Config(warmup_steps=2, decay_type="cosine").build(optimizers=optimizers, training_steps=12)


def loss_of(parts: list[nn.Module], step: int) -> Tensor:
    tokens = torch.randint(VOCABULARY, (16,), generator=torch.Generator().manual_seed(step))
    x = tokens
    for part in parts:
        x = part(x)
    return nn.functional.cross_entropy(x, (tokens * 5 + 1) % VOCABULARY)


def train(parts: list[nn.Module], optimizers: SubspaceOptimizersContainer, lrs: LRSchedulersContainer, steps: range) -> None:
    for step in steps:
        optimizers.zero_grad()
        loss_of(parts, step).backward()
        clip_grad_norm_([p for part in parts for p in part.parameters()], 1.0)
        optimizers.step()
        lrs.step()


def weights(parts: list[nn.Module]) -> dict[str, Tensor]:
    whole = {name: p.detach() for part in parts for name, p in part.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in whole.items()}


def manager(folder: Path, parts: list[nn.Module], optimizers: SubspaceOptimizersContainer, lrs: LRSchedulersContainer) -> CheckpointManager:
    config = CheckpointManager.Config(enable=True, interval=1, keep_latest_k=0, last_save_model_only=False)
    own = {"model_parts": parts, "optimizers": optimizers, "lr_schedulers": lrs, "base_folder": str(folder)}
    return config.build(dataloader=None, states={}, sd_adapter=None, **own)


# --------------------------------------------------------------------------------------------------------------- creation


@pytest.mark.shows("builds", "names")
def test_names_are_canonical_and_roles_come_from_the_model() -> None:
    net = model()
    wanted = [(row.entry.name, row.pipeline, row.role.name) for row in subspace_opt.build("cosmos", net).plan.rows]
    net.layers["1"] = checkpoint_wrapper(net.layers["1"])  # as activation checkpointing does
    assert any("_checkpoint_wrapped_module" in name for name, _ in net.named_parameters())
    (optimizer,) = container([net])
    assert [(row.entry.name, row.pipeline, row.role.name) for row in optimizer.plan.rows] == wanted
    assert ("lm_head.weight", "other", "head") in wanted


def test_steps_equal_those_of_build() -> None:
    nets = [model(), model()]
    optimizers = container([nets[0]], spec="apollo", weight_decay=0.3, options={"seed": 3})  # a spec with random draws
    built = subspace_opt.build("apollo", nets[1], lr=LR, weight_decay=0.3, overrides=SPECS["apollo"], seed=3)
    for step in range(3):
        for net, optimizer in zip(nets, (optimizers, built), strict=True):
            optimizer.zero_grad()
            loss_of([net], step).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.shows("decay groups")
def test_groups_by_pattern_and_another_optimizer_beside_the_spec() -> None:
    groups = [
        ParamGroupConfig(pattern="norm|bias", optimizer_name="Subspace", optimizer_kwargs={"weight_decay": 0.0}),
        ParamGroupConfig(pattern="tok_embeddings", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
        ParamGroupConfig(pattern=r"layers\.0", optimizer_name="Subspace", optimizer_kwargs={"use": "other"}),
        ParamGroupConfig(pattern=".*", optimizer_name="Subspace"),
    ]
    ours, adamw = container([model()], param_groups=groups, weight_decay=0.1, implementation="foreach")
    decay = {name: group["weight_decay"] for group in ours.param_groups for name in group["param_names"]}
    assert (decay["layers.0.bias"], decay["norm.weight"], decay["layers.1.weight"]) == (0.0, 0.0, 0.1)
    assert {row.entry.name: row.pipeline for row in ours.plan.rows}["layers.0.weight"] == "other"
    assert (type(adamw), adamw.param_groups[0]["foreach"]) == (torch.optim.AdamW, True)


def test_a_pattern_without_parameters_and_bad_options() -> None:
    with pytest.raises(ValueError, match="matched no parameters"):
        container([model()], param_groups=[ParamGroupConfig(pattern="nothing", optimizer_name="Subspace")])
    with pytest.raises(TypeError, match=r"use overrides=\{'matrix.selector.rank': 4\}"):
        container([model()], options={"rank": 4})
    with pytest.raises(subspace_opt.SpecError, match="no preset 'cosmo'"):
        container([model()], spec="cosmo")


# ------------------------------------------------------------------------------------------------------------- the training loop


@pytest.mark.shows("schedulers")
def test_the_schedulers_container_drives_every_part() -> None:
    parts = cut(model())
    optimizers = container(parts)
    train(parts, optimizers, schedulers(optimizers), range(3))
    rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert len(optimizers) == 2
    assert len(rates) == 1
    assert 0 < rates.pop() < LR


@pytest.mark.shows("clipping", "accumulation")
def test_accumulated_and_clipped_gradients_equal_one_batch() -> None:
    nets = [model(torch.float64), model(torch.float64)]
    for net in nets:
        optimizers, parts = container([net], spec="galore"), [net]
        if net is nets[0]:
            for step in range(2):
                (loss_of(parts, step) / 2).backward()
        else:
            ((loss_of(parts, 0) + loss_of(parts, 1)) / 2).backward()
        clip_grad_norm_(net.parameters(), 0.1)
        assert torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]) == pytest.approx(0.1, rel=1e-4)
        optimizers.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_parts_of_a_pipeline_equal_the_whole_model() -> None:
    net = model(torch.float64)
    parts = cut(net)
    for some in ([net], parts):
        optimizers = container(some, spec="apollo")
        train(some, optimizers, schedulers(optimizers), range(5))
    for (name, p), (_, q) in zip(sorted(weights([net]).items()), sorted(weights(parts).items()), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def continued(folder: Path, spec: str) -> list[dict[str, Tensor]]:
    """The weights at the end of a run, and of a run that was saved and continued by a new container."""
    ends = []
    for resumed in (False, True):
        parts = cut(model())
        optimizers = container(parts, spec=spec)
        lrs = schedulers(optimizers)
        checkpoints = manager(folder, parts, optimizers, lrs)
        if resumed:
            assert checkpoints.load()
        else:
            train(parts, optimizers, lrs, range(7))
            checkpoints.save(7)
        train(parts, optimizers, lrs, range(7, 12))
        ends.append(weights(parts))
    return ends


@pytest.mark.slow
@pytest.mark.shows("resume bit-equal")
@pytest.mark.parametrize("spec", SPECS)
def test_a_resumed_run_is_bit_equal(spec: str, tmp_path: Path) -> None:
    (ends,) = run_ranks(1, continued, tmp_path, spec)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_loading_keeps_names_as_keys_of_random_draws() -> None:
    first, second = container([model()], spec="apollo"), container([model()], spec="apollo")
    second.load_state_dict(first.state_dict())
    assert [row.entry.key for row in second.optimizers[0].plan.rows] == [row.entry.key for row in first.optimizers[0].plan.rows]
    assert second.state_dict().keys() == first.state_dict().keys()


def test_a_flat_state_of_two_parts_loads_into_one() -> None:
    net = model()
    parts = cut(net)
    optimizers, whole = container(parts), container([net])
    train(parts, optimizers, schedulers(optimizers), range(3))
    saved = {key: value for key, value in optimizers.state_dict().items() if "initial_lr" not in key}
    whole.load_state_dict(saved)
    loaded = whole.state_dict()
    assert saved.keys() == loaded.keys()
    for key, value in saved.items():
        assert torch.equal(value, loaded[key]) if isinstance(value, Tensor) else value == loaded[key], key


# ---------------------------------------------------------------------------------------------------------------- distributed


def sharded(folder: Path, size: int, policy: MixedPrecisionPolicy, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """A run under FSDP2 that is saved after four steps: its weights at step four and eight, and those of a run that was loaded."""
    mesh = init_device_mesh("cpu", (size,))
    out = []
    for resumed in (False, True):
        net = model(dtype)
        for layer in net.layers.values():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(net, mesh=mesh, mp_policy=policy)
        optimizers = container([net])
        lrs = schedulers(optimizers)
        checkpoints = manager(folder, [net], optimizers, lrs)
        if resumed:
            assert checkpoints.load()
        else:
            train([net], optimizers, lrs, range(4))
            checkpoints.save(4)
        train([net], optimizers, lrs, range(4, 8))
        out.append(weights([net]))
        dist.barrier()
    return out


@pytest.mark.slow
@pytest.mark.shows("FSDP2")
def test_two_ranks_equal_one_process_and_resume_bit_equal(tmp_path: Path) -> None:
    net = model(torch.float64)
    optimizers = container([net])
    train([net], optimizers, schedulers(optimizers), range(8))
    for straight, resumed in run_ranks(2, sharded, tmp_path, 2, MixedPrecisionPolicy(), torch.float64):
        for name, p in weights([net]).items():
            torch.testing.assert_close(straight[name], p, rtol=1e-8, atol=1e-10, msg=name)
            assert torch.equal(straight[name], resumed[name])


@pytest.mark.slow
@pytest.mark.shows("AMP")
def test_fsdps_mixed_precision_trains_and_resumes_bit_equal(tmp_path: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for straight, resumed in run_ranks(2, sharded, tmp_path, 2, policy, torch.float32):
        assert all(torch.equal(straight[name], resumed[name]) and straight[name].dtype is torch.float32 for name in straight)
        assert not torch.equal(straight["layers.0.weight"], model().layers["0"].weight)


# ------------------------------------------------------------------------------------------------------------ missing library


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"needs torchtitan, which is not installed: pip install 'subspace-opt\[torchtitan\]'"),
        ("0.2.1", "torchtitan 0.3 or newer, and 0.2.1"),
    ],
)
def test_a_missing_or_old_torchtitan(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "subspace_opt.integrations.torchtitan")
    if version is None:
        monkeypatch.setitem(sys.modules, "torchtitan", None)
    else:
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("subspace_opt.integrations.torchtitan")


def test_torchtitans_own_model_and_command_line() -> None:
    pytest.importorskip("triton", reason="torchtitan's models need it, and it comes with PyTorch for CUDA")
    from torchtitan.config.manager import ConfigManager
    from torchtitan.models.llama3 import model_registry

    config = ConfigManager().parse_args(["--module", __name__, "--config", "llama3_cosmos", "--optimizer.lr", "1e-3"])
    assert (config.optimizer.spec, config.optimizer.lr, config.optimizer.overrides) == ("cosmos", 1e-3, RANK)
    with torch.device("meta"):
        net = model_registry("debugmodel").model.build()
    (optimizer,) = config.optimizer.build(model_parts=[net])
    seen = {row.entry.name: (row.role.name, str(row.view), row.pipeline) for row in optimizer.plan.rows}
    assert seen["layers.0.attention.qkv_linear.wqkv.weight"] == ("fused", "q 256x256 + k 256x256 + v 256x256", "matrix")
    assert seen["tok_embeddings.weight"][0] == "embedding"
    assert seen["lm_head.weight"][0] == "head"


def llama3_cosmos() -> Any:
    """An entry of a config registry, which this module then is."""
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = llama3_debugmodel()
    config.optimizer = SubspaceOptimizersContainer.Config(spec="cosmos", lr=2e-3, overrides=RANK)
    return config


def test_a_config_serializes_and_can_be_changed() -> None:
    config = SubspaceOptimizersContainer.Config(spec="galore", overrides=RANK)
    assert config.to_dict()["overrides"] == RANK
    assert replace(config, spec="cosmos").build(model_parts=[model()]).optimizers[0].spec.name == "cosmos"
