"""The trial that one process and several ranks repeat: spec, model, mesh, steps, and the gradients or tokens of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ... import SubspaceOptimizer, build, load_spec
from ...distributed.meshes import Mesh, make_mesh
from ..errors import LabError
from ..model import make_model

# Sequences for each rank, and tokens of one sequence. With fewer tokens than the width of the model, gradients would not have full rank.
SEQUENCES, LENGTH = 4, 32


@dataclass(frozen=True)
class Trial:
    """The run that one process and all ranks repeat with the same inputs."""

    spec: str  # a name, a path, or a spec in JSON
    mesh: str
    ranks: int
    shape: tuple[int, ...] | None = None
    model: str = "tiny"
    vocab: int | None = 256
    steps: int = 20
    dtype: str = "float64"
    train: bool = False
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    @property
    def grid(self) -> Mesh:
        """The mesh, checked against the number of ranks."""
        return make_mesh(self.mesh, self.ranks, self.shape)

    def build(self, model: nn.Module) -> SubspaceOptimizer:
        """The optimizer of the spec for `model`."""
        return build(load_spec(self.spec, self.overrides), model)

    def make_model(self, device: torch.device) -> nn.Module:
        """The model, with the same weights on every rank."""
        return make_model(self.model, vocab_size=self.vocab, seed=self.seed).to(device, getattr(torch, self.dtype))


def make_gradient(trial: Trial, step: int, number: int, shape: Sequence[int]) -> Tensor:
    """A float64 gradient of full rank, drawn from the seed, the step and the parameter's number: the same bits on every rank.

    The gradients that a model computes differ in their last digits between layouts, and a discontinuous rule (signs, the choice of
    columns) amplifies that difference. With drawn gradients every difference comes from the optimizer.
    """
    generator = torch.Generator().manual_seed(((trial.seed * 100_003 + step) * 100_003 + number) % 2**63)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def make_tokens(trial: Trial, step: int, model: nn.Module, device: torch.device) -> Tensor:
    """The sequences of all ranks, uniformly drawn tokens of shape `(ranks * SEQUENCES, LENGTH + 1)`."""
    generator = torch.Generator().manual_seed(trial.seed * 100_003 + step)
    vocabulary = int(getattr(model, "config").vocab_size)  # noqa: B009  mypy knows no type for a module's attributes
    return torch.randint(vocabulary, (trial.ranks * SEQUENCES, LENGTH + 1), generator=generator).to(device)


def tokens_of_rank(tokens: Tensor, mesh: Mesh, rank: int) -> Tensor:
    """The sequences of one rank. Ranks that share a layer by tensor parallelism read the same sequences."""
    if mesh.kind == "tp":
        return tokens
    readers = mesh.shape[0] if mesh.kind == "fsdp+tp" else mesh.ranks
    at = mesh.position(rank, (0,)) if mesh.kind == "fsdp+tp" else rank
    return tokens.chunk(readers)[at]


def run_backward(model: nn.Module, tokens: Tensor) -> None:
    """Compute the gradients of the mean cross-entropy of next tokens."""
    logits = model(tokens[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def check_heads(model: nn.Module, trial: Trial) -> None:
    """Check that every rank gets whole heads, which a forward pass under tensor parallelism needs.

    Raises:
        LabError: the tensor-parallel ranks do not divide the number of heads.
    """
    if trial.mesh not in ("tp", "fsdp+tp"):
        return
    config, ranks = model.config, trial.grid.shape[-1]
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    if any(number is not None and number % ranks for number in heads):
        raise LabError(
            f"model: {trial.model} has {heads[0]} heads (keys: {heads[1]}), which tensor parallelism over {ranks} ranks does not divide; "
            "choose another --model or --shape, or leave out --train: only --train makes a forward pass"
        )
