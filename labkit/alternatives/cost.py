"""DOC"""

from dataclasses import dataclass

import torch
from torch import nn

from labkit.alternatives.methods import parts
from labkit.alternatives.prefixes import Prefix
from labkit.alternatives.sublayers import decoder, sizes
from labkit.quant.linears import is_linear, widths


@dataclass(frozen=True)
class Cost:
    """What a method costs beyond the base model.

    Attributes:
        method: its name.
        trained: parameters that training moves.
        kept: parameters that inference needs: fewer where a prefix was trained through an MLP.
        flops_per_token: operations in matrix products for each token that is written.
        elementwise_per_token: operations on single numbers, the same way.
        cache_bytes_per_layer: of keys and values, for each sequence, in the dtype of the model.
        lost_positions: of the context, that no text can take.
        merges: can it become part of the weights, and cost nothing?
    """

    method: str
    trained: int
    kept: int
    flops_per_token: int = 0
    elementwise_per_token: int = 0
    cache_bytes_per_layer: int = 0
    lost_positions: int = 0
    merges: bool = False

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.trained:,} parameters train, {self.kept:,} are kept; per token {self.flops_per_token:,} FLOPs "
            f"in products and {self.elementwise_per_token:,} elementwise; {self.cache_bytes_per_layer:,} bytes of cache per layer "
            f"and sequence, {self.lost_positions} positions lost; {'merges' if self.merges else 'does not merge'}"
        )


def cost(model: nn.Module) -> Cost:
    """The cost of the method that is in `model`, as it is now: (IA)^3 that is merged costs nothing.

    Raises:
        ValueError: there is none.
    """
    tokens, vectors, adapters = parts(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if tokens is not None:
        s, n = sizes(model), tokens.length
        kept, name = tokens.embedding, "prompt tuning"
        if isinstance(tokens, Prefix):
            name = "prefix tuning"
            kept = torch.empty(n, 2 * s.layers * s.kv_width, device="meta")
        return Cost(
            name,
            trained,
            kept.numel(),
            # scores of n more keys, and the sum of n more values: a product each, for each head
            flops_per_token=2 * s.layers * 2 * n * s.heads * s.head_dim,
            elementwise_per_token=s.layers * n * s.heads,  # entries of the softmax
            cache_bytes_per_layer=2 * n * s.kv_width * model.get_input_embeddings().weight.element_size(),
            lost_positions=n,
        )
    if vectors:
        live = sum(layer.vector.numel() for layer in vectors.values() if layer.unmerged is None)
        kept = 0 if not live else trained
        return Cost("(IA)^3", trained, kept, elementwise_per_token=live, merges=True)
    products = sum(layer.down.weight.numel() + layer.up.weight.numel() for layer in adapters.values())
    single = 0
    for layer in adapters.values():
        size, width = layer.down.weight.shape
        single += 2 * size + 3 * width  # bias, activation; bias, scale, sum
    name = f"{next(iter(adapters.values())).config.form} bottleneck adapter"
    return Cost(name, trained, trained, flops_per_token=2 * products, elementwise_per_token=single)


def prefill_flops(model: nn.Module, tokens: int) -> int:
    """Extra operations in matrix products to read a text of `tokens` tokens, before the first is written, for one sequence.

    A soft prompt pays for its own way through the network here, once for each sequence. (Its keys and values are the same for every
    text: a server may keep them, and then pays what a prefix does.)
    """
    virtual = parts(model)[0]
    if virtual is None:
        return tokens * cost(model).flops_per_token
    if isinstance(virtual, Prefix):
        return tokens * cost(model).flops_per_token
    s, n = sizes(model), virtual.length
    linears = [widths(layer) for layer in decoder(model).modules() if is_linear(layer)]
    pairs = (tokens + n) ** 2 - tokens**2  # of queries and keys
    return 2 * n * sum(a * b for a, b in linears) + 4 * s.layers * s.heads * s.head_dim * pairs
