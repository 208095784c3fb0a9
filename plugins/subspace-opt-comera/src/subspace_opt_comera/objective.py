"""The objective of CoMERA: the task's loss and the sizes of the tensor trains, together (arXiv:2405.14377)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from subspace_opt import SubspaceOptimizer

from .pruning import Pruned, prune
from .state import Uncuttable
from .trains import TensorTrain, trains_in


class Sizes(NamedTuple):
    """Numbers of entries of all tensor trains.

    `now`: with open gates. `stored`: with all gates. `start`: when the objective was made. `target`: to be reached. `dense`: of the weights
    that the trains replace.
    """

    now: int
    stored: int
    start: int
    target: int
    dense: int

    @property
    def ratio(self) -> float:
        """The compression ratio: entries of the dense weights for each entry with open gates."""
        return self.dense / max(self.now, 1)

    def __str__(self) -> str:
        return f"{self.now:,} entries of {self.dense:,} dense ones (1/{self.ratio:.1f}); start {self.start:,}, target {self.target:,}"


class RankObjective:
    """A loss that also asks for fewer ranks; `early` for the first part of a run, `late` for the second.

    Args:
        model: Holds the tensor trains.
        target_ratio: The size to reach, as a share of the size at the start.
        target_loss: The loss to reach.
        rank_weight: Weight of the mean gate.
        loss_weight: Weight that the loss keeps in the late stage.

    Raises:
        ValueError: The model has no tensor train, `target_ratio` is not in (0, 1], or a weight is negative.
    """

    def __init__(
        self, model: nn.Module, *, target_ratio: float = 0.2, target_loss: float = 0.0, rank_weight: float = 0.01, loss_weight: float = 0.1
    ) -> None:
        if not trains_in(model):
            raise ValueError("the model has no tensor train; call `tensorize` first")
        if not 0 < target_ratio <= 1:
            raise ValueError(f"target_ratio is {target_ratio}; give a share of the size at the start, above 0 and at most 1")
        if rank_weight < 0 or loss_weight < 0:
            raise ValueError(f"rank_weight is {rank_weight} and loss_weight is {loss_weight}; neither may be negative")
        self.model = model
        self.target_loss, self.rank_weight, self.loss_weight = target_loss, rank_weight, loss_weight
        self._start = sum(train.core_entries() for train in self._trains)
        self._target = int(target_ratio * self._start)

    @property
    def _trains(self) -> list[TensorTrain]:
        return list(trains_in(self.model).values())

    def rank(self) -> Tensor:
        """The mean of all open gates, the l1 norm by which ranks are made smaller; 0-d, differentiable. Closed gates get no gradient."""
        gates = [(gate, train.tolerance) for train in self._trains for gate in train.gates]
        total = torch.stack([(gate * (gate > tolerance)).sum() for gate, tolerance in gates]).sum()
        return total / torch.stack([(gate.detach() > tolerance).sum() for gate, tolerance in gates]).sum().clamp_min(1)

    def early(self, loss: Tensor) -> Tensor:
        """`loss + rank_weight rank`, a linear scalarization."""
        return loss + self.rank_weight * self.rank()

    def late(self, loss: Tensor) -> Tensor:
        """`loss_weight loss + rank_weight rank + (rank if the size is farther from its target than the loss, else loss)`.

        Distances are relative: `(loss - target_loss) / loss` and `(size - target) / size`. Needs no value on the host.
        """
        rank, size = self.rank(), self._size()
        value = loss.detach()
        size_is_farther = (value - self.target_loss) / value < (size - self._target) / size
        return self.loss_weight * loss + self.rank_weight * rank + torch.where(size_is_farther, rank, loss)

    def _size(self) -> Tensor:
        """Entries with open gates, as a 0-d tensor on the device of the gates."""
        sizes = []
        for train in self._trains:
            counts = [mask.sum() for mask in train.open_gates()]
            one = torch.ones_like(counts[0])
            ranks = [one, *counts, one]
            sizes += [left * size * right for left, size, right in zip(ranks, train.modes, ranks[1:], strict=False)]
        return torch.stack(sizes).sum().clamp_min(1).to(torch.float32)

    def sizes(self) -> Sizes:
        """The sizes of all tensor trains."""
        trains = self._trains
        now, stored = (sum(train.core_entries(stored=stored) for train in trains) for stored in (False, True))
        return Sizes(now, stored, self._start, self._target, sum(train.dense_size for train in trains))

    def prune(
        self, optimizer: SubspaceOptimizer | None = None, *, threshold: float | None = None, uncuttable: Uncuttable = "raise"
    ) -> list[Pruned]:
        """Remove closed ranks from the model and the optimizer's state; see `subspace_opt_comera.prune`."""
        return prune(self.model, optimizer, threshold=threshold, uncuttable=uncuttable)

    def state_dict(self) -> dict[str, Any]:
        """The sizes at the start and to be reached, which a resumed run cannot find in the pruned model."""
        return {"start": self._start, "target": self._target}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the sizes of a saved objective."""
        self._start, self._target = int(state["start"]), int(state["target"])
