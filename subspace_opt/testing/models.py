"""Matrices, parameters and a small model for the checks. They are the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def stack(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, twins: bool = False) -> Tensor:
    """Standard normal matrices, drawn in float64 and rounded to `dtype`. With `twins`, matrix 2 is a copy of matrix 0."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if twins and x.size(0) > 2:
        x[2] = x[0]
    return x


class Shapes(nn.Module):
    """Float64 parameters: two tall matrices of one shape, a wide one, a square one, a vector, and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"tall": (6, 4), "twin": (6, 4), "wide": (4, 7), "square": (5, 5), "vector": (6,), "experts": (3, 5, 4)}
        for seed, (name, shape) in enumerate(shapes.items()):
            self.register_parameter(name, nn.Parameter(stack(shape, torch.float64, 70 + seed)))


class Small(nn.Module):
    """A model with an embedding, a convolution, a norm, linear layers and a head. It learns a successor for each of 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 12)
        self.convolution = nn.Conv1d(12, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 16, bias=False)
        for seed, p in enumerate(self.parameters()):
            start = stack(tuple(p.shape), p.dtype, 80 + seed) * max(1, p[0].numel()) ** -0.5
            p.data.copy_(torch.ones_like(p) if p is self.norm.weight else start)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.convolution(x.mT).mT
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        logits: Tensor = self.head(x)
        return logits

    def loss(self) -> Tensor:
        """Cross-entropy on the whole data set."""
        tokens = torch.arange(48).view(8, 6) * 5 % 16
        return torch.nn.functional.cross_entropy(self(tokens).flatten(0, 1), (tokens * 3 + 1).flatten() % 16)
