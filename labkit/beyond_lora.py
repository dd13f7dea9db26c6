"""The methods beside LoRA, and what each costs once it is trained.

Four families leave the base frozen, and train something else than a low-rank matrix:

    method                where                                   merges?   module
    prompt tuning         vectors before the text                 no        labkit.prompts
    prefix tuning         keys and values before the text         no        labkit.prompts
    bottleneck adapters   an MLP after or beside each sub-layer   no        labkit.bottleneck
    (IA)^3                a factor for each activation            yes       labkit.ia3

All train under `labkit.train`, over a base in 32, 16 or 4 bits, and generate through transformers' `generate`. This module re-exports
them, takes them off again (`bare`, `remove`), and counts (`cost`, `prefill_flops`).

The counts are exact and of the same kind as `torch.utils.flop_counter`: a product of matrices, (m, k) by (k, n), is 2 m k n operations;
attention multiplies every query with every key, also those that a mask hides (a kernel that skips them does half). Operations
on single numbers are counted beside, since they take memory traffic and not arithmetic: one for each multiplication,
addition, activation or entry of a softmax.

Sources: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning"; LoRA (Hu et al. 2021), table 1, for why the cost
at inference decides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from labkit.anatomy import decoder, sizes
from labkit.bottleneck import Bottleneck, BottleneckConfig, add_bottleneck, bottlenecks
from labkit.ia3 import IA3Config, IA3Linear, add_ia3, ia3_layers, merge_ia3, unmerge_ia3
from labkit.models.surgery import replace_module
from labkit.prompts import Prefix, PrefixConfig, PromptConfig, SoftPrompt, add_prefix, add_prompt, fold_prefix
from labkit.quant.linears import is_linear, widths

SIZED = {  # how to add the methods whose size is to be chosen, and their configs, which take it first
    "prompt": (add_prompt, PromptConfig),
    "prefix": (add_prefix, PrefixConfig),
    "bottleneck": (add_bottleneck, BottleneckConfig),
}

__all__ = [
    "SIZED",
    "BottleneckConfig",
    "Cost",
    "IA3Config",
    "PrefixConfig",
    "PromptConfig",
    "add_bottleneck",
    "add_ia3",
    "add_prefix",
    "add_prompt",
    "bare",
    "cost",
    "fold_prefix",
    "merge_ia3",
    "prefill_flops",
    "remove",
    "unmerge_ia3",
]


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


def parts(model: nn.Module) -> tuple[SoftPrompt | Prefix | None, dict[str, IA3Linear], dict[str, Bottleneck]]:
    """What a method has put into `model`.

    Raises:
        ValueError: nothing.
    """
    found = getattr(model, "virtual_tokens", None), ia3_layers(model), bottlenecks(model)
    if found[0] is None and not found[1] and not found[2]:
        raise ValueError(
            f"{type(model).__name__} has none of the methods beside LoRA; call add_prompt, add_prefix, add_bottleneck or add_ia3"
        )
    return found


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block `model` is its base alone, with the very weights it had, also if (IA)^3 is merged.

    Raises:
        ValueError: there is no method to leave out.
    """
    tokens, vectors, adapters = parts(model)
    bases = {name: layer.unmerged[0] if layer.unmerged else layer.base for name, layer in vectors.items()}
    bases |= {name: layer.base for name, layer in adapters.items()}
    for name, base in bases.items():
        replace_module(model, name, base)
    if tokens is not None:
        tokens.enabled = False
        del model.virtual_tokens
    try:
        yield model
    finally:
        for name, layer in {**vectors, **adapters}.items():
            replace_module(model, name, layer)
        if tokens is not None:
            tokens.enabled = True
            model.virtual_tokens = tokens


def remove(model: nn.Module) -> nn.Module:
    """Take the method off for good, in place: the base as it was, still frozen. Returns `model`.

    Raises:
        ValueError: there is none.
    """
    tokens, vectors, adapters = parts(model)
    for name, layer in vectors.items():
        replace_module(model, name, layer.unmerged[0] if layer.unmerged else layer.base)
    for name, layer in adapters.items():
        replace_module(model, name, layer.base)
    if tokens is not None:
        tokens.detach(model)
    del model.method_config
    return model
