"""Removes closed ranks from tensor trains, and from the state of their optimizer with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspace_opt import SubspaceOptimizer

from .state import Kept, PruneError, Uncuttable, check_whole, cut, cut_states
from .trains import TensorTrain, trains_in

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Pruned:
    """The result for one layer. `change`: the Frobenius norm of the difference of the weights, relative to the weight before."""

    name: str
    ranks_before: tuple[int, ...]
    ranks: tuple[int, ...]
    entries_before: int
    entries: int
    change: float


def prune(
    model: nn.Module, optimizer: SubspaceOptimizer | None = None, *, threshold: float | None = None, uncuttable: Uncuttable = "raise"
) -> list[Pruned]:
    """Remove the ranks whose gates are at or below a threshold, from cores, gates, gradients and the optimizer's state together.

    The parameters are replaced by smaller ones, and the optimizer holds the new ones in place of the old. State slots keep their entries
    exactly; counters go on. With the default threshold the outputs of the model do not change, as closed gates multiply by 0.

    Args:
        model: The model that the optimizer was built from.
        optimizer: None if there is none yet.
        threshold: By default the tolerance of each layer. A higher one also cuts open gates; `Pruned.change` measures the effect.
        uncuttable: For state that cannot be cut, such as a basis of a side that shrinks: `raise`, or `reset` the state of that parameter,
            which then starts again as at its first step.

    Returns:
        A record for each layer that changed.

    Raises:
        PruneError: No gate between two cores is above the threshold; state cannot be cut; parameters are sharded or have hooks. Nothing has
            changed then.
        TypeError: The optimizer is no `SubspaceOptimizer`.
    """
    kept: dict[nn.Parameter, Kept] = {}
    done = []
    trains = trains_in(model)
    holders = Counter(p for train in trains.values() for p in (*train.cores, *train.gates))
    for name, train in trains.items():
        keep = _indices(name, train, threshold)
        if tuple(index.numel() for index in keep) == train.ranks[1:-1]:
            continue
        of_train = dict(_kept(train, keep))
        if any(holders[p] > 1 for p in of_train):
            raise PruneError(f"'{name}' shares a core or a gate with another layer, so its ranks cannot be removed")
        kept.update(of_train)
        done.append(_record(name, train, keep))
    _check(model, optimizer, kept)
    states = {} if optimizer is None else cut_states(optimizer, kept, uncuttable)
    new = {p: _smaller(p, how) for p, how in kept.items()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p in new:
                module.register_parameter(name, new[p])
    if optimizer is not None and new:
        _hand_over(optimizer, new, states)
    return done


def _hand_over(optimizer: SubspaceOptimizer, new: Mapping[nn.Parameter, nn.Parameter], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Give an optimizer the new parameters in place of the old, and their state."""
    for group in optimizer.param_groups:
        group["params"] = [new.get(p, p) for p in group["params"]]
    renamed: dict[Tensor, Tensor] = dict(new.items())
    state = {renamed.get(p, p): states.get(p, slots) for p, slots in optimizer.state.items()}
    # As at the end of `load_state_dict`: the optimizer also forgets its plan, and the storage that stacked parameters share.
    optimizer.__setstate__({"state": defaultdict(dict, state), "param_groups": optimizer.param_groups})


def _indices(name: str, train: TensorTrain, threshold: float | None) -> list[Tensor]:
    """The indices of the ranks that stay, for each pair of neighbouring cores."""
    found = [mask.nonzero().flatten() for mask in train.open_gates(threshold)]
    for i, index in enumerate(found):
        if not index.numel():
            limit = train.tolerance if threshold is None else threshold
            raise PruneError(
                f"'{name}': no gate of tt_gate_{i} is above {limit:g}, so nothing of the weight would stay; lower the threshold, or the "
                "weight of the rank in the objective"
            )
    return found


def _kept(train: TensorTrain, keep: list[Tensor]) -> Iterator[tuple[nn.Parameter, Kept]]:
    """What stays of each core and gate of a train."""
    for i, core in enumerate(train.cores):
        rows = None
        if i and keep[i - 1].numel() < train.ranks[i]:
            each = 1 if i == len(train.modes) - 1 else train.modes[i]  # rows of the stored matrix for one rank to the left
            inside = torch.arange(each, device=core.device)
            rows = (keep[i - 1].unsqueeze(1) * each + inside).flatten()
        cols = keep[i] if i < len(keep) and keep[i].numel() < train.ranks[i + 1] else None
        if rows is not None or cols is not None:
            yield core, Kept(rows, cols)
        if cols is not None:
            yield train.gates[i], Kept(None, cols)


def _smaller(p: nn.Parameter, kept: Kept) -> nn.Parameter:
    """A new parameter with the rows and columns that stay, and with its gradient."""
    new = nn.Parameter(cut(p.detach(), kept), requires_grad=p.requires_grad)
    new.grad = None if p.grad is None else cut(p.grad, kept)
    return new


@torch.no_grad()
def _record(name: str, train: TensorTrain, keep: list[Tensor]) -> Pruned:
    ranks = (1, *(index.numel() for index in keep), 1)
    entries = sum(left * size * right for left, size, right in zip(ranks, train.modes, ranks[1:], strict=False))
    return Pruned(name, train.ranks, ranks, train.core_entries(stored=True), entries, _change(train, keep))


def _change(train: TensorTrain, keep: list[Tensor]) -> float:
    """`|W - W'| / |W|` of the whole tensors, without forming them.

    The difference is a train of ranks 2 r: `sum_i G'_1 ... G'_(i-1) (G_i - G'_i) G_(i+1) ... G_N`, G' without the ranks that go. A sum
    of this form cancels nothing, so a small change is accurate.
    """
    ranks, last = train.ranks, len(train.modes) - 1
    whole, other = [], []
    for i, core in enumerate(train.tensors()):
        full = core.double().reshape(ranks[i], train.modes[i], ranks[i + 1])
        stays = torch.ones_like(full)
        if i < last:
            stays[...] = torch.zeros(ranks[i + 1], dtype=full.dtype, device=full.device).index_fill(0, keep[i], 1.0)
        whole.append(full)
        some = full * stays
        top = torch.cat([some, full - some], dim=-1)
        other.append(torch.cat([top, torch.cat([torch.zeros_like(full), full], dim=-1)], dim=0))
    other[0], other[-1] = other[0][: ranks[0]], other[-1][..., ranks[-1] :]
    norm = _norm(whole)
    return float(_norm(other) / norm) if norm else 0.0


def _norm(cores: list[Tensor]) -> Tensor:
    """The Frobenius norm of a tensor train."""
    gram = torch.ones(1, 1, dtype=cores[0].dtype, device=cores[0].device)
    for core in cores:
        gram = torch.einsum("ab,asc,bsd->cd", gram, core, core)
    return gram.trace().clamp_min(0.0).sqrt()


def _check(model: nn.Module, optimizer: SubspaceOptimizer | None, kept: Mapping[nn.Parameter, Kept]) -> None:
    """Raise if something beside model and optimizer would go on with the old parameters."""
    if optimizer is not None and not isinstance(optimizer, SubspaceOptimizer):
        raise TypeError(f"prune needs an optimizer of subspace_opt.build, not {type(optimizer).__name__}; without an optimizer, pass None")
    wrapped = [type(module).__name__ for module in model.modules() if type(module).__name__ in WRAPPERS]
    if wrapped:
        raise PruneError(f"the model is wrapped by {wrapped[0]}, which keeps its own list of parameters; prune before wrapping it")
    for p in kept:
        if hasattr(p, "device_mesh"):
            raise PruneError("a core is sharded; prune before `fully_shard`")
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise PruneError("a core or gate has hooks, which would stay with the parameter of the old size; remove them before pruning")
    if optimizer is not None:
        check_whole(optimizer, kept)
