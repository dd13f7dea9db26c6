"""What llama.cpp computes from quantized weights: it rounds the *activations* too, to 8 bits, and multiplies integers.

A type such as Q4_1 says how weights are stored, w = d q + m with 32 codes q to a block. llama.cpp does not turn them
back into floating point. It rounds each block of 32 activations to x = e c, whole numbers c from -127 to 127, and takes

    sum of w x  =  d e (sum of q c)  +  m (e sum of c)

for a block. e is kept in fp16, and in Q4_1 so is the last bracket; Q4_0 and Q8_0 have no m. So the same weights give
other logits than in fp32, and on a short text these are the very logits. On a long one the two part: where two
activations differ in their last bit, one of a thousand is rounded to another code.

Agrees with: llama.cpp, `ggml/src/ggml-quants.c`, `quantize_row_q8_0_ref`, `quantize_row_q8_1_ref`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.checks import needed
from labkit.models.gguf_layout import huggingface_name

BLOCK = 32  # numbers with one scale
WHOLE = ("F32", "F16", "BF16")  # what is multiplied in floating point
ROUNDED = ("Q8_0", "Q4_0", "Q4_1")


def types_of(file: Path) -> dict[str, str]:
    """How a GGUF file of a Llama stores the weight of each linear layer and embedding: {"lm_head": "Q8_0", …}."""
    tensors = needed("gguf", "reading a GGUF file").GGUFReader(file).tensors
    names = {str(huggingface_name(one.name)): one.tensor_type.name for one in tensors if len(one.shape) > 1}
    types = {name.removesuffix(".weight"): kind for name, kind in names.items()}
    return {"lm_head": types["model.embed_tokens"]} | types  # a tied output layer is not in the file


def multiply(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """x W^T as llama.cpp computes it.

    Args:
        x: (..., in), activations.
        weight: (out, in), dequantized.
        kind: how the file stores it: one of `ROUNDED`.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))  # (..., in / 32, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127  # e
    codes = torch.where(scale > 0, blocks / scale, 0).round()  # c
    rounded = (codes * scale.half().float()).flatten(-2).to(x.dtype)
    if kind != "Q4_1":
        return rounded @ weight.T
    by_block = weight.unflatten(-1, (-1, BLOCK))
    lowest = by_block.amin(-1)  # m, (out, in / 32): in every block one code is 0
    sums = (scale.squeeze(-1) * codes.sum(-1)).half().to(x.dtype)  # (..., in / 32)
    return rounded @ (by_block - lowest[..., None]).flatten(-2).T + sums @ lowest.T


@contextmanager
def rounded_activations(model: nn.Module, types: Mapping[str, str]) -> Iterator[nn.Module]:
    """Within the block `model` computes as llama.cpp does with quantized weights.

    Args:
        model: with the dequantized weights of a file, and no adapter.
        types: of the file, `types_of`.

    Raises:
        ValueError: a type whose products are not known here.
    """
    hooks = []
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    others = {types[name] for name in linears} - {*WHOLE, *ROUNDED}
    if others:
        raise ValueError(f"weights of type {sorted(others)[0]}: known are {', '.join((*WHOLE, *ROUNDED))}")
    for name, module in linears.items():
        if types[name] in ROUNDED:
            hooks.append(module.register_forward_hook(as_in_llama_cpp(types[name])))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def as_in_llama_cpp(kind: str):
    """A hook that puts `multiply` in place of what a linear layer computed."""

    def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        made = multiply(inputs[0], module.weight, kind)
        return made if module.bias is None else made + module.bias

    return hook
