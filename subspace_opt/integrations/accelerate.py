"""Accelerate: an optimizer for a model, before or after `Accelerator.prepare`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..arguments import SpecLike
from ..optimizer import SubspaceOptimizer, build
from .libraries import needed
from .whole_state import save_whole_tensors

needed("accelerate", "accelerate", at_least="1.0")

from accelerate import Accelerator  # noqa: E402 -- after its version
from accelerate.utils import DistributedType  # noqa: E402


def optimizer_for(accelerator: Accelerator, model: nn.Module, spec: SpecLike = "cosmos", **options: Any) -> SubspaceOptimizer:
    """An optimizer from a spec, to be given to `accelerator.prepare`.

    With a model that `prepare` has wrapped for data parallelism, the ranks divide work and state. `state_dict()` is then a collective and
    returns whole tensors, because `accelerator.save_state` writes the state of one rank. With a model that is not wrapped, every rank keeps
    the whole state.

    Args:
        model: Before or after `prepare`. FSDP2 takes model and optimizer in one call of `prepare`, so build the optimizer before it.
        options: Options of `SubspaceOptimizer`.

    Raises:
        ValueError: The accelerator trains with DeepSpeed, Megatron-LM or FSDP1, which flatten or replace parameters.
    """
    _refuse(accelerator)
    optimizer = build(spec, model, **options)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        save_whole_tensors(optimizer)
    return optimizer


def _refuse(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"{kind.value} has optimizers of its own, which flatten matrices; use FSDP2 (fsdp_version=2) or DDP")
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError("FSDP1 flattens matrices, so they have no rows and columns; use FSDP2: fsdp_version=2")
