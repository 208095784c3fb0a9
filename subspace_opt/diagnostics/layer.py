"""The fields of one layer: the measures of its matrices, averaged, with the guards that fired."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.frame import Frame
from ..algebra.projection import project
from ..engine.work import Options, Phase, Piece, Stack
from . import measures
from .guards import asked_rank
from .replay import Before, Replay, gradient, pieces, replayed

Sides = dict[tuple[str, int, int], list[Tensor]]  # (parameter, block, first matrix) -> sides of its bases
LARGEST = ("angle_max", "orthogonality_error")  # fields of which a layer has the largest value of its matrices, not their mean


class Limits(NamedTuple):
    """How much a sample may compute."""

    spectrum: int  # longest short side of a gradient whose singular values are computed


class Measured(NamedTuple):
    """The fields of one piece by matrix, each `(B,)`, the fields of the piece as a whole, and its guards."""

    each: dict[str, Tensor]
    whole: dict[str, Any]
    guards: dict[str, int]


def measured(before: Before, options: Options, limits: Limits, old: Sides, new: Sides, fired: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The fields of every block of a parameter, by the layer's name.

    Args:
        old, new: Sides of the bases at the last sample, and those of this one, which are added.
        fired: Guards counted since the last sample.
    """
    work = before.work
    name = work.name
    if not before.with_gradient(options):
        return {name: {"pipeline": work.row.pipeline, "guards": fired}}
    found: dict[int, list[tuple[int, Measured]]] = {}
    for stack in pieces(work, options):
        piece = stack.pieces[0]
        sides = old.get((name, piece.index, piece.start))
        one = _piece(before, stack, options, limits, sides, new)
        found.setdefault(piece.index, []).append((piece.size, one))
    layers = {}
    for index, some in sorted(found.items()):
        block, frame = work.splits[index]
        layers[f"{name}.{block.name}" if block.name else name] = _layer(work.row.pipeline, block.count, frame, some, fired)
    return layers


def _layer(pipeline: str, count: int, frame: Frame, some: list[tuple[int, Measured]], fired: dict[str, int]) -> dict[str, Any]:
    """One layer of all pieces of a block."""
    out: dict[str, Any] = {"pipeline": pipeline}
    if frame.rank is not None:
        out["rank"] = frame.rank
    each = {name: _values(name, some) for name in dict.fromkeys(name for _, one in some for name in one.each)}
    for name, values in each.items():
        known = [value for value in values if math.isfinite(value)]
        if known:
            out[name] = max(known) if name in LARGEST else sum(known) / len(known)
    if count > 1:
        out["matrices"] = count
        out["by_matrix"] = {name: [value if math.isfinite(value) else None for value in each[name]] for name in each if name in out}
    for _, one in some:
        out |= one.whole
    guards = dict(fired)
    for _, one in some:
        for event, number in one.guards.items():
            guards[event] = guards.get(event, 0) + number
    if (asked := asked_rank(frame)) is not None:
        guards["clamped_rank"] = asked
    return {**out, "guards": guards} if guards else out


def _values(name: str, some: list[tuple[int, Measured]]) -> list[float]:
    """A field of all matrices of a block; NaN where a matrix lacks it."""
    return [value for size, one in some for value in (one.each[name].tolist() if name in one.each else [math.nan] * size)]


def _piece(before: Before, stack: Stack, options: Options, limits: Limits, old: list[Tensor] | None, new: Sides) -> Measured:
    """Measure one piece. The sides of its basis are added to `new`."""
    piece, frame = stack.pieces[0], stack.frame
    guards: dict[str, int] = {}
    g = gradient(piece)
    each = _weights(before, piece)
    shares = None
    if min(g.shape[-2:]) > 1 and min(g.shape[-2:]) <= limits.spectrum and bool(g.isfinite().all()):
        shares = measures.energies(g)
        each["effective_rank"] = measures.effective_rank(shares)
    whole: dict[str, Any] = {}
    if stack.phase is Phase.WAITING:
        guards["waiting"] = piece.size
    elif frame.opens:
        replay = replayed(stack, options)
        if not replay.failed:
            each |= _subspace(frame, g.mT if frame.turned else g, shares, replay)
            each |= _moved(replay, old, new, (piece.work.name, piece.index, piece.start))
            whole = {"age": replay.age}
            if replay.recorded.refresh_seconds is not None:
                whole["refresh_ms"] = 1e3 * replay.recorded.refresh_seconds
        if replay.recorded.silent is not None and bool(replay.recorded.silent.any()):
            guards["silent_residual"] = int(replay.recorded.silent.sum())
    if piece.work.scale != 1.0:
        guards["scaled_gradient"] = 1
    return Measured(each, whole, guards)


def _weights(before: Before, piece: Piece) -> dict[str, Tensor]:
    """Sizes of the weights, of their change and of the gradient."""
    view, dtype = piece.work.row.view, piece.work.row.compute_dtype
    was = piece.of(piece.work.weights).to(dtype)
    change = piece.of(view.cut(view.whole(before.param.detach()))).to(dtype) - was
    raw = piece.of(piece.work.grads)
    return {
        "gradient_rms": measures.rms(raw.to(dtype)),
        "weight_rms": measures.rms(was),
        "update_rms": measures.rms(change),
        "update_ratio": measures.ratio(change, was),
    }


def _subspace(frame: Frame, g: Tensor, shares: Tensor | None, replay: Replay) -> dict[str, Tensor]:
    """Energies inside the subspace, and the parts of the update. `g` and the records are in the working orientation."""
    seen = replay.recorded
    out: dict[str, Tensor] = {}
    if seen.basis is None or seen.coords is None or seen.signal is None:
        return out
    full = (frame.inner[0].size, frame.inner[1].size) == (frame.rows.size, frame.cols.size) and not frame.selector_traits.gated
    inside = project(g, seen.basis)
    if not full and frame.selector_traits.orthonormal:
        out["captured_gradient"] = measures.share(inside, g)
        if shares is not None and frame.rank is not None and not frame.selector_traits.gated:
            out["captured_gradient_best"] = shares[:, : frame.rank].sum(-1)
        if frame.pipeline.momentum or frame.pipeline.feedback is not None:
            out["captured_momentum"] = measures.share(seen.coords.signal, seen.signal)
    if not full and min(inside.shape[-2:]) > 1:
        out["effective_rank_inside"] = measures.effective_rank(measures.energies(inside))
    if seen.inside is not None:
        out["inside_rms"] = measures.rms(seen.inside)
    if seen.complement is not None:
        out["complement_rms"] = measures.rms(seen.complement)
    if seen.inside is not None and seen.complement is not None:
        out["cosine"] = measures.cosine(seen.inside, seen.complement)
    error = measures.orthogonality_error(seen.basis)
    return out if error is None else {**out, "orthogonality_error": error}


def _moved(replay: Replay, old: list[Tensor] | None, new: Sides, key: tuple[str, int, int]) -> dict[str, Tensor]:
    """Principal angles to the basis of the last sample."""
    basis = replay.recorded.basis
    sides = [] if basis is None else measures.sides(basis)
    if not sides:
        return {}
    new[key] = [side.clone() for side in sides]
    if old is None or [side.shape for side in old] != [side.shape for side in sides]:
        return {}
    angles = torch.cat([_angles(a, b) for a, b in zip(old, sides, strict=True)], -1)
    return {"angle_mean": angles.mean(-1), "angle_max": angles.amax(-1)}


def _angles(old: Tensor, new: Tensor) -> Tensor:
    """Principal angles, without a decomposition for a basis that has not changed."""
    if torch.equal(old, new):
        return torch.zeros(new.size(0), new.size(-1), dtype=torch.float64)
    return measures.principal_angles(old, new)
