"""Lightning: the return value of `LightningModule.configure_optimizers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..arguments import SpecLike
from ..optimizer import SubspaceOptimizer, build
from .libraries import needed
from .whole_state import save_whole_tensors

needed("lightning", "lightning", at_least="2.5")

from lightning import LightningModule  # noqa: E402 -- after its version
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy  # noqa: E402


def optimizer_config(
    module: LightningModule,
    spec: SpecLike = "cosmos",
    *,
    scheduler: Callable[[SubspaceOptimizer], LRScheduler | ReduceLROnPlateau] | None = None,
    interval: Literal["step", "epoch"] = "step",
    monitor: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """An optimizer from a spec and its scheduler, as `configure_optimizers` returns them.

    Call it in `configure_optimizers`, where the parameters are those that Lightning trains: after `configure_model` has sharded them.

    Args:
        scheduler: Makes a scheduler for the optimizer, such as `lambda optimizer: CosineAnnealingLR(optimizer, 1000)`.
        interval: Step the scheduler after every update, or after every epoch. Lightning's own default is the epoch.
        monitor: The logged value that `ReduceLROnPlateau` reads.
        options: Options of `subspace_opt.build`. With `process_group`, the ranks of DDP divide work and state, and checkpoints hold whole
            tensors.

    Raises:
        ValueError: `ReduceLROnPlateau` without `monitor`, an interval that Lightning does not know, or a strategy that flattens parameters.
    """
    strategy = module.trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{type(strategy).__name__} flattens matrices, so they have no rows and columns; use ModelParallelStrategy (FSDP2)"
        )
    if interval not in ("step", "epoch"):
        raise ValueError(f"interval is '{interval}'; give 'step' or 'epoch'")
    optimizer = build(spec, module, **options)
    if options.get("process_group") is not None:
        save_whole_tensors(optimizer)
    config: dict[str, Any] = {"optimizer": optimizer}
    if scheduler is not None:
        made = scheduler(optimizer)
        if isinstance(made, ReduceLROnPlateau) and monitor is None:
            raise ValueError("ReduceLROnPlateau reads a logged value; name it, such as monitor='val_loss'")
        config["lr_scheduler"] = {"scheduler": made, "interval": interval, **({"monitor": monitor} if monitor else {})}
    return config
