"""LLaMA models by name: the sizes that papers train, and smaller ones that a CPU trains in minutes.

The sizes 60m to 7b are those of GaLore's experiments (arXiv:2403.03507), which later papers reuse; 70b is that of LLaMA-2
(arXiv:2307.09288). `transformers` builds the models and is imported only when a model is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .corpus import VOCAB_SIZE
from .errors import LabError

PAPER_VOCAB_SIZE = 32_000
PAPER_LENGTH = 1024


class Size(NamedTuple):
    """The dimensions of a LLaMA model."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    kv_heads: int | None = None  # None: the same number as heads
    small: bool = False

    @property
    def init(self) -> float:
        """The standard deviation of the initial weights. That of the papers, 0.02, is too small for a narrow model to learn quickly."""
        return math.sqrt(2 / (5 * self.hidden)) if self.small else 0.02  # "small init", arXiv:1910.05895


SIZES = {
    "tiny": Size(64, 176, 2, 2, small=True),
    "mini": Size(128, 352, 4, 4, small=True),
    "small": Size(256, 688, 8, 6, small=True),
    "60m": Size(512, 1376, 8, 8),
    "130m": Size(768, 2048, 12, 12),
    "350m": Size(1024, 2736, 16, 24),
    "1b": Size(2048, 5461, 32, 24),
    "7b": Size(4096, 11_008, 32, 32),
    "70b": Size(8192, 28_672, 64, 80, kv_heads=8),
}


def make_model(
    name: str,
    *,
    vocab_size: int | None = VOCAB_SIZE,
    max_length: int = PAPER_LENGTH,
    device: str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """A causal language model with initial weights that depend only on (name, seed), on any device.

    Args:
        name: A size, or a path to a JSON file or a folder with a Hugging Face config.
        vocab_size: None for that of the config.

    Raises:
        LabError: the name is neither a size nor a path to a config.
    """
    config = _config(name, vocab_size, max_length)
    with private_rng(seed):
        model = _from_config(config)  # always on the CPU, because random numbers differ between devices
    return model.to(device)


def meta_model(name: str, *, vocab_size: int | None = PAPER_VOCAB_SIZE, max_length: int = PAPER_LENGTH) -> nn.Module:
    """A model on the meta device, for planning: shapes without memory. The size 70b takes a fraction of a second.

    Raises:
        LabError: the name is neither a size nor a path to a config.
    """
    config = _config(name, vocab_size, max_length)
    with torch.device("meta"):
        return _from_config(config)


@contextmanager
def private_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's generators inside the block, and restore the caller's random state after it."""
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices that fork_rng does not restore
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def _config(name: str, vocab_size: int | None, max_length: int) -> Any:
    transformers = _transformers()
    if name in SIZES:
        size = SIZES[name]
        config = transformers.LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads or size.heads,
            num_hidden_layers=size.layers,
            initializer_range=size.init,
            vocab_size=vocab_size or PAPER_VOCAB_SIZE,
        )
    else:
        config = _config_file(transformers, name)
        config.vocab_size = vocab_size or config.vocab_size
    config.max_position_embeddings = max_length
    config.use_cache = False  # training does not reuse the keys of an earlier call
    return config


def _config_file(transformers: Any, name: str) -> Any:
    path = Path(name)
    if not path.exists():
        near = get_close_matches(name, SIZES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise LabError(
            f"model: {name!r} is neither a known size nor a path.{hint} Known sizes: {', '.join(SIZES)}; "
            f"or give a folder or a JSON file with a Hugging Face config"
        )
    try:
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise LabError(
            f"model: {name} has no Hugging Face config that transformers {transformers.__version__} can read: "
            f"{reason}. It should be a config.json, or a folder with one, whose `model_type` is a causal language model"
        ) from error


def _from_config(config: Any) -> nn.Module:
    try:
        model: nn.Module = _transformers().AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise LabError(f"model: {type(config).__name__} is not the config of a causal language model: {reason}") from error
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise LabError("model: transformers is not installed. Run: pip install 'subspace-opt[lab]'") from error
    return transformers
