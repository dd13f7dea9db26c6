"""Small GGUF files, written by the `gguf` package from a model of transformers, as llama.cpp's converter does."""

import json
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = [
    "It is a truth universally acknowledged, that 1813 single men's fortunes don't add up to 42.",
    "  def f(x):\n\treturn x ** 2048  # Größe 42½ — naïve 日本\r\n\r\n",
    "The rows and the columns, the keys and the values; WE'VE 1234567 of them! 1813 2048 1234567",
]
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NUMBERS = gguf.GGMLQuantizationType


@cache
def trained() -> str:
    """A byte-level BPE tokenizer of 400 tokens, trained on `TEXT`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = WORDS, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT * 3, trainer)
    return bpe.to_str()


def train_bpe() -> Tokenizer:
    """A byte-level BPE tokenizer of 400 tokens with GPT-2's words, trained on `TEXT`."""
    return Tokenizer.from_str(trained())


def make_llama(**changes) -> LlamaForCausalLM:
    """A Llama with random weights, also in its biases and norms, large enough that every part shows in the logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{"vocab_size": 400, "num_key_value_heads": 2, "max_position_embeddings": 256} | sizes | changes
    )
    model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order, as its convert_hf_to_gguf.py has it (`permute`)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM | None = None,
    bpe: Tokenizer | None = None,
    *,
    changes: dict | None = None,
    tensors: dict | None = None,
    numbers: gguf.GGMLQuantizationType = NUMBERS.F32,
    architecture: str = "llama",
) -> Path:
    """Write a GGUF file.

    Args:
        path: of the file.
        model: default: `make_llama()`.
        bpe: its tokenizer; default: `train_bpe()`.
        changes: key → value, in place of what would be written; None leaves the key out.
        tensors: name → array, in place of what would be written; None leaves the tensor out.
        numbers: the type in which matrices are stored.
        architecture: what the file says it holds.
    """
    model, bpe = model or make_llama(), bpe or train_bpe()
    config, vocab = model.config, bpe.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = [" ".join(merge) for merge in merges_of(bpe)]
    values = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}_token_id": i for i, key in enumerate(("unknown", "bos", "eos", "padding"))},
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    } | (changes or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if value is not None:
            add_value(writer, key, value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    arrays = {}
    for name, p in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        layer = stem.removeprefix("model.layers.").partition(".") if "layers." in stem else None
        short = TENSORS[layer[2]] if layer else TENSORS[stem]
        array = p.detach().numpy()
        arrays[f"blk.{layer[0]}.{short}.{kind}" if layer else f"{short}.{kind}"] = (
            interleaved(array, heads[short]) if short in heads else array
        )
    for name, array in (arrays | (tensors or {})).items():
        if array is None:
            continue
        if array.ndim == 2 and numbers != NUMBERS.F32:
            packed = gguf.quants.quantize(array, numbers)
            writer.add_tensor(name, packed, raw_dtype=numbers)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add a key with the type that its value has in Python."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def merges_of(bpe: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a tokenizer, in their order."""
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]
