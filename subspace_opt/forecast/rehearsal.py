"""The peak of temporaries: the engine makes one step on the meta device, and a dispatch mode adds up what it allocates.

Parameters whose stacks have the same shapes need the same temporaries, so only as many take part as fill one stack of each shape. A slot
stored as codes takes part as bfloat16, which is read and written through a float32 copy as codes are. The buffers that a library allocates
inside one operation, such as a QR's workspace, are not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..algebra.frame import Frame
from ..algebra.pipeline import Pipeline
from ..algebra.storage import BITS
from ..engine.homes import Memory
from ..engine.step import compute
from ..engine.strategies import fused
from ..engine.work import Options, Work, allocate
from ..plan import Row

META = torch.device("meta")
LONG_AGO = 100  # updates that a parameter has had in the rehearsed step, at least: bases and moments exist

Group = tuple[str, str]  # role and pipeline


@dataclass(frozen=True)
class Peak:
    """Bytes of temporaries of a step. `copies` are held until its end: weights and gradients whose storage cannot be viewed as matrices."""

    most: int = 0
    copies: int = 0


@dataclass(frozen=True)
class Peaks:
    """The peaks of a step without a refresh and of one that refreshes every basis, by role and pipeline."""

    step: dict[Group, Peak]
    refresh: dict[Group, Peak]

    @property
    def at_step(self) -> int:
        """The peak of all parameters together: stacks are computed one after the other, and copies stay."""
        return _together(self.step)

    @property
    def at_refresh(self) -> int:
        """The same if every basis is refreshed in this step."""
        return _together(self.refresh)


def _together(peaks: dict[Group, Peak]) -> int:
    return max((peak.most for peak in peaks.values()), default=0) + sum(peak.copies for peak in peaks.values())


def group_of(row: Row) -> Group:
    """The role and the pipeline of a parameter."""
    return row.role.name, row.pipeline


def rehearse(rows: Sequence[Row], options: Options | None = None, known: dict[Any, tuple[Peak, Peak]] | None = None) -> Peaks:
    """The peaks of temporaries on an accelerator, for the parameters of a plan.

    A CPU needs at most this: it cuts large elementwise weights into runs of rows, and stacks fewer matrices.

    Args:
        known: Peaks found before, to which this call adds. Groups with equal pipelines and shapes are then not rehearsed again.
    """
    known = {} if known is None else known
    options = replace(options or Options(), nonfinite="propagate")  # reads no value back
    members: dict[Group, list[Row]] = defaultdict(list)
    for row in rows:
        if not row.entry.frozen and row.entry.numel:
            members[group_of(row)].append(row)
    twins = _Twins()
    step, refresh = {}, {}
    for group, own in members.items():
        left = [twins.of(row) for row in own if not _has_kernel(row)]
        key = (options, _fingerprint(left))
        if key not in known:
            known[key] = _peaks_of(left, options)
        step[group], refresh[group] = known[key]
    return Peaks(step, refresh)


def _fingerprint(rows: list[Row]) -> tuple[Any, ...]:
    """All that the temporaries of some parameters depend on."""
    pipelines = {id(frame.pipeline): frame.pipeline for row in rows for _, frame in row.splits}
    shapes = Counter((row.entry.shape, row.entry.dtype, str(row.view), row.compensated) for row in rows)
    return tuple(pipeline.model_dump_json() for pipeline in pipelines.values()), frozenset(shapes.items())


def _peaks_of(rows: list[Row], options: Options) -> tuple[Peak, Peak]:
    """The peaks of one group: of a step without a refresh, and of a step with one."""
    some = _representatives(rows, options)
    if not some:
        return Peak(), Peak()
    cast = _Cast(some, options)
    cast.play(begins=True)
    step = _scaled(cast.play(), some, rows)
    opens = any(frame.opens for row in some for _, frame in row.splits)
    return step, _scaled(cast.play(refresh=True), some, rows) if opens else step


def _scaled(peak: Peak, some: list[Row], rows: list[Row]) -> Peak:
    """The peak with the copies of all parameters, not of the representatives alone."""
    shown = sum(row.entry.numel for row in some)
    return replace(peak, copies=peak.copies * sum(row.entry.numel for row in rows) // shown)


def _representatives(rows: list[Row], options: Options) -> list[Row]:
    """As many parameters as fill one stack of each shape."""
    filled: dict[Any, int] = defaultdict(int)
    out = []
    for row in rows:
        kinds = [(id(frame), row.compute_dtype, row.entry.dtype) for _, frame in row.splits]
        each = [max(1, options.batch_bytes // (block.rows * block.cols * row.compute_dtype.itemsize)) for block, _ in row.splits]
        if any(filled[kind] < most for kind, most in zip(kinds, each, strict=True)):
            out.append(row)
            for kind, (block, _) in zip(kinds, row.splits, strict=True):
                filled[kind] += block.count
    return out


def _has_kernel(row: Row) -> bool:
    """True if a fused kernel of an accelerator updates the parameter in place, so that it needs no temporaries."""
    alone = len(row.splits) == 1 and not row.view.transposed and not row.converts and row.entry.dtype == row.compute_dtype
    return alone and fused(row.splits[0][1]) is not None


class _Twins:
    """Rows as they are rehearsed: with bfloat16 in place of codes, which exist on real devices only, and with refreshes in one step."""

    def __init__(self) -> None:
        self._pipelines: dict[int, Pipeline] = {}
        self._frames: dict[Any, Frame] = {}

    def of(self, row: Row) -> Row:
        """The row with the frames of its twin pipeline. Parameters of one shape share a frame, as in a plan."""
        return replace(row, splits=tuple((block, self._frame(frame)) for block, frame in row.splits))

    def _frame(self, frame: Frame) -> Frame:
        own = frame.pipeline
        if id(own) not in self._pipelines:
            twin = own.with_field("state_dtype", {slot: "bf16" if word in BITS else word for slot, word in own.state_dtype.items()})
            spread = own.selector.offset == "spread"
            self._pipelines[id(own)] = twin.with_field("selector", own.selector.with_field("offset", 0)) if spread else twin
        key = (id(own), frame.rows, frame.cols, frame.turned)
        if key not in self._frames:
            self._frames[key] = Frame(self._pipelines[id(own)], frame.rows, frame.cols, frame.turned)
        return self._frames[key]


class _Cast:
    """Parameters on the meta device with gradients and state, which make steps again and again."""

    def __init__(self, rows: list[Row], options: Options) -> None:
        self.rows, self.options, self.memory = rows, options, Memory()
        self.params = [torch.empty(row.entry.shape, dtype=row.entry.dtype, device=META) for row in rows]
        self.grads = [torch.empty_like(p) for p in self.params]
        self.states: list[dict[str, Any]] = [{} for _ in rows]
        for row, p, state in zip(rows, self.params, self.states, strict=True):
            allocate(row, p, state)
            # A stack of experts looks for matrices without a gradient so far, which would read values.
            self.memory.begun |= {(row.entry.name, index) for index in range(len(row.splits))}

    def play(self, *, begins: bool = False, refresh: bool = False) -> Peak:
        """Make a step and return its peak. `begins`: it is the first one."""
        work = [self._work(*given, begins, refresh) for given in zip(self.rows, self.params, self.grads, self.states, strict=True)]
        with torch.no_grad(), _Allocations() as seen:
            compute(work, self.options, self.memory, {})
        return Peak(seen.most - seen.held, seen.held)

    def _work(self, row: Row, param: Tensor, grad: Tensor, state: dict[str, Any], begins: bool, refresh: bool) -> Work:
        item = Work(row, param, grad, row.entry.lr, row.entry.weight_decay, state, refresh=refresh and not begins)
        item.count = 0 if begins else _count_between_refreshes(item)
        return item


def _count_between_refreshes(item: Work) -> int:
    """A number of updates after which the schedule refreshes no basis, the same for all parameters of a pipeline.

    If every update has a refresh, there is no such number.
    """
    opening = [frame for _, frame in item.splits if frame.opens]
    if not opening:
        return LONG_AGO
    free = (n for n in range(LONG_AGO, LONG_AGO + 10) if not opening[0].pipeline.selector.refreshes(n + (not opening[0].primes)))
    return next(free, LONG_AGO)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operations make on the meta device, as long as they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage()._cdata for value in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for value in _tensors(out):
            storage = value.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self.held += storage.nbytes()
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.held -= nbytes


def _tensors(value: Any) -> list[Tensor]:
    """The tensors on the meta device among arguments or results of an operation."""
    if isinstance(value, Tensor):
        return [value] if value.device.type == "meta" else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []
