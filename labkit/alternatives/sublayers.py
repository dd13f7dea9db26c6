"""Where a method may take hold of a frozen language model: its decoder, its layers and sub-layers by name.

A decoder is a stack of blocks: h <- h + attention(norm(h)), then h <- h + mlp(norm(h)). The methods beside
LoRA differ in *where* they enter: before the text (`decoder`), at a sub-layer (`sublayers_of`), or at one
linear layer (`layers_named`).

Nothing here goes by the name or the attribute that one family of models has. The decoder is found by what it
takes, an embedding of the text by calling the layer that makes it: where Gemma scales it, or a table is
quantized, the weights alone are not what the blocks see.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.models.shapes import decoder_shape
from labkit.models.surgery import ends_with, no_match_message
from labkit.models.walk import own_name, unwrap, walk
from labkit.quant.layer_kinds import is_linear

SUBLAYERS = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward"),
}
# what is given to a stack of blocks, and not to the parts of one
TAKES = {"inputs_embeds", "attention_mask", "past_key_values"}


def decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks without the output layer: from token ids, or embeddings, to hidden states.

    It is the innermost module around the input embedding that takes embeddings in place of ids. Modules
    further out may be passed by: `OPTForCausalLM` calls `model.decoder`, and never `model`.

    Raises:
        ValueError: there is none, or the model has an encoder besides.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(inner).__name__} has an encoder and a decoder, and this method is for a decoder alone; use LoRA"
        )
    table = input_embeddings(inner)
    place = next(name for name, module in inner.named_modules() if module is table)
    while place:
        place = place.rpartition(".")[0]
        found = inner.get_submodule(place)
        if inspect.signature(found.forward).parameters.keys() >= TAKES:
            return found
    raise ValueError(
        f"{type(inner).__name__} does not take {', '.join(sorted(TAKES))} together, so nothing can stand before its "
        "text; use LoRA, (IA)^3 or a bottleneck adapter"
    )


def input_embeddings(model: nn.Module) -> nn.Module:
    """The layer that makes embeddings of token ids.

    Raises:
        ValueError: `model` is no language model of transformers.
    """
    inner = unwrap(model)
    if not hasattr(inner, "get_input_embeddings"):
        raise ValueError(
            f"{type(inner).__name__} does not say which layer embeds its tokens, nor how wide it is; give a causal "
            "language model of transformers"
        )
    return inner.get_input_embeddings()


@torch.no_grad()
def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """What the blocks of `model` are given for the token ids (n,): (n, width)."""
    with evaluating(layer := input_embeddings(model)):
        return layer(ids[None].to(device_of(layer)))[0]


def embedding_width(model: nn.Module) -> int:
    """Numbers per token that the embedding layer puts out, which may be fewer than the blocks are wide."""
    return embed(model, torch.zeros(1, dtype=torch.long)).shape[1]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block `module` is in evaluation mode; then each of its modules is in the mode it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def device_of(module: nn.Module) -> torch.device:
    """Where the weights of `module` are, in numbers or in codes."""
    return next(tensor.device for tensor in (*module.parameters(), *module.buffers()))


def train_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what is added: at least fp32, because bf16 would round small updates away."""
    return torch.promote_types(stream_dtype(model), torch.float32)


def stream_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of embeddings and hidden states: that of the first weight that is stored as numbers, not codes."""
    return next((p.dtype for p in unwrap(model).parameters() if p.is_floating_point()), torch.float32)


def layers_named(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers (32-bit, 4-bit, Conv1D) whose names end with one of `names`; never the output layer.

    Returns:
        {path: layer}, with every path of a layer that stands in several places.

    Raises:
        ValueError: a name matches nothing; the message names the nearest one.
    """
    linears = [layer for layer in walk(model) if is_linear(layer.module) and not layer.is_output]
    known = [name for layer in linears for name in layer.names]
    for wanted in names:
        if not any(ends_with(name, wanted) for name in known):
            raise ValueError(no_match_message(repr(wanted), wanted, model, known))
    return {
        path: layer.module
        for layer in linears
        if any(ends_with(name, wanted) for name in layer.names for wanted in names)
        for path in layer.paths
    }


def sublayers_of(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """The "attention" or the "mlp" of each block, by path.

    Raises:
        ValueError: the blocks have no module of that kind, or one that adds its input itself. (In BERT the norm
            and the sum are inside it, in Bloom the sum.)
    """
    found = {
        path: module
        for path, module in model.named_modules()
        for block, _, last in [own_name(model, path).rpartition(".")]
        if last in SUBLAYERS[kind] and block.rpartition(".")[2].isdigit()
        if "residual" not in inspect.signature(module.forward).parameters
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
