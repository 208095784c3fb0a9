"""Tensor trains: a weight as a chain of small cores, with a gate for each rank (CoMERA, arXiv:2405.14377).

Core i of a train is a tensor `(r_(i-1), s_i, r_i)` with r_0 = r_N = 1. It is stored as a matrix `(r_(i-1) s_i, r_i)`, and the last core as
`(r_(N-1), s_N)`, so that every pipeline for matrices can update it. Gate i is a vector of length r_i. It scales the last dimension of
core i.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .contraction import Labels, contract

TOLERANCE = 1e-2  # a gate at or below it is closed

Rank = int | Sequence[int]


class TensorTrain(nn.Module, ABC):
    """The cores and gates of one weight: parameters `tt_core_0`, ... and `tt_gate_0`, ..., a gate after each core but the last.

    Args:
        modes: The size s_i of each core's middle dimension; at least two.
        rank: An upper bound for all ranks, or one rank for each pair of neighbours. No rank exceeds what its neighbours can use.
        sd: Standard deviation of the weight's entries. A core starts as `randn / sqrt(r_i) * sd^(1/N)`.
        seed: Seed of the starting values. Layers of one model need different seeds. No global generator is used.
        tolerance: A gate at or below it multiplies by 0.
        device, dtype: Of the parameters, as in `nn.Linear`.

    Raises:
        ValueError: Fewer than two cores, a rank below 1, or a wrong number of ranks.
    """

    def __init__(
        self,
        modes: Sequence[int],
        rank: Rank,
        sd: float,
        *,
        seed: int,
        tolerance: float = TOLERANCE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.modes, self.tolerance = tuple(modes), tolerance
        ranks = clamped(self.modes, rank)
        generator, last = torch.Generator().manual_seed(seed), len(self.modes) - 1
        like: dict[str, Any] = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        for i, (left, size, right) in enumerate(zip(ranks, self.modes, ranks[1:], strict=False)):
            core = torch.randn(left, size, right, generator=generator, dtype=torch.float64) * (sd ** (1 / len(self.modes)) / right**0.5)
            self.register_parameter(f"tt_core_{i}", nn.Parameter(_stored(core, is_last=i == last).to(**like)))
            if i < last:
                self.register_parameter(f"tt_gate_{i}", nn.Parameter(torch.ones(right, **like)))

    # --------------------------------------------------------------------------------------------------------- cores and gates

    @property
    def cores(self) -> list[nn.Parameter]:
        """The cores, as they are stored."""
        return [self.get_parameter(f"tt_core_{i}") for i in range(len(self.modes))]

    @property
    def gates(self) -> list[nn.Parameter]:
        """The gates, one for each pair of neighbouring cores."""
        return [self.get_parameter(f"tt_gate_{i}") for i in range(len(self.modes) - 1)]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The stored ranks r_0, ..., r_N, those of closed gates included."""
        return (1, *(gate.numel() for gate in self.gates), 1)

    @property
    def parameter_roles(self) -> dict[str, str]:
        """The roles that routes of a spec see: a core is a hidden matrix, or a vector if it has one row or column, as gates are."""
        return {f"tt_core_{i}": "hidden" if min(core.shape) > 1 else "vector" for i, core in enumerate(self.cores)}

    def open_gates(self, threshold: float | None = None) -> list[Tensor]:
        """For each pair of neighbours a mask `(r_i,)` of the gates above the threshold; by default the threshold is the tolerance."""
        return [gate.detach() > (self.tolerance if threshold is None else threshold) for gate in self.gates]

    def tensors(self) -> list[Tensor]:
        """The cores `(s_1, r_1), (r_1, s_2, r_2), ..., (r_(N-1), s_N)`, multiplied by their gates; a closed gate multiplies by 0."""
        ranks, last = self.ranks, len(self.modes) - 1
        shaped = [core.view(ranks[i], self.modes[i], ranks[i + 1]) for i, core in enumerate(self.cores)]
        gated = [core * (gate * (gate > self.tolerance)) for core, gate in zip(shaped[:last], self.gates, strict=True)]
        return [gated[0].squeeze(0), *gated[1:], shaped[last].squeeze(-1)]

    def core_labels(self) -> list[Labels]:
        """The labels of `tensors()` for a contraction: i between cores i-1 and i, and N + i for the mode of core i."""
        count = len(self.modes)
        inner = [(i, count + i, i + 1) for i in range(count)]
        return [inner[0][1:], *inner[1:-1], inner[-1][:2]]

    # -------------------------------------------------------------------------------------------------------- weights and sizes

    @property
    @abstractmethod
    def dense_size(self) -> int:
        """Number of entries of the dense weight."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight as a dense matrix, differentiable in cores and gates."""

    @abstractmethod
    def set_weight(self, weight: Tensor) -> None:
        """Take the best cores for a dense weight, in the sense of `decomposed`, and open all gates."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads the weight of a layer. It is computed at each access."""
        return self.dense()

    def core_entries(self, *, stored: bool = False) -> int:
        """`sum_i r_(i-1) s_i r_i`, the number of entries of the cores; r_i counts the open gates, or with `stored` all gates."""
        ranks = self.ranks if stored else (1, *(int(mask.sum()) for mask in self.open_gates()), 1)
        return sum(left * size * right for left, size, right in zip(ranks, self.modes, ranks[1:], strict=False))

    def contracted(self) -> Tensor:
        """The product of all cores, `(s_1, ..., s_N)`."""
        count = len(self.modes)
        return contract(self.tensors(), self.core_labels(), tuple(range(count, 2 * count)))

    @torch.no_grad()
    def set_cores(self, cores: Sequence[Tensor]) -> None:
        """Copy cores `(r_(i-1), s_i, r_i)` of the stored ranks into the parameters, and open all gates."""
        for i, (own, core) in enumerate(zip(self.cores, cores, strict=True)):
            own.copy_(_stored(core, is_last=i == len(self.modes) - 1))
        for gate in self.gates:
            gate.fill_(1.0)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the cores by their gates, `G_i <- G_i max(D_i, 0)`, and set open gates to 1. Closed gates stay closed.

        Fold after training: an optimizer's state belongs to the cores before it.
        """
        for core, gate in zip(self.cores, self.gates, strict=False):
            is_open = gate > self.tolerance
            core.mul_(torch.where(is_open, gate, 0.0))
            gate.copy_(torch.where(is_open, 1.0, 0.0))

    # ------------------------------------------------------------------------------------------------------------- checkpoints

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Load cores and gates. The layer takes the ranks of the checkpoint, which pruning may have changed."""
        own, last = dict(self.named_parameters(recurse=False)), len(self.modes) - 1
        gates = [state_dict.get(f"{prefix}tt_gate_{i}") for i in range(last)]
        if all(isinstance(gate, Tensor) and gate.dim() == 1 for gate in gates):
            ranks = (1, *(gate.numel() for gate in gates if gate is not None), 1)
            for i, size in enumerate(self.modes):
                shape = (ranks[i], size) if i == last else (ranks[i] * size, ranks[i + 1])
                _resize(own[f"tt_core_{i}"], shape)
                if i < last:
                    _resize(own[f"tt_gate_{i}"], shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *rest)  # a core that still has another shape is an error there

    def extra_repr(self) -> str:
        return f"modes={self.modes}, ranks={self.ranks[1:-1]}, {self.core_entries(stored=True):,} of {self.dense_size:,} entries"


def clamped(modes: Sequence[int], rank: Rank) -> tuple[int, ...]:
    """The ranks r_0, ..., r_N of a train: those asked for, reduced to what the neighbouring cores can use."""
    count = len(modes)
    if count < 2:
        raise ValueError(f"a tensor train needs at least two cores, and the factors {tuple(modes)} give {count}")
    asked = [rank] * (count - 1) if isinstance(rank, int) else list(rank)
    if len(asked) != count - 1 or min(asked) < 1:
        raise ValueError(f"rank is {rank!r}; give a number of at least 1, or {count - 1} of them for {count} cores")
    ranks = [1, *asked, 1]
    for i in range(1, count):
        ranks[i] = min(ranks[i], ranks[i - 1] * modes[i - 1])
    for i in range(count - 1, 0, -1):
        ranks[i] = min(ranks[i], ranks[i + 1] * modes[i])
    return tuple(ranks)


def decomposed(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Cores `(r_(i-1), s_i, r_i)` of a tensor `(s_1, ..., s_N)` by successive truncated singular value decompositions.

    Exact if no unfolding of the tensor has a higher rank (TT-SVD, doi:10.1137/090752286). All cores get the same norm per rank.
    """
    cores, rest = [], tensor.unsqueeze(0)
    for size, rank in zip(tensor.shape[:-1], ranks[1:-1], strict=True):
        u, s, v = torch.linalg.svd(rest.reshape(rest.size(0) * size, -1), full_matrices=False)
        cores.append(u[:, :rank].reshape(-1, size, rank))
        rest = s[:rank, None] * v[:rank]
    cores.append(rest.unsqueeze(-1))
    norms = [core.norm() / (core.size(0) * core.size(1)) ** 0.5 for core in cores]  # that of a fresh core is sd^(1/N)
    if not min(norms):
        return cores
    mean = torch.stack(norms).log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def trains_in(model: nn.Module) -> dict[str, TensorTrain]:
    """The tensor trains of a model by path; one that several modules share comes once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TensorTrain)}


def _stored(core: Tensor, *, is_last: bool) -> Tensor:
    left, size, right = core.shape
    return core.reshape(left, size) if is_last else core.reshape(left * size, right)


def _resize(p: nn.Parameter, shape: Sequence[int]) -> None:
    """Give a parameter another shape, uninitialized. It stays the same object, so an optimizer still knows it."""
    if tuple(p.shape) != tuple(shape):
        p.data = p.data.new_empty(shape)
        p.grad = None
