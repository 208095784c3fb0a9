"""Flags of steps that no host has waited for, and what they mean once they are read.

step k        guard     the largest magnitude of every gradient stays on the device: gates and scales for the update
              send      the flags travel to the host beside the work of the device
step k + 1    settle    the host reads the flags of step k: it raises, or counts, and takes back the count of updates that were gated
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..capture.clock import is_capturing
from .failures import Failure, count_failures
from .gate import listed

if TYPE_CHECKING:
    from ..work import Nonfinite, Work

ALSO_ON_CPU = False  # a CPU never waits for itself, so it inspects gradients at once; tests set this to exercise the flags


_FAILED = Failure("gave NaN or infinity in an earlier step, which left its weight and its basis unchanged; the next update tries again")


class NonFiniteGradient(FloatingPointError):  # noqa: N818  the gradient is what is wrong
    """A gradient holds NaN or infinity; nothing has been changed."""


def is_deferred(device: torch.device) -> bool:
    """True if the host would have to wait for numbers on this device."""
    return device.type != "cpu" or ALSO_ON_CPU


class Sent:
    """A tensor on its way to the host. `read` waits for it alone, not for work that came later."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = value.to("cpu", non_blocking=True)  # into pinned memory
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))
        else:
            self._value = value

    def read(self) -> list[bool]:
        """The flags. Tensors on the meta device hold no numbers, so none of their flags is set."""
        if self._event is not None:
            self._event.synchronize()
        if self._value.is_meta:
            return [False] * self._value.numel()
        return [bool(flag) for flag in self._value.tolist()]


@dataclass
class Guarded:
    """One parameter as it was before the update."""

    name: str
    param: Tensor
    count: int
    refreshed: float | None
    alone: bool  # it is one matrix
    refresh: bool  # a refresh was requested

    def taken_back(self, state: dict[str, Any]) -> None:
        """Undo the bookkeeping of an update that the device did not make."""
        if self.count <= 0:  # its state holds zeros still
            state.clear()
            return
        state["step"].fill_(self.count)
        if self.refreshed is not None:
            state["refreshed"].fill_(self.refreshed)


@dataclass
class Record:
    """The flags of one inspection: for each device the parameters, and a flag for each and one for the gate of all."""

    policy: Nonfinite
    guarded: list[tuple[list[Guarded], Sent]] = field(default_factory=list)
    failing: list[tuple[list[Guarded], Sent]] = field(default_factory=list)  # one flag for each: its decomposition failed

    def find(self) -> tuple[list[str], list[Guarded]]:
        """The names of parameters with non-finite gradients, and the parameters that were not updated."""
        bad: list[str] = []
        unmoved: list[Guarded] = []
        for items, sent in self.guarded:
            *flags, closed = sent.read()
            own = [item for item, flag in zip(items, flags, strict=True) if flag]
            bad += [item.name for item in own]
            unmoved += items if closed else own if self.policy == "skip" else []
        return bad, unmoved


class Watch:
    """The flags of an optimizer that the host has not read yet."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self.capturable = False  # a graph may replay the step, so flags are also kept until they are read
        self._kept: dict[tuple[torch.device, tuple[str, ...]], Tensor] = {}
        self._replayed: dict[torch.device, tuple[str, ...]] = {}  # parameters of the last captured step
        self._closed: dict[torch.device, Tensor] = {}  # 0-d bool: a gradient was not finite, and the error has not been raised
        self._failing: list[tuple[list[Guarded], Tensor]] = []
        self._guarded: dict[str, Guarded] = {}
        self.again: set[str] = set()  # parameters whose requested refresh was gated

    # ------------------------------------------------------------------------------------------------------------ during a step

    def guard(self, work: Sequence[Work], policy: Nonfinite, largest: dict[torch.dtype, float]) -> None:
        """Give every parameter a gate and a scale for its gradient, both on the device.

        With policy `raise` all parameters share one gate, which stays closed until the error is raised; with `skip` each has its own.

        Args:
            largest: By dtype of computation, the largest entry a gradient may have; larger ones are scaled to it.
        """
        record = Record(policy)
        self.again.clear()
        found = {device: _peaks(items) for device, items in _by_device(work).items()}
        bad = {device: peaks.isfinite().logical_not_() for device, peaks in found.items()}
        if policy == "raise":
            self._close(bad)
        for device, items in _by_device(work).items():
            peaks, flags = found[device], bad[device]
            closed = self._closed[device] if policy == "raise" else torch.zeros((), dtype=torch.bool, device=device)
            opened = flags.logical_not()
            gates = [closed.logical_not()] * len(items) if policy == "raise" else list(opened.unbind(0))
            for item, gate, scale in zip(items, gates, _scales(items, peaks, largest), strict=True):
                item.gate, item.scale = gate, scale
            guarded = [self._as_it_is(item) for item in items]
            together = torch.cat([flags, closed.view(1)])
            if self.capturable:
                self._keep(device, tuple(item.name for item in items), together)
            if not self._replayed:
                record.guarded.append((guarded, Sent(together)))
        self._records.append(record)

    def _keep(self, device: torch.device, names: tuple[str, ...], flags: Tensor) -> None:
        """Add flags to those that replays of a graph leave, in a tensor of their own that no graph owns."""
        key = device, names
        if key not in self._kept:
            if is_capturing():
                raise RuntimeError(
                    f"the captured step updates {listed(names)}, and no earlier step has updated the same ones; run the training step "
                    "a few times before the capture"
                )
            self._kept[key] = torch.zeros_like(flags)
        self._kept[key].logical_or_(flags)
        if is_capturing():
            self._replayed[device] = names

    def _after_replays(self) -> list[str]:
        """Names of parameters whose gradients were not finite in a replayed step. It waits for the replays."""
        bad: list[str] = []
        for device, names in self._replayed.items():
            *flags, closed = Sent(self._kept[device, names]).read()
            bad += [name for name, flag in zip(names, flags, strict=True) if flag and closed]
        return bad

    def _close(self, bad: dict[torch.device, Tensor]) -> None:
        """Close the gate of every device if a gradient on any of them is not finite."""
        trips = [flags.any() for flags in bad.values()]
        for device in bad:
            if device not in self._closed:
                self._closed[device] = torch.zeros((), dtype=torch.bool, device=device)
            closed = self._closed[device]
            for trip in trips:
                closed.logical_or_(trip.to(device, non_blocking=True))

    def _as_it_is(self, item: Work) -> Guarded:
        mark = item.state.get("refreshed") if item.last_refresh is None else item.last_refresh
        made = self._guarded[item.name] = Guarded(
            item.name,
            item.param,
            item.count,
            refreshed=None if mark is None else float(mark),
            alone=len(item.splits) == 1 and item.splits[0][0].total == 1,
            refresh=item.refresh,
        )
        return made

    def failing(self, names: Iterable[str], flags: Tensor) -> None:
        """Note, for each of some matrices, the parameter and a flag on the device: its decomposition failed."""
        self._failing.append(([self._guarded[name] for name in names], flags))

    def send(self) -> None:
        """Send the flags of failed decompositions, at the end of a step. Those of replayed steps gate the update and are not counted."""
        if self._replayed:
            self._failing.clear()
        for device in {flags.device for _, flags in self._failing}:
            there = [(items, flags) for items, flags in self._failing if flags.device == device]
            items = [item for some, _ in there for item in some]
            self._records[-1].failing.append((items, Sent(torch.cat([flags for _, flags in there]))))
        self._failing.clear()
        self._guarded.clear()

    # --------------------------------------------------------------------------------------------------------------- afterwards

    def settle(self, state: Any, skipped: dict[str, int], failures: dict[str, int]) -> None:
        """Read all flags. `state`: the optimizer's; `skipped`, `failures`: its counts by parameter, kept up to date.

        Raises:
            NonFiniteGradient: with policy `raise`. Weights and state are those of before that step.
            torch.linalg.LinAlgError: a decomposition failed `MOST_FAILURES` times in a row for one parameter.
        """
        records, self._records = self._records, []
        raising = self._after_replays()
        failed: dict[str, bool] = {}
        for record in records:
            bad, unmoved = record.find()
            for item in reversed(unmoved):
                item.taken_back(state[item.param])
            if record.policy == "raise":
                self.again |= {item.name for item in unmoved if item.refresh}
                raising += [name for name in bad if name not in raising]
            for name in bad if record.policy == "skip" else ():
                skipped[name] = skipped.get(name, 0) + 1
            failed |= _failed(record, {item.name for item in unmoved}, state)
        if raising:
            for kept in (*self._closed.values(), *self._kept.values()):
                kept.zero_()
            raise NonFiniteGradient(
                f"the gradient of {listed(raising)} held NaN or infinity in an earlier step; nothing has been changed since. Look for its "
                "cause, lower lr, clip, or build with nonfinite='skip' to leave such parameters alone for the step"
            )
        count_failures({name: _FAILED if has_failed else None for name, has_failed in failed.items()}, failures)


def _by_device(work: Sequence[Work]) -> dict[torch.device, list[Work]]:
    found: dict[torch.device, list[Work]] = {}
    for item in work:
        found.setdefault(item.grad.device, []).append(item)
    return found


def _peaks(work: Sequence[Work]) -> Tensor:
    """The largest magnitude of every gradient of one device, `(n,)`; NaN if it holds NaN."""
    found = torch._foreach_norm([item.grad for item in work], torch.inf)
    widest = torch.float64 if any(f.dtype == torch.float64 for f in found) else torch.float32
    return torch.stack([f.to(widest) for f in found])


def _scales(work: Sequence[Work], peaks: Tensor, largest: dict[torch.dtype, float]) -> list[Tensor]:
    """The factor that brings each gradient into range, 0-d in its dtype of computation: 1 if it is in range."""
    exact = torch.float32 if peaks.device.type == "mps" else torch.float64  # MPS has no float64
    wide = peaks.to(exact)
    out: dict[torch.dtype, Sequence[Tensor]] = {}
    for dtype in {item.row.compute_dtype for item in work}:
        limit = largest[dtype]
        out[dtype] = torch.where(wide > limit, limit / wide, 1.0).to(dtype).unbind(0)
    return [out[item.row.compute_dtype][i] for i, item in enumerate(work)]


def _failed(record: Record, unmoved: set[str], state: Any) -> dict[str, bool]:
    """For each parameter that took a decomposition: True if one failed. A first update that failed is not counted."""
    found: dict[str, bool] = {}
    for items, sent in record.failing:
        for item, flag in zip(items, sent.read(), strict=True):
            found[item.name] = found.get(item.name, False) or flag
            if flag and item.alone and item.count <= 0 and item.name not in unmoved:
                item.taken_back(state[item.param])
    return found
