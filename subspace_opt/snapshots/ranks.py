"""Ranks that save or load together: call a function on one or all of them, share its result, and raise an error on all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from .manifest import SnapshotError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks that save or load together; this process alone if torch.distributed is not initialized."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    alone: bool

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a process group; of the default group if it is None."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, 1, alone=True)
        return cls(group, dist.get_rank(group), dist.get_world_size(group), alone=False)

    def gather(self, function: Callable[[], T]) -> list[T]:
        """Call the function on every rank. Returns the results of all ranks, in the order of ranks, on every rank.

        If the function raises on one rank, all ranks raise, so that none waits forever.
        """
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

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """Call the function on rank 0 only. Returns its result on every rank; if it raises, all ranks raise."""
        found: Any = self.gather(lambda: function() if self.rank == 0 else None)[0]
        return found  # type: ignore[no-any-return]

    def every_rank(self, function: Callable[[], T]) -> T:
        """Call the function on every rank. Returns the rank's own result, which is not sent; if one rank raises, all ranks raise."""
        held: list[T] = []
        self.gather(lambda: held.append(function()))
        return held[0]

    def check_background(self) -> None:
        """Check that a save can run in the background.

        Raises:
            SnapshotError: there are several ranks, and their group is the default group or does not use gloo.
        """
        if self.size == 1:
            return
        remedy = 'make one once, torch.distributed.new_group(backend="gloo"), and pass it as process_group here and nowhere else'
        if self.group is None or self.group is dist.group.WORLD:
            raise SnapshotError(f"async_save on {self.size} ranks needs a process group that training does not use: {remedy}")
        if "gloo" not in dist.get_backend_config(self.group):
            raise SnapshotError(f"async_save needs a gloo group and this one is {dist.get_backend_config(self.group)}: {remedy}")
