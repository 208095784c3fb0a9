"""Codes of 8 bits with one scale for each block of entries."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # entries that share a scale


def to_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """`round(127 x / s)` int8 in the shape of `x` `(B, m, n)`, and s `(B, blocks)`, the largest of each 128 entries in row-major order."""
    flat = x.flatten(1)
    padded = torch.nn.functional.pad(flat, (0, -flat.size(1) % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = padded.abs().amax(-1)
    codes = (padded * (127 / torch.where(scale > 0, scale, torch.ones_like(scale))).unsqueeze(-1)).round().to(torch.int8)
    return codes.flatten(1)[:, : flat.size(1)].reshape(x.shape), scale


def from_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """The entries that `to_codes` rounded, in the dtype of `scale`."""
    each = scale.repeat_interleave(BLOCK, dim=1)[:, : codes[0].numel()]
    return (codes.flatten(1).to(scale.dtype) * (each / 127)).reshape(codes.shape)
