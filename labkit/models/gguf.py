"""Turn a Llama-architecture GGUF file into a Hugging Face folder: fp32 safetensors, config and tokenizer.

GGUF is llama.cpp's format: a table of metadata, then tensors in block-quantized types, all of which the
`gguf` package reads. It differs from the Hugging Face layout in three ways. Tensors have other names. The
rows of `q_proj` and `k_proj` are interleaved, because llama.cpp rotates neighbouring pairs where Hugging Face
rotates the two halves of a head. And the tokenizer is a list of tokens and merges in the metadata.

Why not `AutoModel.from_pretrained(gguf_file=…)`: it does the same, but takes half a minute every time.
Agrees with: transformers' `modeling_gguf_pytorch_utils.py` (same weights, bit for bit).
"""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
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
CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL: a token that text never spells


def convert(gguf_path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (fp32) and the tokenizer of the GGUF at `gguf_path` into `folder`.

    Raises:
        ValueError: the file is of another architecture, truncated or corrupt.
    """
    from gguf import GGUFReader  # here, because it is slow to import and only a conversion needs it

    try:
        reader = GGUFReader(gguf_path)
    except Exception as error:
        raise ValueError(
            f"{gguf_path.name} is not a readable GGUF file ({error}); delete it and fetch it again"
        ) from None
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise ValueError(
            f"{gguf_path.name} holds a {meta['general.architecture']!r} model; only 'llama' can be read"
        )
    config = llama_config(meta, tied=all(t.name != "output.weight" for t in reader.tensors))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {huggingface_name(t.name): read_tensor(t, heads) for t in reader.tensors}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    config.save_pretrained(folder)
    tokenizer(meta).save_pretrained(folder)


def llama_config(meta: dict, tied: bool):
    """The `LlamaConfig` that the metadata describes; `tied`: the output layer is the embedding."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def huggingface_name(name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    return f"{TOP_NAMES[parts[0]]}.weight"


def read_tensor(tensor, heads: dict[str, int]) -> Tensor:
    """Dequantize one tensor to fp32, and put the rows of q and k back into Hugging Face's order."""
    from gguf import dequantize

    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    for part, n_heads in heads.items():
        if f".{part}." in tensor.name:
            pairs = weight.view(n_heads, -1, 2, weight.shape[1])  # (heads, head_dim / 2, 2, in): neighbours
            weight = pairs.transpose(1, 2).reshape(weight.shape)  # the two halves of each head
    return weight.contiguous()


def tokenizer(meta: dict):
    """The byte-level BPE tokenizer of the file, with its chat template."""
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # the pre-tokenizer that llama.cpp calls "smollm": every digit a token of its own
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    control = [
        AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds) if k == CONTROL_TOKEN
    ]
    bpe.add_special_tokens(control)
    named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {word: tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for key, word in named.items()}
    result = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    result.chat_template = meta["tokenizer.chat_template"]
    return result
