"""Tiny models of the families that `test_roles.py` and the page on roles know, and what is expected of each.

Every family lists its parameters of two and more dimensions in the first layer, except the weights of plain linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as hf
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

Seen = tuple[str, str, str]  # role, what decided, and the matrices: "" for one matrix of the parameter's own shape
HEAD = ("head", "model get_output_embeddings()", "")
EMBEDDING = ("embedding", "module Embedding", "")
TIED = ("embedding", "module Embedding, tied to the head", "")
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 48, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24}
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Family:
    """A model, and the role of each parameter that is no weight of a plain linear layer."""

    make: Callable[[], nn.Module]
    expected: dict[str, Seen]


def experts(kind: str, rows: str) -> dict[str, Seen]:
    """A mixture of four experts in `model.layers.0.mlp`."""
    return {
        "model.layers.0.mlp.gate.weight": ("router", f"module {kind}TopKRouter".replace("V3TopK", "V3Topk"), ""),
        "model.layers.0.mlp.experts.gate_up_proj": ("fused", f"module {kind}Experts", f"gate 4 of {rows} + up 4 of {rows}"),
        "model.layers.0.mlp.experts.down_proj": (
            "hidden",
            f"module {kind}Experts",
            "4 of " + "x".join(reversed(rows.split("x"))),
        ),
    }


def attention(name: str, parts: str = "q 16x16 + k 16x16 + v 16x16") -> Seen:
    """A fused attention weight that the config cuts."""
    return "fused", f"name {name}, sizes by the config", parts


def _causal(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A function that makes a causal language model of transformers."""
    return lambda: getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**options))


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=4, vocab_size=48, n_positions=10, **ENDS))


def _vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5))


def _whisper() -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 48, "num_mel_bins": 8}
    ends = {"max_source_positions": 10, "max_target_positions": 12, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**layers, **sizes, **ends, **ENDS))


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(hf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=48))


def _deepseek() -> nn.Module:
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
    mixture = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12}
    sizes = {**SIZES, "num_key_value_heads": 4, "intermediate_size": 24, "first_k_dense_replace": 0}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **mixture, **ranks))


MIXTURE = {**GROUPED, "head_dim": 4, "num_experts_per_tok": 2}
PHI3_NAMES = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"

FAMILIES: dict[str, Family] = {
    "Llama, tied": Family(_causal("Llama", **GROUPED, tie_word_embeddings=True), {"model.embed_tokens.weight": TIED}),
    "Qwen3-MoE": Family(
        _causal("Qwen3Moe", **MIXTURE, moe_intermediate_size=12, num_experts=4),
        {"model.embed_tokens.weight": EMBEDDING, **experts("Qwen3Moe", "12x16"), "lm_head.weight": HEAD},
    ),
    "Mixtral": Family(
        _causal("Mixtral", **GROUPED, num_local_experts=4),
        {"model.embed_tokens.weight": EMBEDDING, **experts("Mixtral", "24x16"), "lm_head.weight": HEAD},
    ),
    "GPT-OSS": Family(
        _causal("GptOss", **{**MIXTURE, "intermediate_size": 12}, num_local_experts=4),
        {
            "model.embed_tokens.weight": EMBEDDING,
            "model.layers.0.mlp.router.weight": ("router", "module GptOssTopKRouter", ""),
            "model.layers.0.mlp.experts.gate_up_proj": (
                "fused",
                "module GptOssExperts, whose columns hold gate and up",
                "4 of 16x24",
            ),
            "model.layers.0.mlp.experts.gate_up_proj_bias": ("bias", "name gate_up_proj_bias", ""),
            "model.layers.0.mlp.experts.down_proj": ("hidden", "module GptOssExperts", "4 of 12x16"),
            "model.layers.0.mlp.experts.down_proj_bias": ("bias", "name down_proj_bias", ""),
            "lm_head.weight": HEAD,
        },
    ),
    "DeepSeek-V3": Family(
        _deepseek,
        {
            "model.embed_tokens.weight": EMBEDDING,
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": attention("kv_a_proj_with_mqa", "kv 6x16 + k_rope 2x16"),
            "model.layers.0.self_attn.kv_b_proj.weight": attention("kv_b_proj", "k 16x6 + v 20x6"),
            **experts("DeepseekV3", "12x16"),
            "lm_head.weight": HEAD,
        },
    ),
    "Phi-3": Family(  # the vocabulary is as large as gate_up_proj is wide
        _causal("Phi3", **GROUPED, **ENDS),
        {
            "model.embed_tokens.weight": EMBEDDING,
            PHI3_NAMES[0]: attention("qkv_proj", "q 16x16 + k 8x16 + v 8x16"),
            PHI3_NAMES[1]: ("fused", "name gate_up_proj", "gate 24x16 + up 24x16"),
            "lm_head.weight": HEAD,
        },
    ),
    "GPT-2": Family(
        _gpt2,
        {
            "transformer.wte.weight": TIED,
            "transformer.wpe.weight": ("position", "module Embedding, name wpe", ""),
            "transformer.h.0.attn.c_attn.weight": attention("c_attn", "q 16x16 + k 16x16 + v 16x16, stored transposed"),
            "transformer.h.0.attn.c_proj.weight": ("hidden", "module Conv1D", "16x16, stored transposed"),
            "transformer.h.0.mlp.c_fc.weight": ("hidden", "module Conv1D", "64x16, stored transposed"),
            "transformer.h.0.mlp.c_proj.weight": ("hidden", "module Conv1D", "16x64, stored transposed"),
        },
    ),
    "GPT-NeoX": Family(
        _causal("GPTNeoX", **SIZES, intermediate_size=24),
        {
            "gpt_neox.embed_in.weight": EMBEDDING,
            "gpt_neox.layers.0.attention.query_key_value.weight": attention("query_key_value"),
            "lm_head.weight": HEAD,
        },
    ),
    "Falcon": Family(
        _causal("Falcon", **SIZES),
        {
            "transformer.word_embeddings.weight": TIED,
            "transformer.h.0.self_attention.query_key_value.weight": attention("query_key_value", "q 16x16 + k 4x16 + v 4x16"),
        },
    ),
    "Bloom": Family(
        lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=1, n_head=4, vocab_size=48)),
        {
            "transformer.word_embeddings.weight": TIED,
            "transformer.h.0.self_attention.query_key_value.weight": attention("query_key_value"),
        },
    ),
    "Mamba": Family(  # the vocabulary is as large as in_proj is wide
        _causal("Mamba", hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4),
        {
            "backbone.embeddings.weight": TIED,
            "backbone.layers.0.mixer.A_log": ("ssm", "name A_log", ""),
            "backbone.layers.0.mixer.conv1d.weight": ("depthwise", "module Conv1d", ""),
            "backbone.layers.0.mixer.in_proj.weight": attention("in_proj", "x 32x16 + z 32x16"),
            "backbone.layers.0.mixer.x_proj.weight": attention("x_proj", "dt 1x32 + B 4x32 + C 4x32"),
            "backbone.layers.0.mixer.dt_proj.weight": ("vector", "shape", ""),
        },
    ),
    "ViT": Family(
        _vit,
        {
            "vit.embeddings.cls_token": ("token", "name cls_token", ""),
            "vit.embeddings.position_embeddings": ("position", "name position_embeddings", ""),
            "vit.embeddings.patch_embeddings.projection.weight": ("patch", "module Conv2d, whose patches do not overlap", ""),
            "classifier.weight": ("head", "name classifier", ""),
        },
    ),
    "Whisper": Family(
        _whisper,
        {
            "model.encoder.conv1.weight": ("conv", "module Conv1d", "16x24"),
            "model.encoder.conv2.weight": ("conv", "module Conv1d", "16x48"),
            "model.encoder.embed_positions.weight": ("position", "module Embedding, name embed_positions", ""),
            "model.decoder.embed_tokens.weight": TIED,
            "model.decoder.embed_positions.weight": ("position", "module WhisperPositionalEmbedding, name embed_positions", ""),
        },
    ),
    "BERT": Family(
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=12)),
        {
            "bert.embeddings.word_embeddings.weight": TIED,
            "bert.embeddings.position_embeddings.weight": ("position", "module Embedding, name position_embeddings", ""),
            "bert.embeddings.token_type_embeddings.weight": EMBEDDING,
        },
    ),
    "T5": Family(
        _t5,
        {
            "shared.weight": TIED,
            **{
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
                    "position",
                    "module Embedding, name relative_attention_bias",
                    "",
                )
                for side in ("encoder", "decoder")
            },
        },
    ),
    "Llama, classifier": Family(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GROUPED)),
        {"model.embed_tokens.weight": EMBEDDING, "score.weight": ("head", "name score", "")},
    ),
    "nn.MultiheadAttention": Family(
        lambda: nn.MultiheadAttention(16, 4, add_bias_kv=True),
        {
            "in_proj_weight": ("fused", "module MultiheadAttention", "q 16x16 + k 16x16 + v 16x16"),
            "bias_k": ("bias", "name bias_k", ""),
            "bias_v": ("bias", "name bias_v", ""),
        },
    ),
    "nn.LSTM": Family(
        lambda: nn.LSTM(6, 8),
        {
            "weight_ih_l0": ("fused", "module LSTM", "i 8x6 + f 8x6 + g 8x6 + o 8x6"),
            "weight_hh_l0": ("fused", "module LSTM", "i 8x8 + f 8x8 + g 8x8 + o 8x8"),
        },
    ),
    "nn.GRU": Family(
        lambda: nn.GRU(6, 8),
        {
            "weight_ih_l0": ("fused", "module GRU", "r 8x6 + z 8x6 + n 8x6"),
            "weight_hh_l0": ("fused", "module GRU", "r 8x8 + z 8x8 + n 8x8"),
        },
    ),
    "weight norm": Family(
        lambda: nn.Sequential(weight_norm(nn.Linear(6, 8))),
        {
            "0.parametrizations.weight.original0": ("vector", "shape", ""),
            "0.parametrizations.weight.original1": ("hidden", "module ParametrizedLinear", ""),
        },
    ),
    "nn.Linear(n, 1)": Family(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)), {"1.weight": ("vector", "shape", "")}),
}
