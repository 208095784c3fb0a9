"""Count the bytes that a rank hands to collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Traffic:
    """Bytes of one step."""

    moved: int = 0  # sent to other ranks by all-to-all
    agreed: int = 0  # handed to all-reduces


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes that this rank hands to all-to-alls and all-reduces inside the block.

    The part of an all-to-all that a rank sends to itself does not count.
    """
    import torch.distributed as dist

    traffic = Traffic()
    distributed: Any = dist
    exchange, reduce = distributed.all_to_all_single, distributed.all_reduce

    def count_exchange(output: Tensor, sent: Tensor, outputs: Any = None, inputs: Any = None, group: Any = None, **rest: Any) -> Any:
        world = dist.get_world_size(group)
        split = list(inputs) if inputs is not None else [sent.size(0) // world] * world
        own = split[dist.get_rank(group)]
        entries = sent.numel() // sent.size(0) if sent.size(0) else 0
        traffic.moved += (sum(split) - own) * entries * sent.element_size()
        return exchange(output, sent, outputs, inputs, group=group, **rest)

    def count_reduce(tensor: Tensor, *arguments: Any, **rest: Any) -> Any:
        traffic.agreed += tensor.numel() * tensor.element_size()
        return reduce(tensor, *arguments, **rest)

    distributed.all_to_all_single, distributed.all_reduce = count_exchange, count_reduce
    try:
        yield traffic
    finally:
        distributed.all_to_all_single, distributed.all_reduce = exchange, reduce
