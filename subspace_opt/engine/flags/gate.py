"""Gates: whether a parameter, or a matrix of a stack, is updated in this step. Only the device knows their values.

A gate is a tensor of bool: 0-d for one parameter or for all matrices of a stack, `(B,)` for the matrices one by one. None: no gate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def over(gate: Tensor, dims: int) -> Tensor:
    """The gate with `dims` dimensions, so that it broadcasts over a stack `(B, ...)` of that many."""
    return gate.view(-1, *[1] * (dims - 1))


def gated(gate: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the gate is open and `old` elsewhere, in the dtype of `old`. NaN in `new` does not pass a closed gate."""
    new = new.to(old.dtype)
    return new if gate is None else torch.where(over(gate, old.dim()), new, old)


def silenced(gate: Tensor, x: Tensor) -> Tensor:
    """`x` where the gate is open and 0 elsewhere."""
    return torch.where(over(gate, x.dim()), x, 0.0)


def blocked(gate: Tensor) -> Tensor:
    """1.0 if a 0-d gate is closed, else 0.0: the `found_inf` of PyTorch's fused kernels, which then change nothing."""
    return gate.logical_not().to(torch.float32)


def each(gate: Tensor, count: int) -> Sequence[Tensor]:
    """One 0-d gate for each of `count` matrices."""
    return gate.expand(count).unbind(0)


def spread(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """A number of every parameter as one of every matrix, `(B,)`: the 0-d tensor `parts[i]` stands for `sizes[i]` matrices."""
    if len(parts) == 1 and sizes[0] == 1:
        return parts[0].reshape(1)
    return torch.cat([part.reshape(1).expand(size) for part, size in zip(parts, sizes, strict=True)])


def finite_matrices(tensors: Sequence[Tensor], count: int) -> Tensor | None:
    """True for each matrix whose entries are finite in all tensors, `(B,)`; None if none of them can hold NaN."""
    found: Tensor | None = None
    for x in tensors:
        if x.numel() == 0 or not x.is_floating_point():
            continue
        size = torch.linalg.vector_norm(x, ord=torch.inf, dim=tuple(range(1, x.dim()))) if x.dim() > 1 else x.abs()
        fine = size.isfinite().expand(count)
        found = fine if found is None else found & fine
    return found


def listed(names: Sequence[str]) -> str:
    """The first five names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
