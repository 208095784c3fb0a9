"""`observe`: the hooks around a step, their schedule, and the samples that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor

from ..engine.work import Options, Work
from ..plan import Plan, Row
from .guards import GuardCounts
from .layer import Limits, Sides, measured
from .replay import Before

Sample = dict[str, Any]
Sink = Callable[[Sample], Any]
MOST_SPECTRUM = 1024


class Observable(Protocol):
    """The parts of a `SubspaceOptimizer` that an observer reads."""

    param_groups: list[dict[str, Any]]
    state: Any
    skipped: dict[str, int]
    failures: dict[str, int]
    _options: Options

    @property
    def plan(self) -> Plan: ...

    def _shardings(self) -> Mapping[int, Any]: ...

    def _planned_parameters(self) -> list[tuple[dict[str, Any], Tensor, Row]]: ...

    def _work(self, group: dict[str, Any], p: Tensor, row: Row) -> Work: ...


def observe(
    optimizer: Any,
    every: int = 50,
    *,
    sink: Sink | Iterable[Sink] = (),
    names: str | Sequence[str] = "*",
    spectrum: int = MOST_SPECTRUM,
) -> Observer:
    """Sample what every layer's subspace does, on steps 1, 1 + `every`, 1 + 2 `every`, ...

    A sample is a plain dict, `{"step": 51, "layers": {"blocks.0.mlp.weight": {"captured_gradient": 0.83, ...}}}`. A field that does not
    apply to a layer is absent. The page `diagnostics.md` lists all fields. The weights and the state of the run keep their bits.

    Args:
        optimizer: A `SubspaceOptimizer`.
        every: Steps between two samples. Between them a step costs one comparison.
        sink: A callable that takes each sample, or several of them. `json_lines`, `tensorboard` and `logger` make such callables.
        names: Globs of parameter names; other parameters are not measured. A sampled step copies the weights of the measured parameters,
            and the state of those with a subspace.
        spectrum: The longest short side of a gradient whose singular values are computed; 0 for none.

    Returns:
        The observer. `last` is the newest sample, and `stop()` ends the observation.

    Raises:
        TypeError: The optimizer is no `SubspaceOptimizer`, or a sink is not callable.
        ValueError: `every` is less than 1, `names` match no parameter, ranks share a parameter, or the optimizer updates during
            `backward()`.
    """
    if not (hasattr(optimizer, "plan") and hasattr(optimizer, "_planned_parameters")):
        raise TypeError(f"observe reads a SubspaceOptimizer, not {type(optimizer).__name__}; pass the optimizer that build() returned")
    if getattr(optimizer, "frees_gradients", False):
        raise ValueError(
            "this optimizer updates during backward() and frees each gradient, so a sample has nothing to measure; observe a run of the "
            "ordinary optimizer (subspace_opt.build), whose weights are the same with stacking='never'"
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is {every!r}; give the number of steps between two samples, 1 or more")
    if isinstance(spectrum, bool) or not isinstance(spectrum, int) or spectrum < 0:
        raise ValueError(f"spectrum is {spectrum!r}; give the longest side whose singular values are computed, or 0 for none")
    sinks = _listed(sink)
    globs = (names,) if isinstance(names, str) else tuple(names)
    observer = Observer(optimizer, every, sinks, globs, Limits(spectrum))
    observer.start()
    optimizer.diagnostics = observer
    return observer


def _listed(sink: Sink | Iterable[Sink]) -> list[Sink]:
    sinks = [sink] if callable(sink) else list(sink)
    for each in sinks:
        if not callable(each):
            raise TypeError(f"a sink takes one sample and must be callable; {each!r} is not")
    return sinks


@dataclass(eq=False)
class Observer:
    """Samples an optimizer. Made by `observe`."""

    optimizer: Any
    every: int
    sinks: list[Sink]
    names: tuple[str, ...]
    limits: Limits
    last: Sample | None = None
    _step: int | None = None  # steps that the optimizer has made; None: to be read from its state
    _before: list[Before] | None = None  # during a sampled step
    _bases: Sides = field(default_factory=dict)  # those of the last sample
    _guards: GuardCounts = field(default_factory=GuardCounts)
    _handles: list[Any] = field(default_factory=list)

    def start(self) -> None:
        """Register the hooks. `observe` has done so."""
        if self._handles:
            return
        self._chosen()  # raises if names match nothing or a parameter is sharded
        self._guards.start(self.optimizer)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def stop(self) -> None:
        """Remove the hooks. Later steps cost nothing, and `last` stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._before, self._bases = [], None, {}

    # ---------------------------------------------------------------------------------------------------------------- hooks

    @torch.no_grad()
    def _before_step(self, optimizer: Observable, *_: Any) -> None:
        if self._step is None:
            self._step = _steps_made(optimizer)
        self._step += 1
        self._before = None
        if (self._step - 1) % self.every == 0:
            self._before = [
                Before.of(optimizer._work(group, p, row), p, optimizer.state.get(p), maximize=group["maximize"])
                for group, p, row in self._chosen()
            ]

    @torch.no_grad()
    def _after_step(self, optimizer: Observable, *_: Any) -> None:
        self._guards.count(optimizer)
        if self._before is None:
            return
        layers: dict[str, dict[str, Any]] = {}
        bases: Sides = {}
        fired = self._guards.taken()
        for before in self._before:
            if before.param.grad is not None and before.param.numel():
                layers |= measured(before, optimizer._options, self.limits, self._bases, bases, fired.get(before.work.name, {}))
        self._before, self._bases = None, {**self._bases, **bases}
        self.last = {"step": self._step, "layers": layers}
        for sink in self.sinks:
            sink(self.last)

    def _after_load(self, _: Observable) -> None:
        self._step, self._bases = None, {}

    # ------------------------------------------------------------------------------------------------------------ parameters

    def _chosen(self) -> list[tuple[dict[str, Any], Tensor, Row]]:
        """The parameters to measure."""
        optimizer: Observable = self.optimizer
        planned = optimizer._planned_parameters()
        chosen = [place for place in planned if any(fnmatchcase(place[2].entry.name, glob) for glob in self.names)]
        if not chosen:
            shown = ", ".join(place[2].entry.name for place in planned[:3])
            raise ValueError(f"names {', '.join(map(repr, self.names))} match no parameter; there are {shown}, ...")
        shardings = optimizer._shardings()
        for _, p, row in chosen:
            if id(p) in shardings:
                raise ValueError(
                    f"'{row.entry.name}' is shared by several ranks: its gradient and its basis are on different ranks, so it cannot be "
                    "measured; observe a run on one rank, or pass `names` that match unshared parameters only"
                )
        return chosen


def _steps_made(optimizer: Observable) -> int:
    """Steps before this one: the largest count of updates of a parameter."""
    return max((int(slots["step"]) for slots in optimizer.state.values() if "step" in slots), default=0)
