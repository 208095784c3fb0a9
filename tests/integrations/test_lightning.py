"""Lightning: does the optimizer train in Trainer, and does a run resume to the bit, on one rank and on two?"""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vision  # noqa: F401 -- before libraries that import torchvision
from torch import Tensor, nn

pytest.importorskip("lightning")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch.distributed as dist
from launched import launched
from lightning import LightningModule, Trainer
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from pool import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from subspace_opt.integrations.lightning import optimizer_config

LIBRARY = "lightning"
NOT = {"decay groups": "the caller makes the groups, as without Lightning"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


class Tokens(LightningModule):
    """Predicts the next token; every option of the optimizer is given from outside."""

    def __init__(self, spec: str = "cosmos", shard: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 20))
        self.spec, self.shard = spec, shard
        self.options = {"overrides": {"matrix.selector.rank": 3}, "lr": 1e-2, "scheduler": lambda opt: CosineAnnealingLR(opt, 6), **options}
        self.dtypes: set[torch.dtype] = set()
        self.seen: list[dict[str, Tensor]] = []

    def configure_model(self) -> None:
        if self.shard:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def loss_of(self, tokens: Tensor) -> Tensor:
        out = self.net(tokens)
        self.dtypes.add(out.dtype)
        return nn.functional.cross_entropy(out.float(), (tokens + 1) % 20)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        loss = self.loss_of(tokens)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        config = optimizer_config(self, self.spec, **self.options)
        config["optimizer"].register_step_post_hook(lambda *_: self.seen.append({n: p.grad.clone() for n, p in self.named_parameters()}))
        return config


class Rates(Callback):
    """Keeps the learning rate of every update."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def batches() -> DataLoader[Any]:
    tokens = torch.randint(0, 20, (36,), generator=torch.Generator().manual_seed(1))
    return DataLoader(list(tokens), batch_size=6)  # type: ignore[arg-type]


def trainer_of(folder: Path | str, **options: Any) -> Trainer:
    given = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "default_root_dir": str(folder),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
    }
    return Trainer(**{**given, **options})


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in module.named_parameters()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def saves(folder: Path | str, *more: Callback) -> dict[str, Any]:
    """Options of a Trainer that saves after every epoch, `epoch=0.ckpt` first."""
    return {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), *more]}


# ------------------------------------------------------------------------------------------------------------------- one rank


@pytest.mark.shows("builds", "names", "schedulers", "resume bit-equal", "AMP")
@pytest.mark.parametrize(
    ("spec", "precision"), [("cosmos", "32-true"), ("galore", "32-true"), ("dion", "bf16-mixed"), ("cosmos", "bf16-true")]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, spec: str, precision: str) -> None:
    first, rates = Tokens(spec), Rates()
    trainer_of(tmp_path, precision=precision, **saves(tmp_path, rates)).fit(first, batches())
    opt = first.optimizers().optimizer
    assert opt.param_groups[0]["param_names"] == [name for name, _ in first.named_parameters()]
    assert opt.plan.by_name["net.0.weight"].role.name == "embedding"
    assert len(rates.rates) == len(set(rates.rates)) == 6, "the scheduler moves at every update"
    assert first.dtypes == {torch.float32 if precision == "32-true" else torch.bfloat16}
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    again, later = Tokens(spec), Rates()
    trainer_of(tmp_path, precision=precision, **saves(tmp_path, later)).fit(again, batches(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert later.rates == rates.rates[3:]
    assert differing(whole(first), whole(again)) == []


@pytest.mark.shows("accumulation", "clipping")
def test_gradients_are_accumulated_and_clipped_before_the_step(tmp_path: Path) -> None:
    clipped, plain = Tokens(), Tokens()
    trainer_of(tmp_path, gradient_clip_val=0.1, max_steps=1).fit(clipped, batches())
    trainer_of(tmp_path, gradient_clip_val=None, max_steps=1).fit(plain, batches())
    one, two, *_ = batches()
    expected = Tokens()
    ((expected.loss_of(one) + expected.loss_of(two)) / 2).backward()
    torch.testing.assert_close(plain.seen[0], {name: p.grad for name, p in expected.named_parameters()})
    assert nn.utils.clip_grad_norm_(expected.parameters(), 0.1) > 0.1
    torch.testing.assert_close(clipped.seen[0], {name: p.grad for name, p in expected.named_parameters()})


def test_learning_rates_are_monitored(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    trainer_of(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[LearningRateMonitor("step", log_weight_decay=True)]).fit(
        Tokens(weight_decay=0.25), batches()
    )
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lr-SubspaceOptimizer"]]
    rates = [float(row["lr-SubspaceOptimizer"]) for row in rows]
    assert rates[0] == 1e-2
    assert len(set(rates)) == 6
    assert {row["lr-SubspaceOptimizer-weight_decay"] for row in rows} == {"0.25"}


def test_schedulers_by_epoch_and_by_a_logged_value(tmp_path: Path) -> None:
    by_value = Tokens(scheduler=lambda opt: ReduceLROnPlateau(opt, factor=0.5, patience=0, mode="max"), interval="epoch", monitor="loss")
    config = by_value.configure_optimizers()["lr_scheduler"]
    assert (config["interval"], config["monitor"]) == ("epoch", "loss")
    trainer_of(tmp_path, max_epochs=3).fit(by_value, batches())
    assert by_value.optimizers().param_groups[0]["lr"] < 1e-2, "the loss falls, and mode 'max' takes that for a plateau"
    assert "lr_scheduler" not in Tokens(scheduler=None).configure_optimizers()
    with pytest.raises(ValueError, match=r"^ReduceLROnPlateau reads a logged value; name it, such as monitor='val_loss'$"):
        Tokens(scheduler=ReduceLROnPlateau).configure_optimizers()
    with pytest.raises(ValueError, match="interval is 'batch'; give 'step' or 'epoch'"):
        Tokens(interval="batch").configure_optimizers()


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_flatten_parameters_are_refused(tmp_path: Path, strategy: str) -> None:
    module = Tokens()
    module.trainer = trainer_of(tmp_path)
    flattening = getattr(strategies, strategy)
    module.trainer._accelerator_connector.strategy = flattening.__new__(flattening)  # making one needs accelerators
    with pytest.raises(ValueError, match=rf"^{strategy} flattens matrices, .*; use ModelParallelStrategy \(FSDP2\)$"):
        module.configure_optimizers()


# ------------------------------------------------------------------------------------------------------------------ two ranks


def resumed(folder: str, layout: str) -> dict[str, Any]:
    def fit(checkpoint: str | None) -> Tokens:
        options = {"process_group": dist.group.WORLD} if layout == "DDP divided" else {}
        module = Tokens(shard=layout.startswith("FSDP2"), **options)
        strategy: Any = DDPStrategy()
        if module.shard:
            strategy = ModelParallelStrategy(
                data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=layout == "FSDP2 sharded"
            )
        trainer = trainer_of(
            folder,
            devices=2,
            strategy=strategy,
            plugins=[TorchElasticEnvironment()],
            accumulate_grad_batches=1,
            **saves(folder),
        )
        trainer.fit(module, batches(), ckpt_path=checkpoint)
        return module

    with launched():
        first = fit(None)
        opt = first.optimizers().optimizer
        kept = sum(value.numel() for slots in opt.state.values() for value in slots.values())
        again = fit(f"{folder}/epoch=0.ckpt")
        kind = type(next(first.parameters())).__name__
        return {"type": kind, "differing": differing(whole(first), whole(again)), "kept": kept, "weights": whole(first)}


@pytest.mark.slow
@pytest.mark.shows("FSDP2")
@pytest.mark.parametrize("layout", ["DDP", "DDP divided", "FSDP2 sharded", "FSDP2 full"])
def test_a_run_on_two_ranks_resumes_to_the_bit(tmp_path: Path, layout: str) -> None:
    first, second = run_ranks(2, resumed, str(tmp_path), layout)
    assert first["differing"] == second["differing"] == []
    assert first["type"] == ("DTensor" if layout.startswith("FSDP2") else "Parameter")
    assert differing(first["weights"], second["weights"]) == []
    all_of_it = sum(p.numel() for p in Tokens().parameters())
    assert (first["kept"] + second["kept"] < 3 * all_of_it) == (layout != "DDP"), "ranks divide the state, or each keeps all of it"


# -------------------------------------------------------------------------------------------------------------------- library


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"needs lightning, which is not installed: pip install 'subspace-opt\[lightning\]'$"),
        ("1.9.1", "needs lightning 2.5 or newer, and 1.9.1 is installed: .* --upgrade$"),
    ],
)
def test_a_missing_or_old_library_gives_one_message(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "subspace_opt.integrations.lightning")
    if version is None:
        monkeypatch.setitem(sys.modules, "lightning", None)
    else:
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ImportError, match=message):
        importlib.import_module("subspace_opt.integrations.lightning")
