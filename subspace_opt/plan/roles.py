"""The role of every parameter of a model, by the class of its module, the model's own words, its name, or its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from ..spec import SpecError
from ..spec.model import ROLES
from .fused import Words, equal_parts, expert_role, fused_role, recurrent_role
from .names import PATCH, POSITION, Role, canonical_name, expert_parents, head_or_router, is_vector, raw_role

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
MOST_CHANNELS = 4  # of an image; a strided convolution of more channels without overlap reduces features inside a model


def find_roles(model: nn.Module) -> dict[int, Role]:
    """The role of every parameter, by `id`. A weight tied to an embedding is an embedding."""
    finder = _Finder(model)
    roles: dict[int, Role] = {}
    for path, module in finder.modules.items():
        for name, p in module.named_parameters(recurse=False):
            role = finder.role(path, module, name, tuple(p.shape))
            if id(p) not in roles or role.name == "embedding":
                roles[id(p)] = role
    for head, why in _named_heads(model):
        for p in (p for p in head.parameters() if p.dim() > 1):
            tied = roles[id(p)].name == "embedding"
            roles[id(p)] = replace(roles[id(p)], why=f"{roles[id(p)].why}, tied to the head") if tied else Role("head", why)
    if not any(role.name == "head" or "tied" in role.why for role in roles.values()):
        roles |= {key: Role("head", "shape, as wide as the vocabulary") for key in _wide_layers(model) if roles[key].name == "hidden"}
    return roles


def _named_heads(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The layers that the model, or a model inside it, calls its output layer, and the method that said so."""
    for module in model.modules():
        for method in ("get_output_embeddings", "get_classifier"):
            call = getattr(module, method, None)
            try:
                found = call() if callable(call) else None
            except (AttributeError, NotImplementedError):  # models without a head raise either
                continue
            for head in found if isinstance(found, tuple | list) else (found,):
                if isinstance(head, nn.Module):
                    yield head, f"model {method}()"


def _wide_layers(model: nn.Module) -> list[int]:
    """The weights of linear layers as wide as an embedding's vocabulary, by `id`."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    vocabularies = {m.num_embeddings for m in embeddings}
    wide = [id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in vocabularies]
    # If a vocabulary is as small as the model's width, hidden layers have that width too. Only the last linear layer is then the head.
    return wide if not vocabularies & {m.embedding_dim for m in embeddings} else wide[-1:]


class _Finder:
    """The modules of a model by path, and what must be known of all of them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.experts = expert_parents([canonical_name(path) for path in self.modules])
        self.classifies = not any(isinstance(module, nn.Embedding) for module in self.modules.values())

    def role(self, path: str, module: nn.Module, name: str, shape: tuple[int, ...]) -> Role:
        """The role of the parameter `name` of a module."""
        if (told := _told(path, module, name)) is not None:
            return told
        if isinstance(module, ParametrizationList):  # of a weight norm and the like: the module two levels up has the weight
            owner, _, _ = path.rpartition(".parametrizations.")
            if is_vector(shape):
                return Role("vector", "shape")
            return self.role(owner, self.modules[owner], path.rpartition(".")[2], shape)
        words, kind = canonical_name(path).split("."), type(module).__name__
        known = f"module {kind}"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or (kind.endswith("Embedding") and name == "weight" and len(shape) == 2):
            is_position = POSITION.search(words[-1]) or "position" in kind.lower()
            return Role("position", f"{known}, name {words[-1]}") if is_position else Role("embedding", known)
        if isinstance(module, NORMS) or kind.lower().endswith("norm"):
            return Role("norm", known)
        if len(shape) < 2:
            return raw_role(name, shape) or Role("vector", "shape")
        if isinstance(module, _ConvNd):
            return _conv_role(module, words, known)
        if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
            return Role("fused", known, equal_parts("q k v", shape[0]))
        if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
            return recurrent_role(module, name, shape[0]) or raw_role(name, shape) or Role("hidden", known)
        if "router" in kind.lower() or kind.lower() in ("moegate", "topkgate"):
            return Role("router", known)
        if len(shape) == 3 and "expert" in kind.lower():
            return raw_role(name, shape) or expert_role(module, name, shape, self._words(path))
        return self._layer_role(path, module, name, shape)

    def _layer_role(self, path: str, module: nn.Module, name: str, shape: tuple[int, ...]) -> Role:
        """The role of a linear layer's weight, or of a parameter that a module of no known class holds."""
        words, kind = canonical_name(path).split("."), type(module).__name__
        is_transposed = kind == "Conv1D" and hasattr(module, "nf")  # GPT-2's linear layer in transformers: (in, out)
        is_linear = isinstance(module, nn.Linear) or is_transposed or ("linear" in kind.lower() and name == "weight")
        if not is_linear:
            found = raw_role(name, shape) or head_or_router(words if name == "weight" else [*words, name], self.experts)
            return found or Role("hidden", "shape", is_guess=True)
        rows, cols = reversed(shape) if is_transposed else shape[-2:]
        found = fused_role(words[-1], rows, cols, self._words(path)) or head_or_router(words, self.experts)
        if found is None and words == ["fc"] and self.classifies and isinstance(module, nn.Linear):
            return Role("head", "name fc")
        if found is None and any(PATCH.search(word) for word in words):
            return Role("patch", f"module {kind}, name {next(word for word in words if PATCH.search(word))}")
        if found is None and is_vector(shape):
            return Role("vector", "shape")
        return found or Role("hidden", f"module {kind}")

    def _words(self, path: str) -> Words:
        """The numbers that describe a module: those of its parents, and of itself if it holds raw parameters."""
        names = path.split(".")
        return Words([self.modules[".".join(names[:i])] for i in range(len(names))])


def _told(path: str, module: nn.Module, name: str) -> Role | None:
    """The role that a module itself gives to one of its own parameters, in its attribute `parameter_roles`."""
    roles = getattr(module, "parameter_roles", None)
    if not isinstance(roles, Mapping) or name not in roles:
        return None
    kind, role = type(module).__name__, roles[name]
    if role not in ROLES or role == "fused":
        known = ", ".join(r for r in ROLES if r != "fused")
        raise SpecError(f"module '{path}' ({kind}): parameter_roles['{name}'] is {role!r}; use one of {known}")
    return Role(role, f"module {kind}, parameter_roles")


def _conv_role(module: _ConvNd, words: list[str], known: str) -> Role:
    if module.groups > 1 and module.groups == module.in_channels:
        return Role("depthwise", known)
    apart = module.kernel_size == module.stride and max(module.kernel_size) > 1
    if apart and (module.in_channels <= MOST_CHANNELS or any(PATCH.search(word) for word in words)):
        return Role("patch", f"{known}, whose patches do not overlap")
    return Role("conv", known)
