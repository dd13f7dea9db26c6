"""What another program makes of a saved adapter, by its own rules: a correction of the weight of each module.

                         scale of a layer                         read in
    PEFT                 alpha / r or alpha / sqrt(r) of the layer
    vLLM                 lora_alpha / r or lora_alpha / sqrt(r)   vllm/lora/peft_helper.py
                         of the folder, for every layer
    llama.cpp            the file's alpha / r of the layer        src/llama-adapter.h, get_scale
    its converter        lora_alpha / r of the layer              convert_lora_to_gguf.py, which reads nothing else

None of them but PEFT repeats the start of PiSSA, which changes the base.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.checks import needed
from labkit.formats.peft_folder import PREFIX, read_folder
from labkit.models.gguf_layout import heads_of, huggingface_name, rows_in_halves
from labkit.quant.layer_kinds import dense_weight

FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@torch.no_grad()
def corrected(base: nn.Module, corrections: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `base` with a correction, (out, in), added to the weight of each of these modules."""
    made = deepcopy(base)
    for name, delta in corrections.items():
        dense_weight(made.get_submodule(name)).add_(delta)
    return made


def folder_corrections(folder: Path, scale: Callable[[Mapping, int], float]) -> dict[str, Tensor]:
    """What a PEFT folder adds to the weight of each module, (out, in).

    Args:
        folder: of the adapter.
        scale: of a layer, from the folder's configuration and the layer's rank.
    """
    raw, tensors = read_folder(folder)
    corrections = {}
    for key, A in tensors.items():
        for one, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if key.endswith(one):
                module = key.removeprefix(PREFIX).removesuffix(one)
                corrections[module] = scale(raw, len(A)) * tensors[key.removesuffix(one) + other] @ A
    return corrections


def one_scale(raw: Mapping, rank: int) -> float:
    """vLLM's scale: that of the folder, whatever the layer's rank."""
    return raw["lora_alpha"] / (math.sqrt(raw["r"]) if raw.get("use_rslora") else raw["r"])


def alpha_by_rank(raw: Mapping, rank: int) -> float:
    """The scale of a file of llama.cpp's converter: it writes lora_alpha, and llama.cpp divides by the layer's rank."""
    return raw["lora_alpha"] / rank


def check_convertible(folder: Path) -> None:
    """Raise a `ValueError` if llama.cpp's converter ends with an error at a tensor of the folder."""
    others = [key for key in read_folder(folder)[1] if not key.endswith(FACTORS)]
    if others:
        raise ValueError(
            f"convert_lora_to_gguf.py ends at {others[0]}, which is no factor of LoRA. Merge the adapter, with "
            "labkit.formats.save_gguf(model, tokenizer, path)"
        )


def gguf_corrections(file: Path, config) -> dict[str, Tensor]:
    """What a GGUF adapter adds to the weight of each module, (out, in), by llama.cpp's rule."""
    reader = needed("gguf", "reading a GGUF file").GGUFReader(file)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    corrections = {}
    for name in (name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")):
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]  # (r, in), (out, r)
        heads = heads_of(name, config)
        B = B if heads is None else rows_in_halves(B, heads)
        module = str(huggingface_name(name)).removesuffix(".weight")
        corrections[module] = alpha / B.shape[1] * B @ (A.T if module == "model.embed_tokens" else A)
    return corrections
