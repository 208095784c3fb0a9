"""Replaces the linear layers and embeddings of a model by tensor trains."""

from __future__ import annotations

import fnmatch
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .factors import FactorError
from .layers import PARTS, TTEmbedding, TTLinear
from .trains import TOLERANCE, Rank, TensorTrain

Start = Literal["weight", "random"]


@dataclass(frozen=True)
class Tensorized:
    """The replaced layers by name, and the reasons why other linear layers and embeddings stay as they are."""

    layers: dict[str, TensorTrain]
    skipped: dict[str, str]

    @property
    def ratio(self) -> float:
        """The compression ratio: entries of the dense weights for each entry of the cores."""
        return sum(t.dense_size for t in self.layers.values()) / sum(t.core_entries(stored=True) for t in self.layers.values())

    def __str__(self) -> str:
        lines = [f"{name}: {train}" for name, train in self.layers.items()]
        lines += [f"{name}: unchanged, {why}" for name, why in self.skipped.items()]
        return "\n".join([*lines, f"compression ratio {self.ratio:.1f}"])


def tensorize(
    model: nn.Module,
    *,
    rank: Rank,
    start: Start = "weight",
    min_side: int = 64,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    parts: int = PARTS,
    pad: bool = False,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Tensorized:
    """Replace every `nn.Linear` and `nn.Embedding` of a model by a tensor train, in place.

    Build the optimizer after it. Subclasses of the two classes stay as they are, because other code may use their weights directly.

    Args:
        rank: Upper bound for the ranks of every layer.
        start: `weight` approximates the present weight, exactly if its ranks allow it. `random` draws new cores, as the paper does.
        min_side: Layers with a side below it stay as they are.
        include, exclude: Globs of module names; a layer needs one of the first and none of the second.
        parts, pad: As in `TTLinear`. Embeddings are always padded if they need it.
        seed: The draws come from it and from the layer's name.

    Raises:
        FactorError: A side of a linear layer is prime, and `pad` is False. The model is unchanged.
        ValueError: No layer is left to replace, or the weight of one is shared with another module, or an embedding has options that a
            tensor train cannot have. The model is unchanged.
    """
    if start not in ("weight", "random"):
        raise ValueError(f"start is {start!r}; use 'weight' or 'random'")
    chosen, skipped = _chosen(model, min_side, include, exclude)
    if not chosen:
        raise ValueError(
            "no layer to replace: the model has no nn.Linear or nn.Embedding that `include`, `exclude` and `min_side` accept"
            + "".join(f"\n  {name}: {why}" for name, why in skipped.items())
        )
    made: dict[str, TensorTrain] = {}
    for name, layer in chosen.items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        try:
            made[name] = _train_of(layer, rank, parts, pad=pad, seed=int.from_bytes(digest[:7], "big"), tolerance=tolerance)
        except FactorError as error:
            raise FactorError(f"'{name}': {error}; or exclude the layer: exclude=['{name}']") from None
        if start == "weight":
            made[name].set_weight(layer.weight)
    for name, train in made.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, train)
    return Tensorized(made, skipped)


def _chosen(
    model: nn.Module, min_side: int, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, nn.Linear | nn.Embedding], dict[str, str]]:
    """The layers to replace by name, and the reasons to leave others."""
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    chosen: dict[str, nn.Linear | nn.Embedding] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear and type(module) is not nn.Embedding:
            continue
        if not name:
            raise ValueError(f"the model itself is a {type(module).__name__}; put it into a container, such as nn.Sequential")
        if not any(fnmatch.fnmatchcase(name, glob) for glob in include) or any(fnmatch.fnmatchcase(name, glob) for glob in exclude):
            skipped[name] = "by include and exclude"
        elif min(module.weight.shape) < min_side:
            skipped[name] = f"a side of {tuple(module.weight.shape)} is below min_side {min_side}"
        else:
            _check(name, module, is_shared=holders[id(module.weight)] > 1)
            chosen[name] = module
    return chosen, skipped


def _check(name: str, layer: nn.Linear | nn.Embedding, *, is_shared: bool) -> None:
    if is_shared:
        raise ValueError(f"the weight of '{name}' is shared with another module; untie them, or exclude both: exclude=['{name}', ...]")
    if isinstance(layer, nn.Embedding):
        odd = [key for key in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(layer, key)]
        if odd:
            raise ValueError(f"embedding '{name}' has {odd[0]}, which a tensor train does not have; turn it off, or exclude=['{name}']")


def _train_of(layer: nn.Linear | nn.Embedding, rank: Rank, parts: int, *, pad: bool, seed: int, tolerance: float) -> TTLinear | TTEmbedding:
    """A tensor train of the layer's shape, device, dtype and mode; a linear layer keeps its bias."""
    weight = layer.weight
    train: TTLinear | TTEmbedding
    if isinstance(layer, nn.Linear):
        train = TTLinear(
            layer.in_features,
            layer.out_features,
            rank,
            seed=seed,
            bias=False,
            parts=parts,
            pad=pad,
            tolerance=tolerance,
            device=weight.device,
            dtype=weight.dtype,
        )
    else:
        train = TTEmbedding(
            layer.num_embeddings,
            layer.embedding_dim,
            rank,
            seed=seed,
            padding_idx=layer.padding_idx,
            parts=parts,
            tolerance=tolerance,
            device=weight.device,
            dtype=weight.dtype,
        )
    train.requires_grad_(weight.requires_grad)
    if isinstance(layer, nn.Linear):
        train.register_parameter("bias", layer.bias)
    return train.train(layer.training)
