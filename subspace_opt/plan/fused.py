"""Parts of fused weights: query, key and value, gate and up, and the gates of recurrent layers, with sizes from the model's config.

Layouts are those of the models' forward functions. A weight whose layout is unknown keeps no parts, so it stays one matrix.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .names import Role

Parts = tuple[tuple[str, int], ...]

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "n_head_kv")
WIDTH = ("hidden_size", "n_embd", "d_model", "embed_dim", "n_embed")
GATES = {nn.LSTM: "ifgo", nn.LSTMCell: "ifgo", nn.GRU: "rzn", nn.GRUCell: "rzn"}  # in PyTorch's order of rows

CONTIGUOUS = ("qkv", "qkv_proj", "Wqkv", "wqkv", "W_pack", "c_attn", "query_key_value", "in_proj_qkv", "linear_qkv")
UP = ("gate_up_proj", "w12", "w13", "weights_in", "input_linear", "Wi")
# Models that lay out the rows of query, key and value in turn: for each head, or for each key head with its query heads.
BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "fuyu", "gpt_bigcode")
BY_KEY_HEAD = ("internlm2",)
UNKNOWN = ("wqkv", "query_key_value", "linear_qkv")  # names with several layouts, so that the model must be known


class Words:
    """The numbers by which a model describes itself: the nearest config above a module, else the attributes of the module's parents."""

    def __init__(self, parents: list[nn.Module]) -> None:
        configs = (getattr(module, "config", None) for module in reversed(parents))
        self.config: Any = next((config for config in configs if config is not None), None)
        self.parent = parents[-1] if parents else None
        self.kind = str(self._of(self.config, "model_type") or "")

    def number(self, *names: str) -> int | None:
        """The first of these fields that is a whole number."""
        for source in (self.config, self.parent):
            for name in names:
                value = self._of(source, name)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    def flag(self, name: str) -> bool:
        """Whether the config sets this field."""
        return bool(self._of(self.config, name))

    @staticmethod
    def _of(source: Any, name: str) -> Any:
        return source.get(name) if isinstance(source, dict) else getattr(source, name, None)


def fused_role(leaf: str, rows: int, cols: int, words: Words) -> Role | None:
    """The role of a layer with `rows` outputs and `cols` inputs if its name is that of a fused weight."""
    if leaf in CONTIGUOUS:
        return _attention(leaf, rows, cols, words)
    if leaf in UP:
        return _gate_and_up(leaf, rows, words)
    sizes = {"kv_a_proj_with_mqa": _latent, "kv_b_proj": _expanded, "in_proj": _mamba, "x_proj": _mamba_inputs}.get(leaf)
    sizes = {"in_proj_qkvz": _delta_net, "in_proj_ba": _delta_net_gates}.get(leaf, sizes)
    found = sizes(words, rows) if sizes else None
    return None if found is None or not _fills(*found, rows) else Role("fused", f"name {leaf}, sizes by the config", *found)


def recurrent_role(module: nn.Module, name: str, rows: int) -> Role | None:
    """The role of a weight of a recurrent layer: a matrix for each gate."""
    gates = next((letters for kind, letters in GATES.items() if isinstance(module, kind)), "")
    if not gates or not name.startswith(("weight_ih", "weight_hh")):
        return None
    return Role("fused", f"module {type(module).__name__}", tuple((gate, rows // len(gates)) for gate in gates))


def equal_parts(names: str, rows: int) -> Parts:
    """Parts of one size."""
    each = names.split()
    return tuple((name, rows // len(each)) for name in each)


def expert_role(module: nn.Module, name: str, shape: tuple[int, ...], words: Words) -> Role:
    """The role of a stack of experts' weights `(experts, rows, cols)`."""
    known = f"module {type(module).__name__}"
    if name not in UP:
        return Role("hidden", known)
    width = words.number(*WIDTH)
    apart = getattr(module, "is_concatenated", True) and getattr(module, "has_gate", True) and not getattr(module, "is_transposed", False)
    if apart and not shape[1] % 2 and (hasattr(module, "is_transposed") or (shape[2] == width != shape[1])):
        return Role("fused", known, equal_parts("gate up", shape[1]))
    return Role("fused", f"{known}, whose columns hold gate and up")


def _fills(parts: Parts, groups: int, rows: int) -> bool:
    return all(size > 0 and size % groups == 0 for _, size in parts) and sum(size for _, size in parts) == rows


def _layout(leaf: str, words: Words) -> str:
    """How the rows of query, key and value follow each other: `in turn`, `by head`, `by key head`, or nothing if that is not known."""
    kind = words.kind
    if kind == "falcon" and words.flag("new_decoder_architecture"):
        return "by key head"
    if kind in ("falcon", "gpt_bigcode") and words.flag("multi_query"):
        return "in turn"
    if kind in (*BY_HEAD, "falcon"):
        return "by head"
    if kind in BY_KEY_HEAD:
        return "by key head"
    return "" if kind == "codegen" or leaf in UNKNOWN else "in turn"


def _attention(leaf: str, rows: int, cols: int, words: Words) -> Role:
    sharing, head_size = words.number("heads_per_kv"), words.number("head_dim")
    if leaf == "wqkv" and sharing and head_size:  # torchtitan: each key head follows the query heads that share it
        groups = max(1, rows // ((sharing + 2) * head_size))
        parts = (("q", groups * sharing * head_size), ("k", groups * head_size), ("v", groups * head_size))
        if _fills(parts, groups, rows):
            return Role("fused", f"name {leaf}, sizes by its module", parts, groups)
    layout, heads = _layout(leaf, words), words.number(*HEADS)
    if layout and heads:
        key_heads = words.number(*KEY_HEADS) or heads
        if layout == "by head":
            key_heads = heads
        elif layout == "in turn" and words.kind in ("falcon", "gpt_bigcode"):
            key_heads = 1
        size = rows // (heads + 2 * key_heads)
        parts = (("q", heads * size), ("k", key_heads * size), ("v", key_heads * size))
        groups = {"by head": heads, "by key head": key_heads}.get(layout, 1)
        if _fills(parts, groups, rows) and (key_heads == heads or size == _head_size(words, heads)):
            return Role("fused", f"name {leaf}, sizes by the config", parts, groups)
    if layout == "in turn" and rows in (3 * cols, 2 * cols):
        return Role("fused", f"name {leaf}", equal_parts("q k v" if rows == 3 * cols else "k v", rows))
    return Role("fused", f"name {leaf}, in a layout that is not known")


def _head_size(words: Words, heads: int) -> int:
    return words.number("head_dim") or (words.number(*WIDTH) or 0) // heads


def _gate_and_up(leaf: str, rows: int, words: Words) -> Role | None:
    """Two halves. `Wi` is also the name of a layer without a gate, so the config must give its size."""
    if rows % 2 or (leaf == "Wi" and rows != 2 * (words.number("intermediate_size") or 0)):
        return None
    return Role("fused", f"name {leaf}", equal_parts("gate up", rows))


def _latent(words: Words, rows: int) -> tuple[Parts, int] | None:
    rank, rope = words.number("kv_lora_rank"), words.number("qk_rope_head_dim")
    return ((("kv", rank), ("k_rope", rope)), 1) if rank and rope else None


def _expanded(words: Words, rows: int) -> tuple[Parts, int] | None:
    heads, key, value = words.number(*HEADS), words.number("qk_nope_head_dim"), words.number("v_head_dim")
    return ((("k", heads * key), ("v", heads * value)), heads) if heads and key and value else None


def _mamba(words: Words, rows: int) -> tuple[Parts, int] | None:
    """Mamba: x and the gate z. Mamba-2: the gate z, then x with B and C, then the step sizes dt."""
    inner = words.number("intermediate_size", "d_inner")
    if words.kind.startswith("mamba2"):
        width, expand, heads = words.number(*WIDTH), words.number("expand"), words.number("num_heads")
        states, groups = words.number("state_size"), words.number("n_groups")
        if not (width and expand and heads and states and groups):
            return None
        inner = width * expand
        return (("z", inner), ("xBC", inner + 2 * groups * states), ("dt", heads)), 1
    return (equal_parts("x z", rows), 1) if inner and rows == 2 * inner else None


def _mamba_inputs(words: Words, rows: int) -> tuple[Parts, int] | None:
    steps, states = words.number("time_step_rank", "dt_rank"), words.number("state_size", "d_state")
    return ((("dt", steps), ("B", states), ("C", states)), 1) if steps and states else None


def _delta_net(words: Words, rows: int) -> tuple[Parts, int] | None:
    heads, key, value = words.number("linear_num_key_heads"), words.number("linear_key_head_dim"), words.number("linear_value_head_dim")
    values = words.number("linear_num_value_heads")
    if not (heads and key and value and values):
        return None
    return (("q", heads * key), ("k", heads * key), ("v", values * value), ("z", values * value)), heads


def _delta_net_gates(words: Words, rows: int) -> tuple[Parts, int] | None:
    heads, values = words.number("linear_num_key_heads"), words.number("linear_num_value_heads")
    return (equal_parts("b a", 2 * values), heads) if heads and values else None
