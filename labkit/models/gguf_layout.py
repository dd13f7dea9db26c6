"""Llama in GGUF and in Hugging Face's format: the names of the tensors, and the order of the rows of q and k.

Positions rotate pairs of numbers in each head. Hugging Face pairs number i of the first half of a head with number i
of the second; llama.cpp pairs neighbours. So the rows of `q_proj` and `k_proj` change places between the two, within
each head, and so do those of a LoRA's B, which stand for the same outputs. A stays as it is. With the rows in the
wrong order a file loads without an error and talks nonsense.

Agrees with: llama.cpp's `convert_hf_to_gguf.py`, `permute`.
"""

from torch import Tensor

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_LAYER_NAMES = {there: here for here, there in LAYER_NAMES.items()}
GGUF_TOP_NAMES = {there: here for here, there in TOP_NAMES.items()}
FREQUENCIES = "rope_freqs.weight"  # Llama 3.1 and later: a divisor for each frequency of the positions


def huggingface_name(name: str) -> str | None:
    """The name of a tensor in Hugging Face's format, from GGUF's; None if Llama has no place for it.

    >>> huggingface_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    match name.split("."):
        case ["blk", layer, part, kind] if part in LAYER_NAMES and kind in ("weight", "bias"):
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
        case [part, "weight"] if part in TOP_NAMES:
            return f"{TOP_NAMES[part]}.weight"
    return None


def gguf_name(name: str) -> str | None:
    """`huggingface_name` undone.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight"), gguf_name("lm_head.weight")
    ('blk.3.attn_q.weight', 'output.weight')
    """
    module, _, kind = name.rpartition(".")
    if module in GGUF_TOP_NAMES and kind == "weight":
        return f"{GGUF_TOP_NAMES[module]}.weight"
    number, _, part = module.removeprefix("model.layers.").partition(".")
    if part in GGUF_LAYER_NAMES and number.isdecimal() and kind in ("weight", "bias"):
        return f"blk.{number}.{GGUF_LAYER_NAMES[part]}.{kind}"
    return None


def heads_of(name: str, config) -> int | None:
    """How many heads the rows of a tensor are divided into, by its GGUF name; None if their order is the same."""
    part = name.split(".")[-2]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)


def rows_in_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows in Hugging Face's order from those in GGUF's: (out, …), where out is heads × head_dim."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])  # (heads, head_dim / 2, 2, …): neighbours
    return pairs.transpose(1, 2).reshape(weight.shape)  # the two halves of each head


def rows_in_pairs(weight: Tensor, heads: int) -> Tensor:
    """`rows_in_halves` undone."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])  # (heads, 2, head_dim / 2, …)
    return halves.transpose(1, 2).reshape(weight.shape)
