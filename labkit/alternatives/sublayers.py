"""Where a method may take hold of a frozen language model: its decoder, its layers and sub-layers by name.

A decoder is a stack of blocks: h <- h + attention(norm(h)), then h <- h + mlp(norm(h)). The methods beside
LoRA differ in *where* they enter: before the text (`decoder`), at a sub-layer (`sublayers_of`), or at one
linear layer (`layers_named`).
"""

import torch
from torch import nn

from labkit.models.shapes import decoder_shape
from labkit.models.surgery import ends_with, is_output_layer, no_match_message
from labkit.quant.layer_kinds import is_linear

SUBLAYERS = {"attention": ("self_attn", "attn", "attention"), "mlp": ("mlp", "feed_forward")}


def decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks without the output layer: from token ids to hidden states."""
    return getattr(model, "base_model", model)


def train_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what is added: at least fp32, because bf16 would round small updates away."""
    return torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)


def layers_named(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers (32-bit, 4-bit, Conv1D) whose names end with one of `names`; never the output layer.

    Raises:
        ValueError: a name matches nothing; the message names the nearest one.
    """
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and not is_output_layer(model, m)}
    for wanted in names:
        if not any(ends_with(name, wanted) for name in linears):
            raise ValueError(no_match_message(repr(wanted), wanted, model, linears))
    return {name: m for name, m in linears.items() if any(ends_with(name, w) for w in names)}


def sublayers_of(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """The "attention" or the "mlp" of each block, by full name.

    Raises:
        ValueError: the blocks have no module of that kind. (In BERT, for one, the norm and the sum are inside
            it.)
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in SUBLAYERS[kind] and name.rpartition(".")[0].rpartition(".")[2].isdigit()
    }
    blocks = decoder_shape(model).num_hidden_layers
    if len(found) != blocks:
        block = next((m for n, m in model.named_modules() if n.rpartition(".")[2] == "0"), model)
        raise ValueError(
            f"{len(found)} of {blocks} blocks of {type(model).__name__} have a sub-layer called one of "
            f"{SUBLAYERS[kind]}; a block of it has: {', '.join(n for n, _ in block.named_children())}. Only decoders "
            "whose blocks keep the norm and the sum outside the sub-layer can take a bottleneck adapter here"
        )
    return found
