"""Accelerate: does the optimizer go through `prepare`, and does a run resume to the bit, on one rank and on two?"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vision  # noqa: F401 -- before libraries that import torchvision
from torch import Tensor, nn

pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from accelerated import allow_fsdp, one_of_several
from pool import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR

from subspace_opt.integrations.accelerate import optimizer_for

LIBRARY = "accelerate"
NOT = {"decay groups": "the caller makes the groups, as without Accelerate"}

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning:torch")
SMALL = {"matrix.selector.rank": 3}


@pytest.fixture(autouse=True)
def forget() -> Any:
    """Accelerate keeps the state of the process's last Accelerator, which may be that of another file's trainer."""
    _reset()
    yield
    _reset()


def _reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 20))


def loss_of(model: nn.Module, step: int, rank: int = 0, size: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randint(0, 20, (size,), generator=draw)
    return nn.functional.cross_entropy(model(x).float(), (x + 1) % 20)


def train(accelerator: Accelerator, model: nn.Module, opt: Any, scheduler: Any, first: int, last: int) -> list[float]:
    """Steps of two batches with clipping; the learning rates."""
    rates = []
    for step in range(2 * first, 2 * last):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step, accelerator.process_index))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                rates.append(opt.param_groups[0]["lr"])
            opt.step()
            scheduler.step()
            opt.zero_grad()
    return rates


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def prepared(spec: str, precision: str = "no", **plugin: Any) -> tuple[Accelerator, nn.Module, Any, Any]:
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2, **plugin)
    model = net()
    opt = optimizer_for(accelerator, model, spec, overrides=SMALL)
    return accelerator, *accelerator.prepare(model, opt, CosineAnnealingLR(opt, 12))


# ------------------------------------------------------------------------------------------------------------------- one rank


@pytest.mark.shows("builds", "names", "schedulers", "resume bit-equal", "AMP")
@pytest.mark.parametrize(("spec", "precision"), [("cosmos", "no"), ("galore", "no"), ("dion", "bf16")])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, spec: str, precision: str) -> None:
    accelerator, model, opt, scheduler = prepared(spec, precision)
    dtypes = set()
    model.get_submodule("1").register_forward_hook(lambda module, given, out: dtypes.add(out.dtype))
    assert opt.param_groups[0]["param_names"] == [name for name, _ in net().named_parameters()]
    assert opt.optimizer.plan.by_name["0.weight"].role.name == "embedding"
    train(accelerator, model, opt, scheduler, 0, 3)
    accelerator.save_state(str(tmp_path))
    rates = train(accelerator, model, opt, scheduler, 3, 6)
    assert len(set(rates)) == 3
    assert dtypes == {torch.float32 if precision == "no" else torch.bfloat16}
    AcceleratorState._reset_state(True)
    accelerator, again, opt, scheduler = prepared(spec, precision)
    accelerator.load_state(str(tmp_path))
    assert train(accelerator, again, opt, scheduler, 3, 6) == rates
    assert differing(whole(model), whole(again)) == []
    assert {float(slots["step"]) for slots in opt.state.values()} == {6.0}


@pytest.mark.shows("accumulation", "clipping")
def test_gradients_are_accumulated_and_clipped_before_the_step() -> None:
    accelerator, model, opt, scheduler = prepared("cosmos")
    seen = []
    opt.optimizer.register_step_pre_hook(lambda *_: seen.append({n: p.grad.clone() for n, p in model.named_parameters()}))
    train(accelerator, model, opt, scheduler, 0, 2)
    assert len(seen) == 2
    expected = net()
    ((loss_of(expected, 0) + loss_of(expected, 1)) / 2).backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
    assert norm > 0.5
    torch.testing.assert_close(seen[0], {name: p.grad for name, p in expected.named_parameters()})


def test_deepspeed_megatron_and_fsdp1_are_refused() -> None:
    model = net()
    for kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        accelerator = Accelerator(cpu=True)
        accelerator.state.distributed_type = kind
        with pytest.raises(ValueError, match=rf"^{kind.value} has optimizers of its own, which flatten matrices; use FSDP2"):
            optimizer_for(accelerator, model)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, SimpleNamespace(fsdp_version=1)
    with pytest.raises(ValueError, match=r"^FSDP1 flattens matrices, .* use FSDP2: fsdp_version=2$"):
        optimizer_for(accelerator, model)


# ------------------------------------------------------------------------------------------------------------------ two ranks


def launched(layout: str) -> tuple[Accelerator, nn.Module, Any, Any]:
    """Accelerator, model, optimizer and scheduler of a new run."""
    AcceleratorState._reset_state(True)
    plugin: dict[str, Any] = {}
    if layout.startswith("FSDP2"):
        allow_fsdp()
        kind = "FULL_STATE_DICT" if layout.endswith("full") else "SHARDED_STATE_DICT"
        plugin["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type=kind, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
        )
    if layout != "DDP after" and layout != "FSDP2 after":
        return prepared("cosmos", **plugin)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **plugin)
    model = fully_shard(net()) if layout == "FSDP2 after" else accelerator.prepare(net())
    opt = optimizer_for(accelerator, model, "cosmos", overrides=SMALL)
    scheduler = CosineAnnealingLR(opt, 24)
    prepare = (opt, scheduler) if layout == "DDP after" else (model, opt, scheduler)
    return accelerator, model, *accelerator.prepare(*prepare)[-2:]


def resumed(folder: str, layout: str) -> dict[str, Any]:
    with one_of_several():
        accelerator, model, opt, scheduler = launched(layout)
        names = opt.param_groups[0]["param_names"]
        train(accelerator, model, opt, scheduler, 0, 3)
        accelerator.save_state(folder)
        train(accelerator, model, opt, scheduler, 3, 6)
        kept = sum(value.numel() for slots in opt.state.values() for value in slots.values())
        accelerator, again, opt, scheduler = launched(layout)
        accelerator.load_state(folder)
        train(accelerator, again, opt, scheduler, 3, 6)
        return {
            "type": type(next(model.parameters())).__name__,
            "differing": differing(whole(model), whole(again)),
            "names": names,
            "kept": kept,
            "weights": whole(model),
        }


@pytest.mark.slow
@pytest.mark.shows("FSDP2", "builds")
@pytest.mark.parametrize("layout", ["DDP", "DDP after", "FSDP2", "FSDP2 full", "FSDP2 after"])
def test_a_run_on_two_ranks_resumes_to_the_bit(tmp_path: Path, layout: str) -> None:
    first, second = run_ranks(2, resumed, str(tmp_path), layout)
    assert first["differing"] == second["differing"] == []
    assert first["type"] == ("DTensor" if layout.startswith("FSDP2") else "Parameter")
    assert differing(first["weights"], second["weights"]) == []
    assert [name.removeprefix("module.") for name in first["names"]] == [name for name, _ in net().named_parameters()]
    all_of_it = sum(p.numel() for p in net().parameters())
    divided = layout != "DDP"
    assert (first["kept"] + second["kept"] < 3 * all_of_it) == divided, "ranks divide the state, or each keeps all of it"


# -------------------------------------------------------------------------------------------------------------------- library


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"needs accelerate, which is not installed: pip install 'subspace-opt\[accelerate\]'$"),
        ("0.9.1", "needs accelerate 1.0 or newer, and 0.9.1 is installed: .* --upgrade$"),
    ],
)
def test_a_missing_or_old_library_gives_one_message(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "subspace_opt.integrations.accelerate")
    if version is None:
        monkeypatch.setitem(sys.modules, "accelerate", None)
    else:
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("subspace_opt.integrations.accelerate")
