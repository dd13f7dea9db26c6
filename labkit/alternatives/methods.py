"""The methods beside LoRA, and what each costs once it is trained.

Four families leave the base frozen, and train something else than a low-rank matrix:

    method                where                                   merges?   module
    prompt tuning         vectors before the text                 no        labkit.alternatives.prompts
    prefix tuning         keys and values before the text         no        labkit.alternatives.prompts
    bottleneck adapters   an MLP after or beside each sub-layer   no        labkit.alternatives.bottleneck
    (IA)^3                a factor for each activation            yes       labkit.alternatives.ia3

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

from torch import nn

from labkit.alternatives.bottleneck import Bottleneck, BottleneckConfig, add_bottleneck, bottlenecks
from labkit.alternatives.ia3 import IA3Linear, ia3_layers
from labkit.alternatives.prefixes import Prefix, PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, SoftPrompt, add_prompt
from labkit.models.surgery import replace_module

SIZED = {  # how to add the methods whose size is to be chosen, and their configs, which take it first
    "prompt": (add_prompt, PromptConfig),
    "prefix": (add_prefix, PrefixConfig),
    "bottleneck": (add_bottleneck, BottleneckConfig),
}


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
