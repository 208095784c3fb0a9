"""The order in which a network of tensors is contracted, chosen by its floating-point operations.

Every order gives the same result, and their costs differ by orders of magnitude. For many rows of input it is cheapest to multiply the
cores first. For few rows it is cheapest to multiply the input with one core after the other. `cheapest` finds the best pairwise order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Labels = tuple[int, ...]  # one number for each dimension of a tensor; dimensions with one number are one dimension of the network


class Pair(NamedTuple):
    """One product: the results `left` and `right` of earlier steps become a tensor with the labels `out`."""

    left: int
    right: int
    out: Labels


class Path(NamedTuple):
    """An order of pairwise products. Step k makes tensor `number of operands + k`. `flops` counts multiplications and additions."""

    operands: tuple[Labels, ...]
    steps: tuple[Pair, ...]
    flops: int


@torch._disable_dynamo  # the order depends on the sizes: torch.compile would search it symbolically
def contract(operands: Sequence[Tensor], labels: Sequence[Labels], out: Labels) -> Tensor:
    """Contract a network of tensors in the cheapest order.

    Under autograd the backward pass runs the same order in reverse, and each product costs twice its forward cost. The cheapest order of
    the forward pass is therefore the cheapest of both.

    Args:
        operands: Tensors, connected to each other by labels that two of them share and `out` lacks.
        labels: The labels of each tensor's dimensions.
        out: The labels of the result, in the order of its dimensions.
    """
    sizes = {label: size for own, tensor in zip(labels, operands, strict=True) for label, size in zip(own, tensor.shape, strict=True)}
    path = cheapest(tuple(labels), out, tuple(sorted(sizes.items())))
    made = list(operands)
    known = list(path.operands)
    for left, right, result in path.steps:
        made.append(torch.einsum(made[left], list(known[left]), made[right], list(known[right]), list(result)))
        known.append(result)
    return made[-1] if path.steps else torch.einsum(made[0], list(known[0]), list(out))


@lru_cache(maxsize=1024)
def cheapest(labels: tuple[Labels, ...], out: Labels, sizes: tuple[tuple[int, int], ...]) -> Path:
    """Return the pairwise order with the fewest floating-point operations.

    Among orders of equal cost, it is the one whose largest intermediate tensor is smallest.

    Raises:
        ValueError: The network is not connected.
    """
    search = _Search(labels, out, dict(sizes))
    whole = (1 << len(labels)) - 1
    found = search.best(whole)
    if found is None:
        raise ValueError(f"the tensors with labels {labels} are not connected")
    steps: list[Pair] = []
    search.collect(whole, steps)
    if steps:
        steps[-1] = steps[-1]._replace(out=out)
    return Path(labels, tuple(steps), found.flops)


class _Best(NamedTuple):
    """The best order for a set of tensors; `left`: the part of the set that is the left operand of the last product."""

    flops: int
    largest: int
    left: int


class _Search:
    """Dynamic programming over connected sets of tensors. A set is an integer with one bit for each tensor."""

    def __init__(self, labels: tuple[Labels, ...], out: Labels, size: dict[int, int]) -> None:
        self.count, self.out, self.size = len(labels), set(out), size
        self.holders = {label: sum(1 << i for i, own in enumerate(labels) if label in own) for label in size}
        self.summed = [holders for label, holders in self.holders.items() if label not in self.out]
        self.known: dict[int, _Best | None] = {1 << i: _Best(0, 0, 0) for i in range(self.count)}

    def labels(self, some: int) -> Labels:
        """The labels of the product of some tensors: those that the result or another tensor has too."""
        return tuple(sorted(k for k, holders in self.holders.items() if holders & some and (holders & ~some or k in self.out)))

    def best(self, some: int) -> _Best | None:
        """The best order for a set; None if the set is not connected."""
        if some not in self.known:
            self.known[some] = min(self._orders(some), default=None)
        return self.known[some]

    def _orders(self, some: int) -> Iterator[_Best]:
        """For each last product of the set, the best order that ends with it."""
        rest = some & (some - 1)  # without its first tensor, so that each pair of parts comes once
        right = rest
        while right:
            left = some ^ right
            if any(holders & left and holders & right for holders in self.summed):
                a, b = self.best(left), self.best(right)
                if a is not None and b is not None:
                    union = math.prod(self.size[k] for k in {*self.labels(left), *self.labels(right)})
                    made = math.prod(self.size[k] for k in self.labels(some))
                    yield _Best(a.flops + b.flops + 2 * union, max(a.largest, b.largest, made), left)
            right = (right - 1) & rest

    def collect(self, some: int, steps: list[Pair]) -> int:
        """Append the products of a set to `steps`; return the index of the last result."""
        found = self.known[some]
        assert found is not None
        if not found.left:
            return some.bit_length() - 1
        left, right = self.collect(found.left, steps), self.collect(some ^ found.left, steps)
        steps.append(Pair(left, right, self.labels(some)))
        return self.count + len(steps) - 1
