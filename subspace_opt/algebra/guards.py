"""Two guards against round-off and failed decompositions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import linalg
from .core import State


def silence_round_off(residual: Tensor, coords: Tensor) -> Tensor:
    """The residual `X - P X`, set to 0 for matrices in which it is only round-off: a scale-free rule would amplify it to full size.

    Coordinates in an orthonormal basis have the norm of `P X`, which is that of X if the residual is small.
    """
    kept = linalg.norm(residual) > 512 * torch.finfo(residual.dtype).eps * linalg.norm(coords)
    if residual.size(0) == 1 and linalg.is_readable(kept) and bool(kept):
        return residual
    return residual * kept


def keep_usable(before: State, after: State, source: Tensor) -> State:
    """The selector's new state, or the old one for matrices whose source is 0 or not finite.

    The new state is searched for NaN on a CPU only, because on other devices the host would wait, and not while torch.compile traces.

    Raises:
        LinAlgError: a finite source gave NaN or infinity. A QR returns these where other decompositions raise.
    """
    floats = [value for value in after.values() if value.is_floating_point()]
    cpu = linalg.is_readable(source)
    broken = "the new basis holds NaN or infinity although its source does not"
    if cpu and source.size(0) == 1 and 0 < linalg.norm(source).item() < math.inf:  # the usual case
        if not all(map(linalg.all_finite, floats)):
            raise torch.linalg.LinAlgError(broken)
        return after
    size = linalg.magnitude(source)[:, 0, 0]
    usable = (size > 0) & size.isfinite()
    if cpu:
        finite = torch.stack([value.isfinite().reshape(value.size(0), -1).all(-1) for value in floats] or [usable]).all(0)
        if bool((usable & ~finite).any()):
            raise torch.linalg.LinAlgError(broken)
        if bool(usable.all()):
            return after
    # A value that is not a slot serves this update alone and has no older value.
    return {
        name: torch.where(usable.view(-1, *[1] * (value.dim() - 1)), value, before.get(name, torch.zeros_like(value)))
        for name, value in after.items()
    }
