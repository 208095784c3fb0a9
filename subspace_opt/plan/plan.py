"""The plan: every parameter's route, view, pipeline, rank and state, from names and shapes alone. No tensors."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from ..algebra import storage
from ..algebra.frame import Frame
from ..algebra.storage import Codes
from ..spec import Route, Spec, SpecError
from .modules import canonical_name
from .views import Block, View, ViewError, make_view

STEP_BYTES = 4  # the float32 counter of a parameter
COUNTERS = ("step", "refreshed")  # numbers on the host: updates made, and the last of them that took a new basis


@dataclass(frozen=True)
class Entry:
    """What the plan knows of a parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    modules: frozenset[str] = frozenset()
    frozen: bool = False
    lr: float = 0.0
    weight_decay: float = 0.0
    use: str | None = None  # a pipeline chosen by the parameter's group, past all routes

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Row:
    """One parameter of the plan."""

    entry: Entry
    view: View
    pipeline: str
    splits: tuple[tuple[Block, Frame], ...]
    why: str
    compensated: bool = False
    decay: float = 0.0
    lr_scale: float = 1.0
    decay_scale: float = 1.0
    position: tuple[int, int] = (0, 1)  # its place among the parameters of its pipeline, and their number

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which its matrices are computed and, unless a slot says otherwise, its state is kept."""
        return torch.float64 if self.entry.dtype == torch.float64 else torch.float32

    @cached_property
    def turn(self) -> float:
        """In [0, 1), by the name alone: where in a period its bases are refreshed, whatever other parameters there are."""
        digest = hashlib.sha256(canonical_name(self.entry.name).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32

    @cached_property
    def state(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor of its state."""
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"step": ((), torch.float32)}
        for block, split in self.splits:
            for key, slot in split.slots.items():
                shape = slot.shape if block.count == 1 else (block.count, *slot.shape)
                named = torch.float32 if key in split.codes else storage.DTYPES.get(split.wanted.get(key, ""))
                out[state_key(block, key)] = (shape, named or slot.dtype or self.compute_dtype)
        if any(slot.transport == "reset" for _, split in self.splits for slot in split.slots.values()):
            out["refreshed"] = ((), torch.float32)  # what begins anew at a refresh is bias-corrected from there
        if self.compensated:
            out["compensation"] = (self.entry.shape, self.entry.dtype)
        return out

    @cached_property
    def codes(self) -> dict[str, Codes]:
        """The tensors of its state that are kept as codes; their dtype is that of what is read from them."""
        return {state_key(block, key): how for block, split in self.splits for key, how in split.codes.items()}

    @cached_property
    def stored(self) -> dict[str, str]:
        """How every slot is stored that the spec's `state_dtype` names, and where it cannot be as asked, why."""
        out = {}
        for block, split in self.splits:
            for key, wanted in split.wanted.items():
                why = storage.why_not(wanted, prod(split.slots[key].shape))
                out[state_key(block, key)] = f"{_short(self.compute_dtype)} ({why})" if why else wanted
        return out

    @property
    def converts(self) -> bool:
        """Whether a slot is stored otherwise than it is computed: no kernel can then work on the state in place."""
        slots = {state_key(block, key): slot for block, split in self.splits for key, slot in split.slots.items()}
        return bool(self.codes) or any(self.state[key][1] != (slot.dtype or self.compute_dtype) for key, slot in slots.items())

    @property
    def state_bytes(self) -> int:
        """Bytes of state held once the parameter has had a gradient."""
        if self.entry.frozen:
            return 0
        return sum(
            self.codes[key].nbytes(prod(shape)) if key in self.codes else prod(shape) * dtype.itemsize
            for key, (shape, dtype) in self.state.items()
        )

    @property
    def ranks(self) -> list[int]:
        """Rank of each block after clamping."""
        return [split.rank for _, split in self.splits if split.rank is not None]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.entry.name,
            "shape": list(self.entry.shape),
            "view": str(self.view),
            "pipeline": self.pipeline,
            "rank": self.ranks,
            "lr_scale": self.lr_scale,
            "weight_decay": self.decay,
            "state_bytes": self.state_bytes,
            "stored": self.stored,
            "adamw_bytes": adamw_bytes(self.entry),
            "why": self.why,
        }


@dataclass(frozen=True)
class Plan:
    """All parameters, in the optimizer's order; printed, a table."""

    rows: tuple[Row, ...]
    spec_name: str = ""
    by_name: dict[str, Row] = field(default_factory=dict, compare=False)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total_bytes(self) -> int:
        """State of all parameters once each has had a gradient."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """What torch.optim.AdamW would hold for the same parameters."""
        return sum(adamw_bytes(row.entry) for row in self.rows)

    @cached_property
    def constants(self) -> dict[str, int]:
        """Bytes of the tables shared by matrices (never in a checkpoint), by name and precision."""
        out: dict[str, int] = {}
        for row in self.rows:
            for _, split in row.splits:
                if not split.opens:
                    continue
                for name, make in split.pipeline.selector.constants(split.rows, split.cols).items():
                    key = f"{name} {row.compute_dtype}".replace("torch.", "")
                    if key not in out:
                        # On the meta device a table has a size and no memory.
                        with torch.device("meta"):
                            out[key] = make().numel() * row.compute_dtype.itemsize
        return out

    def to_dict(self) -> dict[str, Any]:
        return {
            "spec": self.spec_name,
            "state_bytes": self.total_bytes,
            "adamw_bytes": self.adamw_bytes,
            "constant_bytes": sum(self.constants.values()),
            "parameters": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        head: tuple[str, ...] = ("parameter", "shape", "seen as", "pipeline", "rank", "lr x", "decay", "state", "why")
        body: list[tuple[str, ...]] = [
            (
                row.entry.name,
                "x".join(map(str, row.entry.shape)) or "scalar",
                str(row.view),
                row.pipeline + (" (frozen)" if row.entry.frozen else ""),
                "/".join(map(str, row.ranks)) or "-",
                f"{row.lr_scale:g}",
                f"{row.decay:g}",
                f"{row.state_bytes:,}",
                row.why,
            )
            for row in self.rows
        ]
        if any(row.stored for row in self.rows):  # a column of its own, where the spec says something about it
            head = (*head[:-1], "stored", head[-1])
            body = [(*line[:-1], said(row), line[-1]) for line, row in zip(body, self.rows, strict=True)]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *body)]
        share = f" ({self.total_bytes / self.adamw_bytes:.2f} x AdamW's {self.adamw_bytes:,})" if self.adamw_bytes else ""
        return "\n".join([*lines, f"total state {self.total_bytes:,} bytes{share}"])


def said(row: Row) -> str:
    """How the named slots of a row are stored, in one cell."""
    return ", ".join(f"{key} {how}" for key, how in row.stored.items()) or "-"


def _short(dtype: torch.dtype) -> str:
    return "fp64" if dtype == torch.float64 else "fp32"


def state_key(block: Block, key: str) -> str:
    """The name of a slot in a parameter's state."""
    return f"{block.name}.{key}" if block.name else key


def adamw_bytes(entry: Entry) -> int:
    """Two moments in the parameter's dtype and a counter."""
    return 0 if entry.frozen else 2 * entry.numel * entry.dtype.itemsize + STEP_BYTES


def make_plan(spec: Spec | Sequence[Spec], entries: Sequence[Entry], *, strict: bool = False, compensated: bool = False) -> Plan:
    """Route every parameter and lay out its state.

    Args:
        spec: One for all, or one for each entry.
        strict: A route that no parameter takes is an error.
        compensated: Low-precision parameters carry a Kahan compensation.

    Raises:
        SpecError: a parameter that no route accepts, or whose shape does not fit its route; with `strict`, a route without parameters.
    """
    specs = [spec] * len(entries) if isinstance(spec, Spec) else list(spec)
    splits: dict[Any, Frame] = {}
    taken: dict[int, set[int]] = {}
    rows = []
    for own, entry in zip(specs, entries, strict=True):
        index, route = _route(own, entry)
        taken.setdefault(id(own), set()).add(index)
        rows.append(_row(own, entry, index, route, splits, compensated))
    if strict:
        for own in {id(s): s for s in specs}.values():
            for i, route in enumerate(own.routes):
                if i not in taken.get(id(own), set()):
                    raise SpecError(f"routes.{i} ({route}) of '{own.name}' matches no parameter; correct it, or leave out strict")
    rows = _placed(rows)
    return Plan(tuple(rows), specs[0].name if specs else "", {row.entry.name: row for row in rows})


def _placed(rows: list[Row]) -> list[Row]:
    """Every row with its position among the rows of its pipeline."""
    total = Counter(row.pipeline for row in rows)
    seen: Counter[str] = Counter()
    out = []
    for row in rows:
        out.append(replace(row, position=(seen[row.pipeline], total[row.pipeline])))
        seen[row.pipeline] += 1
    return out


def _route(spec: Spec, entry: Entry) -> tuple[int, Route]:
    if entry.use is not None:
        if entry.use not in spec.pipelines:
            raise SpecError(
                f"parameter group of '{entry.name}': use '{entry.use}' is no pipeline of '{spec.name}'; known: {', '.join(spec.pipelines)}"
            )
        return -1, Route(use=entry.use)
    dims = len(entry.shape)
    view = make_view(entry.shape, conv="conv" in entry.modules)
    sides = (min(view.rows, view.cols), max(view.rows, view.cols))
    for i, route in enumerate(spec.routes):
        if route.accepts(canonical_name(entry.name), dims, sides, entry.modules):
            return i, route
    raise SpecError(
        f"parameter '{entry.name}' of shape {entry.shape} is accepted by no route of '{spec.name}'; "
        "add a route without conditions at the end, such as {use: other}"
    )


def _row(spec: Spec, entry: Entry, index: int, route: Route, splits: dict[Any, Frame], compensated: bool) -> Row:
    try:
        view = make_view(
            entry.shape,
            layout=route.view,
            conv="conv" in entry.modules,
            transposed=("transposed" in entry.modules) if route.transposed is None else route.transposed,
            split=route.split,
            heads=route.heads,
        )
    except ViewError as error:
        raise SpecError(f"parameter '{entry.name}' of shape {entry.shape} {error} (routes.{index} of '{spec.name}')") from None
    pipeline = spec.pipelines[route.use]
    pairs = []
    for block in view.blocks:
        key = (id(pipeline), block.rows, block.cols, view.modes)
        if key not in splits:
            splits[key] = Frame.of(pipeline, block.rows, block.cols, view.modes)
        pairs.append((block, splits[key]))
    return Row(
        entry=entry,
        view=view,
        pipeline=route.use,
        splits=tuple(pairs),
        why="its group's `use`" if index < 0 else f"routes.{index}: {route}",
        compensated=compensated and entry.dtype in (torch.bfloat16, torch.float16),
        decay=entry.weight_decay * pipeline.decay_scale,
        lr_scale=pipeline.lr_scale,
        decay_scale=pipeline.decay_scale,
    )
