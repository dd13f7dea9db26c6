"""Where a method may take hold of a frozen language model: its sizes, its decoder, its layers and sub-layers by name.

A decoder is a stack of blocks, h <- h + attention(norm(h)), then h <- h + mlp(norm(h)). The methods beside LoRA differ in *where*
they enter: before the text (`decoder`), in a sub-layer (`sublayers`), in one linear layer (`layers_named`).
"""

from dataclasses import dataclass

import torch
from torch import nn

from labkit.models.surgery import ends_with, is_output_layer
from labkit.quant.linears import is_linear, no_match_message

SUBLAYERS = {"attention": ("self_attn", "attn", "attention"), "mlp": ("mlp", "feed_forward")}


@dataclass(frozen=True)
class Sizes:
    """Of a decoder: `layers` blocks of `width`; `heads` of `head_dim` that share `kv_heads` keys and values; `context` positions."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int

    @property
    def kv_width(self) -> int:
        """Numbers in the keys of one token in one layer; as many in its values. Fewer than `width` where heads share them."""
        return self.kv_heads * self.head_dim


def sizes(model: nn.Module) -> Sizes:
    """The sizes of a causal language model of transformers, from its configuration.

    Raises:
        ValueError: `model` has no such configuration.
    """
    config = getattr(model, "config", None)
    try:
        config = config.get_text_config()
        heads, width = config.num_attention_heads, config.hidden_size
        return Sizes(
            layers=config.num_hidden_layers,
            width=width,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,  # GPT-2: one for each head
            head_dim=getattr(config, "head_dim", None) or width // heads,
            context=config.max_position_embeddings,
        )
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} does not say how wide and deep it is ({error}); give a causal language model of transformers"
        ) from None


def decoder(model: nn.Module) -> nn.Module:
    """The stack of blocks without the output layer: from token ids to hidden states."""
    return getattr(model, "base_model", model)


def check_bare(model: nn.Module, method: str) -> None:
    """Does nothing sit in the model yet?

    Raises:
        ValueError: the model carries LoRA adapters or one of the methods here already.
    """
    foreign = [name for name, _ in model.named_parameters() if ".lora_" in name]
    present = getattr(model, "method_config", None)
    if present is not None or foreign:
        carries = type(present).__name__ if present is not None else "LoRA adapters"
        raise ValueError(
            f"{type(model).__name__} has {carries} already, so {method} cannot be added; load a fresh base model, "
            "or take the other off with labkit.alternatives.methods.remove"
        )


def train_dtype(model: nn.Module) -> torch.dtype:
    """Of what is added: at least fp32, since updates are smaller than bf16 can add to a parameter."""
    return torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)


def layers_named(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers, 32-bit, 4-bit or Conv1D, whose full names end with one of `names`; never the output layer.

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
        ValueError: the blocks have no module of that kind (in BERT's, for one, the norm and the sum are inside it).
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in SUBLAYERS[kind] and name.rpartition(".")[0].rpartition(".")[2].isdigit()
    }
    if len(found) != sizes(model).layers:
        block = next((m for n, m in model.named_modules() if n.rpartition(".")[2] == "0"), model)
        raise ValueError(
            f"{len(found)} of {sizes(model).layers} blocks of {type(model).__name__} have a sub-layer called one of {SUBLAYERS[kind]}; "
            f"a block of it has: {', '.join(n for n, _ in block.named_children())}. Only decoders whose blocks keep the norm and the "
            "sum outside the sub-layer can take a bottleneck adapter here"
        )
    return found
