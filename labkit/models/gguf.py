"""Turn a Llama-architecture GGUF file into a Hugging Face folder: fp32 safetensors, config and tokenizer.

GGUF is llama.cpp's format: a table of metadata, then tensors in block-quantized types, all of which the
`gguf` package reads. It differs from the Hugging Face layout in three ways. Tensors have other names, the rows of
`q_proj` and `k_proj` another order (`labkit.models.gguf_layout`). And the tokenizer is a list of tokens and merges
in the metadata.

A file is read completely or refused: every key about the model or its tokenizer must be understood, and the
tensors must be the parameters of the resulting model, in name and shape.

Why not `AutoModel.from_pretrained(gguf_file=…)`: it takes half a minute every time, and passes over the scaling
of positions. Agrees with it in the weights, bit for bit, and with the model that a file was made from.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from labkit.checks import check_choice, check_whole, needed
from labkit.files.writing import new_folder
from labkit.models.gguf_layout import FREQUENCIES, heads_of, huggingface_name, rows_in_halves
from labkit.models.gguf_metadata import Metadata
from labkit.models.gguf_tokenizer import end_ids, read_tokenizer
from labkit.models.shapes import meta_model


@dataclass(frozen=True)
class Checkpoint:
    """What a GGUF file holds, in the terms of Hugging Face.

    Attributes:
        config: a `LlamaConfig`.
        tensors: by the names of `LlamaForCausalLM`, fp32.
        tokenizer: with the chat template, if there is one.
    """

    config: Any
    tensors: dict[str, Tensor]
    tokenizer: Any

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and the tokenizer's files into an empty folder."""
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def convert(gguf_path: Path, folder: Path) -> None:
    """Make the Hugging Face folder of the GGUF file at `gguf_path`; it replaces what is at `folder`.

    Raises:
        ValueError: see `read_gguf`.
        CannotWrite: no space, no permission; what was there is intact.
    """
    checkpoint = read_gguf(gguf_path)
    with new_folder(folder) as made:
        checkpoint.save(made)


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file.

    Raises:
        ValueError: truncated or corrupt; or of another architecture, tokenizer, kind of position scaling or
            quantization, or with a key or tensor that is not understood. The message names it.
    """
    gguf = needed("gguf", "reading a GGUF file")  # here: it is slow to import, and only a conversion needs it
    try:
        reader = gguf.GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:
        raise ValueError(f"{path.name} is not a readable GGUF file ({error}); get it again") from None
    meta = Metadata(values, path.name)
    architecture = meta.take("general.architecture")
    if architecture != "llama":
        raise meta.refusal(f"it holds a {architecture!r} model; only 'llama' can be read")
    meta.expect("general.type", "model", "only a whole model can be read")
    meta.expect("split.count", (0, 1), "it is one of several files; join them with llama.cpp's gguf-split")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    frequencies = tensors.pop(FREQUENCIES, None)
    config = llama_config(meta, set(tensors), None if frequencies is None else read_tensor(frequencies, meta))
    tokenizer = read_tokenizer(meta, config.max_position_embeddings)
    meta.refuse_rest(("llama.", "tokenizer."))
    renamed = {}
    for name, tensor in tensors.items():
        there = huggingface_name(name)
        if there is None:
            raise meta.refusal(f"it has a tensor {name!r}, for which Llama has no place")
        heads = heads_of(name, config)
        weight = read_tensor(tensor, meta)
        renamed[there] = (weight if heads is None else rows_in_halves(weight, heads)).contiguous()
    return Checkpoint(config, complete(renamed, config, meta), tokenizer)


def llama_config(meta: Metadata, names: set[str], frequencies: Tensor | None):
    """The `LlamaConfig` that the metadata describes.

    Args:
        meta: of the file.
        names: of its tensors; they say which layers have a bias, and whether the output layer is the embedding.
        frequencies: (head_dim / 2,) divisors of the frequencies of the positions, if the file has them.
    """
    from transformers import LlamaConfig

    def size(key: str, *default: object) -> int:
        value = meta.take(f"llama.{key}", *default)
        try:
            check_whole(f"llama.{key}", value)
        except ValueError as error:
            raise meta.refusal(str(error)) from None
        return value

    width, heads, context = size("embedding_length"), size("attention.head_count"), size("context_length")
    head_dim = size("attention.key_length", width // heads)
    meta.expect("llama.attention.value_length", head_dim, "keys and values of different sizes cannot be read")
    meta.expect("llama.rope.dimension_count", head_dim, "positions in a part of each head cannot be read")
    for key in ("llama.expert_count", "llama.expert_used_count"):
        meta.expect(key, 0, "a mixture of experts cannot be read")
    return LlamaConfig(
        vocab_size=size("vocab_size", len(meta.look("tokenizer.ggml.tokens"))),
        hidden_size=width,
        intermediate_size=size("feed_forward_length"),
        num_hidden_layers=size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=meta.take("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters=rope_parameters(meta, context, frequencies),
        tie_word_embeddings="output.weight" not in names,
        attention_bias=any(".attn_" in name and name.endswith(".bias") for name in names),
        mlp_bias=any(".ffn_" in name and name.endswith(".bias") for name in names),
        bos_token_id=meta.look("tokenizer.ggml.bos_token_id", None),
        eos_token_id=end_ids(meta),
        pad_token_id=meta.look("tokenizer.ggml.padding_token_id", None),
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def rope_parameters(meta: Metadata, context: int, frequencies: Tensor | None) -> dict:
    """How positions become rotations, in transformers' terms.

    What the file leaves out is as in llama.cpp: base 10,000; a factor without a type stretches linearly.
    """
    theta = {"rope_theta": meta.take("llama.rope.freq_base", 10000.0)}
    old_factor = meta.take("llama.rope.scale_linear", 0.0)
    factor = meta.take("llama.rope.scaling.factor", old_factor) or 1.0
    kind = meta.take("llama.rope.scaling.type", "linear")
    original = meta.take("llama.rope.scaling.original_context_length", context)
    meta.take("llama.rope.scaling.finetuned", None)  # whether training went on with it: changes no number
    meta.expect("llama.rope.scaling.attn_factor", 1.0, "a factor on the attention cannot be read")
    try:
        check_choice("llama.rope.scaling.type", kind, ("none", "linear", "yarn"))
    except ValueError as error:
        raise meta.refusal(str(error)) from None
    if frequencies is not None:
        if kind == "yarn" or (kind == "linear" and factor != 1.0):
            raise meta.refusal(f"it scales positions twice, by {FREQUENCIES} and as {kind!r}")
        divisors = frequencies.tolist()
        return theta | {
            "rope_type": "longrope",  # divides each frequency by a number of its own
            "short_factor": divisors,
            "long_factor": divisors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    if kind == "yarn":
        beta = {
            f"beta_{speed}": meta.take(f"llama.rope.scaling.yarn_beta_{speed}", default)
            for speed, default in (("fast", 32.0), ("slow", 1.0))
        }
        return (
            theta
            | beta
            | {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            }
        )
    if kind == "linear" and factor != 1.0:
        return theta | {"rope_type": "linear", "factor": factor}
    return {"rope_type": "default"} | theta


def read_tensor(tensor, meta: Metadata) -> Tensor:
    """Dequantize one tensor to fp32."""
    dequantize = needed("gguf", "reading a GGUF file").dequantize
    try:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except (NotImplementedError, KeyError, ValueError):
        kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
        raise meta.refusal(f"{tensor.name} is stored as {kind}, which cannot be read") from None
    if not torch.isfinite(weight).all():
        raise meta.refusal(f"{tensor.name} holds numbers that are infinite or not numbers")
    return weight


def complete(tensors: dict[str, Tensor], config, meta: Metadata) -> dict[str, Tensor]:
    """The tensors, with a bias of zeros where other layers have one and the file has none.

    Raises:
        ValueError: they are not the parameters of the model that `config` describes, in name and shape.
    """
    shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    absent = {name for name in shapes.keys() - tensors.keys() if name.endswith(".bias")}
    tensors = tensors | {name: torch.zeros(shapes[name]) for name in sorted(absent)}
    for problem, names in (
        ("lacks", shapes.keys() - tensors.keys()),
        ("has no place for", tensors.keys() - shapes.keys()),
        (
            "gives another shape to",
            {n for n in shapes if n in tensors and tuple(tensors[n].shape) != shapes[n]},
        ),
    ):
        if names:
            raise meta.refusal(f"measured by its own sizes it {problem} {', '.join(sorted(names)[:3])}")
    return tensors
