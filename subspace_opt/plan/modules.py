"""Kinds of the modules that hold a parameter (embedding, output head, linear, convolution, norm), for routes with `module`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


def refuse_flat(model: nn.Module) -> None:
    """Raise if the model's weights are flattened, so that no rank knows their rows and columns.

    Raises:
        ValueError: A parameter is flattened by FSDP1 or ZeRO-3, or is a 1-D view of a matrix.
    """
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"'{path or type(module).__name__}' is wrapped by FSDP1, whose flat parameters have no rows and columns; shard the "
                "model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
        for name, p in module.named_parameters(recurse=False):
            where = f"{path}.{name}".lstrip(".")
            if hasattr(p, "ds_id"):
                raise ValueError(
                    f"parameter '{where}' is partitioned by DeepSpeed ZeRO-3, which leaves no rows and columns; use FSDP2, or ZeRO-1 or 2 "
                    "without their partitioning of the optimizer"
                )
            matrix = isinstance(module, nn.Linear | nn.Embedding | _ConvNd) and name == "weight"
            if matrix and p.dim() < 2:
                raise ValueError(
                    f"parameter '{where}' of a {type(module).__name__} has shape {tuple(p.shape)}: a 1-D view of a matrix, such as "
                    "FSDP1 makes with use_orig_params; build the optimizer before flattening, or shard with fully_shard (FSDP2)"
                )


def module_kinds(model: nn.Module) -> dict[int, frozenset[str]]:
    """The kinds of every parameter, by `id`. A tied weight has the kinds of all modules that hold it: embedding and head."""
    kinds: dict[int, set[str]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            kinds.setdefault(id(parameter), set()).update(_kinds_of(module, parameter))
    for weight in _heads(model):
        kinds.setdefault(id(weight), set()).add("head")
    return {key: frozenset(value) for key, value in kinds.items()}


def _kinds_of(module: nn.Module, parameter: Tensor) -> set[str]:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"embedding"}
    if isinstance(module, _ConvNd):
        return {"conv"}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer in transformers; its weight is (in, out)
        return {"linear", "transposed"} if parameter.dim() == 2 else {"linear"}
    if isinstance(module, nn.Linear):
        return {"linear"}
    if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or type(module).__name__.lower().endswith("norm"):
        return {"norm"}
    return set()


def _heads(model: nn.Module) -> Iterator[Tensor]:
    """Weights of output heads: the layer that the model names itself, and linear layers as wide as an embedding's vocabulary."""
    named = getattr(model, "get_output_embeddings", None)
    if callable(named):
        head = named()
        if isinstance(head, nn.Module):
            yield from head.parameters(recurse=False)
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    inner = {m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)}
    # If a vocabulary is as small as the model's width, hidden layers have that width too. Only the last linear layer is then the head.
    wide = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in vocabularies]
    for module in wide if not vocabularies & inner else wide[-1:]:
        yield from module.parameters(recurse=False)
