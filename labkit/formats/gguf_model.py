"""A Llama with its adapter merged as one GGUF file, which llama.cpp, Ollama and LM Studio load.

Norms and biases stay in F32. In Q4_0 and Q4_1 the embedding and the output layer are Q8_0: an error there reaches every
token, and llama.cpp's own quantizer spares them too. Nothing here is calibrated; the K-types, which are better at the
same size, are made from an F16 or F32 file by llama.cpp's `llama-quantize`.

Agrees with: llama.cpp's `convert_hf_to_gguf.py`, `LlamaModel`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.checks import check_choice, needed
from labkit.formats.gguf_file import NUMBERS, GGUFTensor, write_gguf
from labkit.formats.gguf_vocabulary import vocabulary
from labkit.formats.merged_weights import MergedWeight, merged_weights
from labkit.models.gguf_layout import FREQUENCIES, gguf_name, heads_of, rows_in_pairs
from labkit.models.walk import unwrap

BLOCK = 32  # numbers with one scale
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
FINE = ("token_embd.weight", "output.weight")
QUANTIZATION_VERSION = 2  # of the block types


def save_gguf(
    model: nn.Module, tokenizer, path: str | Path, numbers: str = "F16", name: str | None = None
) -> Path:
    """Write the model with its adapter merged, and its tokenizer, as a GGUF file. The model is not changed.

    Args:
        model: a Llama of transformers, with an adapter mounted or without any, in 32, 16 or 4 bits.
        tokenizer: its own, with the chat template if it has one.
        path: of the file; a GGUF file there is replaced.
        numbers: "F32", "F16", "BF16", "Q8_0", "Q4_0" or "Q4_1".
        name: what the file calls the model; default: the name of the file.

    Returns:
        `path`.

    Raises:
        ValueError: another architecture, or a part of this one that GGUF or llama.cpp has no place for; another number
            of tokens than rows of the embedding; NaN; or an adapter that cannot be merged. Nothing is written.
        FileExistsError: something else is at `path`.
        ModuleNotFoundError: the gguf package is not there.
        labkit.files.CannotWrite: no space, no permission; what was there is intact.
    """
    path = Path(path)
    check_choice("numbers", numbers, NUMBERS)
    needed("gguf", "writing a GGUF file")
    check_llama(model)
    config = unwrap(model).config
    values: dict[str, object] = {
        "general.type": "model",
        "general.name": name or path.stem,
        "general.file_type": FILE_TYPES[numbers],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    positions, frequencies = rope(config)
    values |= sizes(config) | positions | vocabulary(tokenizer, config.vocab_size, ends_of(model))
    tensors = [tensor_of(weight, numbers, config) for weight in merged_weights(model)]
    if frequencies is not None:
        tensors.insert(0, GGUFTensor(FREQUENCIES, tuple(frequencies.shape), "F32", lambda: frequencies))
    return write_gguf(path, "llama", values, tensors)


def check_llama(model: nn.Module) -> None:
    """Raise a `ValueError` unless `model` is a Llama whose every part llama.cpp computes the same way."""
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    kind = getattr(config, "model_type", type(inner).__name__)
    if type(inner).__name__ != "LlamaForCausalLM":
        raise ValueError(
            f"a GGUF file can be written here for LlamaForCausalLM, and this is a {type(inner).__name__} ({kind!r}): each "
            "architecture has its own names and its own order of rows in llama.cpp. Save the model with "
            "labkit.formats.save_merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"hidden_act={config.hidden_act!r}: llama.cpp computes 'silu' in every Llama, and nothing else"
        )


def sizes(config) -> dict[str, object]:
    """The metadata of the sizes of a Llama."""
    head_dim = config.head_dim
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.vocab_size": config.vocab_size,
        "llama.rope.dimension_count": head_dim,
    }


def rope(config) -> tuple[dict[str, object], Tensor | None]:
    """How positions become rotations: metadata, and a divisor for each frequency where the model has them.

    Raises:
        ValueError: a scaling that is not written here.
    """
    given = config.rope_parameters
    kind = given.get("rope_type", "default")
    theta = float(given["rope_theta"])
    values: dict[str, object] = {"llama.rope.freq_base": theta}
    if kind == "default":
        return values, None
    if kind == "linear":
        values |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(given["factor"])}
        return values, None
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        plain = theta ** -(torch.arange(0, config.head_dim, 2).double() / config.head_dim)
        return values, (plain / scaled.double()).float()
    raise ValueError(
        f"rope_type={kind!r}: written here are 'default', 'linear' and 'llama3'. Save the model with "
        "labkit.formats.save_merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
    )


def ends_of(model: nn.Module) -> list[int]:
    """The ids at which generation ends."""
    ids = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def tensor_of(weight: MergedWeight, numbers: str, config) -> GGUFTensor:
    """A weight as the file has it: under its name there, q and k with their rows in pairs.

    Raises:
        ValueError: llama.cpp's Llama has no place for it.
    """
    name = gguf_name(weight.name)
    if name is None:
        raise ValueError(f"llama.cpp's Llama has no place for {weight.name}")
    heads = heads_of(name, config)

    def compute() -> Tensor:
        tensor = weight.compute().to(torch.float32)
        return tensor if heads is None else rows_in_pairs(tensor, heads)

    return GGUFTensor(name, weight.shape, stored_as(name, weight.shape, numbers), compute)


def stored_as(name: str, shape: tuple[int, ...], numbers: str) -> str:
    """The type of one tensor in a file of type `numbers`."""
    if len(shape) < 2:
        return "F32"
    if not numbers.startswith("Q"):
        return numbers
    if shape[-1] % BLOCK:
        return "F16"  # rows that cannot be divided into blocks
    return "Q8_0" if name in FINE else numbers
