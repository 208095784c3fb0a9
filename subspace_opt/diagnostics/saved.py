"""The layers of a saved state dictionary: spectra, energies and bytes, and whether the rank fits. Reads tensors, needs no model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..algebra.core import Basis, Dim, Drawn, Step
from ..algebra.frame import Frame
from ..algebra.pipeline import Pipeline
from ..algebra.projection import project
from ..algebra.shaped import part
from ..checkpoint import CheckpointError, migrated, names_in
from ..engine import lowbit
from ..plan import COUNTERS
from ..registry import kind_of
from ..spec import Spec
from . import measures

PLACES = ("feedback", "momentum", "selector", "inside", "complement", "finish", "apply")
HELD = 0.99  # share of the energy inside that `directions` of a spectrum hold
WASTED = 0.5  # the rank is wasted if HELD of the energy lies in at most this share of the directions
FLAT = 0.25  # the rank is too small if the last tenth of the directions hold more than this share of the mean energy of a direction
CAPTURED = 0.9  # and if the subspace, where that is known, captures less than this of the momentum
LEAST = 4  # ranks below this get no verdict
MOST_SIDE = 1024  # longest short side of a momentum whose singular values are computed


@dataclass(frozen=True)
class SavedLayer:
    """One parameter, or one part of a fused parameter. None: the state does not tell."""

    name: str
    step: int
    pipeline: str | None
    matrices: int
    rows: int | None  # in the orientation in which the basis belongs to the columns
    cols: int | None
    rank: int | None
    state_bytes: int
    bytes_by_place: dict[str, int]
    captured_momentum: float | None = None  # share of the momentum's energy inside the subspace
    captured_momentum_best: float | None = None  # that of the best subspace of this rank
    effective_rank: float | None = None  # of `spectrum`
    directions: int | None = None  # fewest directions that hold 0.99 of the energy
    tail: float | None = None  # mean energy of the last tenth of the directions, relative to the mean of all
    verdict: str | None = None  # `too small`, `wasted` or `fits`
    spectrum_of: str | None = None  # the slot from which the spectrum is taken
    spectrum: list[float] = field(default_factory=list)  # shares of energy by direction, in descending order; their sum is 1

    def to_dict(self) -> dict[str, Any]:
        """The layer as plain data, without fields that the state does not tell."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != []}


def saved_layers(state_dict: Mapping[str, Any]) -> list[SavedLayer]:
    """All layers of an optimizer's saved state dictionary, in the order of the optimizer.

    Raises:
        CheckpointError: It is no state dictionary, or another optimizer saved it.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise CheckpointError("this is not an optimizer's state dictionary: it needs `state` and `param_groups`")
    if not all(isinstance(group.get("spec"), str) for group in state_dict["param_groups"]):
        raise CheckpointError("another optimizer saved this checkpoint: its parameter groups have no `spec`")
    state_dict = migrated(state_dict)
    found: list[SavedLayer] = []
    for group, names in zip(state_dict["param_groups"], names_in(state_dict["param_groups"]), strict=True):
        pipelines = _pipelines(group["spec"])
        for key, name in zip(group["params"], names, strict=True):
            if state_dict["state"].get(key):
                found += _layers(name, state_dict["state"][key], pipelines)
    return found


@lru_cache(maxsize=8)
def _pipelines(spec: str) -> dict[str, Pipeline]:
    return dict(Spec.model_validate_json(spec).pipelines)


def _layers(name: str, state: Mapping[str, Any], pipelines: dict[str, Pipeline]) -> Iterator[SavedLayer]:
    """The blocks of one parameter. State of the parameter as a whole, its counters, belongs to the first."""
    blocks: dict[str, dict[str, Any]] = {}
    rest = {key: value for key, value in state.items() if _placed(key) is None}
    for key, value in state.items():
        placed = _placed(key)
        if placed is not None:
            blocks.setdefault(placed[0], {})[placed[1]] = value
    extra = sum(map(bytes_of, rest.values()))
    for block, slots in (blocks or {"": {}}).items():
        yield _layer(f"{name}.{block}" if block else name, int(state.get("step", 0)), slots, extra, pipelines)
        extra = 0


def _placed(key: str) -> tuple[str, str] | None:
    """(block, slot) of a state key such as `q.selector.basis`; None for a key of the whole parameter."""
    words = key.split(".")
    at = next((i for i, word in enumerate(words) if word in PLACES), None)
    return None if at is None or key in COUNTERS else (".".join(words[:at]), ".".join(words[at:]))


def bytes_of(value: Any) -> int:
    """Bytes of a state tensor as it is stored: those of its codes and scales, if it has codes."""
    if lowbit.found(value) is not None:
        return sum(t.numel() * t.element_size() for t in (value.codes, value.scale, value.qmap))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _layer(name: str, step: int, slots: dict[str, Any], extra: int, pipelines: dict[str, Pipeline]) -> SavedLayer:
    places: dict[str, int] = {}
    for key, value in slots.items():
        place = key.partition(".")[0]
        places[place] = places.get(place, 0) + bytes_of(value)
    total = sum(places.values()) + extra
    called, frame = _recognised(slots, pipelines)
    if frame is None:
        return SavedLayer(name, step, called, 1, None, None, None, total, places)
    pipeline = frame.pipeline
    stacks, count = _stacked(slots, frame)
    rows, cols, rank = _sizes(stacks, pipeline)
    energies, source = _spectrum(stacks) if frame.opens else (None, None)
    measured = {**_momentum(stacks, pipeline, rows, cols), **_judged(energies, rank, cols, pipeline)}
    if measured.get("captured_momentum", 0.0) >= CAPTURED and measured.get("verdict") == "too small":
        measured["verdict"] = "fits"
    return SavedLayer(name, step, called, count, rows, cols, rank, total, places, spectrum_of=source, **measured)


def _recognised(slots: Mapping[str, Any], pipelines: dict[str, Pipeline]) -> tuple[str | None, Frame | None]:
    """The pipeline whose slots these are, for some shape. Pipelines with equal slots and selectors are named together."""
    fitting: dict[str, Frame] = {}
    for name, pipeline in pipelines.items():
        for shape in ((64, 48), (48, 64), (1, 64)):
            frame = Frame.of(pipeline, *shape)
            if set(frame.slots) == set(slots):
                fitting.setdefault(name, frame)
    if not fitting or len({frame.pipeline.selector.model_dump_json() for frame in fitting.values()}) > 1:
        return None, None
    return "/".join(fitting), next(iter(fitting.values()))


def _stacked(slots: Mapping[str, Any], frame: Frame) -> tuple[dict[str, Tensor], int]:
    """Slots as numbers `(B, *dims)`, and B."""
    out: dict[str, Tensor] = {}
    count = 1
    for key, value in slots.items():
        whole = lowbit.whole(value)
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        out[key] = whole.unsqueeze(0) if whole.dim() == len(frame.slots[key].dims) else whole
        count = out[key].size(0)
    return out, count


def _sizes(stacks: Mapping[str, Tensor], pipeline: Pipeline) -> tuple[int | None, int | None, int | None]:
    """Rows and columns in the working orientation, and the rank, as far as the slots tell. A full basis has no rank."""
    if "feedback.error" in stacks:  # it has the orientation of the weight
        frame = Frame.of(pipeline, *stacks["feedback.error"].shape[-2:])
        return frame.rows.size, frame.cols.size, frame.rank
    matrix = _slot(stacks, "momentum.") if _slot(stacks, "momentum.") is not None else _slot(stacks, "complement.exp_avg")
    inner, basis, index = _slot(stacks, "inside."), stacks.get("selector.basis"), stacks.get("selector.index")
    rank = basis.size(-1) if basis is not None else index.size(-1) if index is not None else None
    shape = matrix if matrix is not None else inner
    rows = None if shape is None else shape.size(-2)
    if basis is not None:
        return rows, basis.size(-2), rank
    return rows, shape.size(-1) if shape is not None and (rank is None or matrix is not None) else None, rank


def _slot(stacks: Mapping[str, Tensor], start: str) -> Tensor | None:
    """The first slot of matrices whose key begins so."""
    return next((value for key, value in stacks.items() if key.startswith(start) and value.dim() == 3), None)


def _spectrum(stacks: Mapping[str, Tensor]) -> tuple[Tensor | None, str | None]:
    """Energies by direction inside the subspace `(B, r)`, in descending order with the sum 1, and the slot that tells them."""
    sides = [key for key in stacks if key.startswith("selector.") and key.endswith(".covariance")]
    if "selector.covariance" in stacks:
        found, source = torch.linalg.eigvalsh(stacks["selector.covariance"].double()).flip(-1), "selector.covariance"
    elif sides:  # both sides have a full basis: the side with the longer spectrum
        source = max(sides, key=lambda key: stacks[key].size(-1))
        p, q = stacks[source].double(), stacks[source.replace("covariance", "basis")].double()
        found = (q * (p @ q)).sum(-2)  # diag(Q'PQ), the eigenvalues in the basis in force
    else:
        second = next((key for key in stacks if key.startswith("inside.") and key.endswith("exp_avg_sq") and stacks[key].dim() == 3), None)
        first = next((key for key in stacks if key.startswith("inside.") and stacks[key].dim() == 3), None)
        if second is not None:
            found, source = stacks[second].double().sum(-2), second
        elif first is not None and min(stacks[first].shape[-2:]) <= MOST_SIDE:
            return measures.energies(stacks[first].double()), first
        else:
            return None, None
    found = found.clamp_min(0.0).sort(-1, descending=True).values
    return found / found.sum(-1, keepdim=True), source


def _judged(energies: Tensor | None, rank: int | None, cols: int | None, pipeline: Pipeline) -> dict[str, Any]:
    """Effective rank, directions, tail and verdict of a spectrum: means over the matrices that have begun."""
    energies = None if energies is None else energies[energies.isfinite().all(-1)]
    if energies is None or not len(energies):
        return {}
    r = energies.size(-1)
    mean = energies.mean(0)
    directions = min(int((mean.cumsum(0) < HELD).sum()) + 1, r)
    out: dict[str, Any] = {
        "effective_rank": float(measures.effective_rank(energies).mean()),
        "directions": directions,
        "tail": float(mean[-math.ceil(r / 10) :].mean() * r),
        "spectrum": mean.tolist(),
    }
    if rank is not None and rank >= LEAST and not _is_blind(pipeline.selector):
        goes_on = rank != cols and out["tail"] > FLAT  # there is nothing beyond a full basis
        out["verdict"] = "wasted" if directions <= WASTED * r else "too small" if goes_on else "fits"
    return out


def _is_blind(selector: Any) -> bool:
    """True for random directions: they do not follow the gradient, so their energies say nothing about the rank."""
    return _is_blind(selector.then) if hasattr(selector, "then") else kind_of(type(selector)) == "random"


def _momentum(stacks: dict[str, Tensor], pipeline: Pipeline, rows: int | None, cols: int | None) -> dict[str, Any]:
    """The share of the full-space momentum that the subspace captures, and that of the best subspace of its rank."""
    key = next((key for key in stacks if key.startswith("momentum.") and stacks[key].dim() == 3), None)
    if key is None or rows is None or cols is None or not pipeline.selector.traits().orthonormal:
        return {}
    basis = _basis(stacks, pipeline, Dim("rows", rows), Dim("cols", cols))
    moment = stacks[key].float()
    if basis is None or not bool(moment.any()):
        return {}
    coords = project(moment, basis)
    captured = measures.share(coords, moment)
    out = {"captured_momentum": float(captured[captured.isfinite()].mean())}
    if min(rows, cols) <= MOST_SIDE:
        best = measures.energies(moment)[:, : min(coords.shape[-2:])].sum(-1)
        out["captured_momentum_best"] = float(best[best.isfinite()].mean())
    return out


def _basis(stacks: Mapping[str, Tensor], pipeline: Pipeline, rows: Dim, cols: Dim) -> Basis | None:
    """The basis in force; None if it is full, or exists only during a step, or was drawn from a seed that a checkpoint does not hold."""
    selector = pipeline.selector
    if not {"selector.basis", "selector.index"} & set(stacks) or not selector.traits().keeps_basis:
        return None
    makers = selector.constants(rows, cols)
    if any(isinstance(make, Drawn) for make in makers.values()):
        return None
    clock = torch.tensor(1.0, dtype=torch.float64)
    step = Step(clock, clock, rows=rows, cols=cols, constants={name: make().float() for name, make in makers.items()})
    basis = selector.basis(part("selector", dict(stacks)), step)
    return basis._replace(right=basis.right.float()) if isinstance(basis.right, Tensor) and basis.right.is_floating_point() else basis
