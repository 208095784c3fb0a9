"""State dictionaries for trainers that save the optimizer's state of one rank."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..optimizer import SubspaceOptimizer


def save_whole_tensors(optimizer: SubspaceOptimizer) -> None:
    """Make `state_dict()` return whole tensors in place of distributed ones. It stays a collective, which all ranks call."""
    optimizer.register_state_dict_post_hook(_whole)


def _whole(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        i: {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in slots.items()}
        for i, slots in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
