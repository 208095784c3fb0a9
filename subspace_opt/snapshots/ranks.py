"""The ranks that do something together: what one of them finds or raises is known to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from .manifest import SnapshotError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that save or load together; one where torch.distributed is not initialized."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    alone: bool

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1, alone=True)
        return cls(group, dist.get_rank(group), dist.get_world_size(group), alone=False)

    def each(self, function: Callable[[], T]) -> list[T]:
        """What the function returns on every rank, by rank. If it raises on one, all raise, and none is left waiting."""
        if self.alone:
            return [function()]
        own: Exception | None = None
        try:
            mine: tuple[Any, str | None] = (function(), None)
        except Exception as error:
            own, mine = error, (None, f"{type(error).__name__}: {error}")
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        if own is not None:
            raise own
        failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(everyone) if text is not None]
        if failed:
            raise SnapshotError("; ".join(failed))
        return [value for value, _ in everyone]

    def lead(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, which alone calls it."""
        found: Any = self.each(lambda: function() if self.rank == 0 else None)[0]
        return found  # type: ignore[no-any-return]

    def every(self, function: Callable[[], T]) -> T:
        """The rank's own value, which is not sent to the others; if the function raises on one, all raise."""
        held: list[T] = []
        self.each(lambda: held.append(function()))
        return held[0]

    def check_background(self) -> None:
        if self.size == 1:
            return
        remedy = 'make one once, torch.distributed.new_group(backend="gloo"), and give it as process_group here and to nothing else'
        if self.group is None or self.group is dist.group.WORLD:
            raise SnapshotError(f"async_save on {self.size} ranks needs a process group that training does not use: {remedy}")
        if "gloo" not in dist.get_backend_config(self.group):
            raise SnapshotError(f"async_save needs a gloo group and this one is {dist.get_backend_config(self.group)}: {remedy}")
