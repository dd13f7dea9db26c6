"""What a method costs once it is trained: parameters, operations per token, cache, context.

The counts are exact, and of the same kind as those of `torch.utils.flop_counter`: a product of matrices of
(m, k) by (k, n) is 2 m k n operations, and attention multiplies every query by every key, including those
that a mask hides (a kernel that skips them does half). Operations on single numbers are counted separately,
because they cost memory traffic rather than arithmetic: one for each multiplication, addition, activation or
entry of a softmax.

Source: LoRA (Hu et al. 2021), table 1, for why the cost at inference decides.
"""

from dataclasses import dataclass

from torch import nn

from labkit.alternatives.ia3 import IA3Config
from labkit.alternatives.methods import AddedMethod, require_method
from labkit.alternatives.prefixes import Prefix
from labkit.alternatives.sublayers import decoder, stream_dtype
from labkit.alternatives.virtual_tokens import VirtualTokens
from labkit.models.shapes import decoder_shape
from labkit.models.walk import unwrap
from labkit.quant.layer_kinds import is_linear, widths


@dataclass(frozen=True)
class Cost:
    """What a method costs beyond the base model.

    Attributes:
        method: its name.
        trained: parameters that training moves.
        kept: parameters that inference needs; fewer than `trained` if a prefix was trained through an MLP.
        flops_per_token: operations in matrix products per written token.
        elementwise_per_token: operations on single numbers per written token.
        cache_bytes_per_layer: bytes of keys and values per sequence, in the dtype of the model.
        lost_positions: positions of the context that no text can take.
        merges: can it become part of the weights, and then cost nothing?
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
            f"{self.method}: {self.trained:,} parameters train, {self.kept:,} are kept; "
            f"per token {self.flops_per_token:,} FLOPs in products and {self.elementwise_per_token:,} elementwise; "
            f"{self.cache_bytes_per_layer:,} bytes of cache per layer and sequence, "
            f"{self.lost_positions} positions lost; {'merges' if self.merges else 'does not merge'}"
        )


def cost(model: nn.Module) -> Cost:
    """The cost of the method in `model`, as it is now: merged (IA)^3 costs nothing.

    Raises:
        ValueError: there is none.
    """
    added = require_method(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if added.tokens is not None:
        return cost_of_tokens(model, added.tokens, trained)
    if isinstance(added.config, IA3Config):
        return cost_of_factors(added, trained)
    return cost_of_bottlenecks(added, trained)


def cost_of_tokens(model: nn.Module, tokens: VirtualTokens, trained: int) -> Cost:
    """Each written token attends to `tokens.length` more keys, in every layer."""
    s, n = decoder_shape(unwrap(model)), tokens.length
    if isinstance(tokens, Prefix):
        name, s = "prefix tuning", tokens.shape
        kept = n * 2 * s.num_hidden_layers * s.kv_width
    else:
        name, kept = "prompt tuning", tokens.embedding.numel()
    return Cost(
        name,
        trained,
        kept,
        # scores of n more keys, and the sum of n more values: one product each, per head
        flops_per_token=2 * s.num_hidden_layers * 2 * n * s.num_attention_heads * s.head_dim,
        elementwise_per_token=s.num_hidden_layers * n * s.num_attention_heads,  # entries of the softmax
        cache_bytes_per_layer=2 * n * s.kv_width * stream_dtype(model).itemsize,
        lost_positions=n,
    )


def cost_of_factors(added: AddedMethod, trained: int) -> Cost:
    """One multiplication per factor, until they are merged."""
    if all(layer.is_merged for layer in added.layers.values()):
        return Cost("(IA)^3", trained, kept=0, merges=True)
    factors = sum(layer.vector.numel() for layer in added.layers.values())
    return Cost("(IA)^3", trained, kept=trained, elementwise_per_token=factors, merges=True)


def cost_of_bottlenecks(added: AddedMethod, trained: int) -> Cost:
    """Two small products per adapter."""
    products = single = 0
    for layer in added.layers.values():
        size, width = layer.down.weight.shape
        products += 2 * size * width
        single += 2 * size + 3 * width  # bias, activation; bias, scale, sum
    name = f"{added.config.form} bottleneck adapter"
    return Cost(name, trained, trained, flops_per_token=2 * products, elementwise_per_token=single)


def prefill_flops(model: nn.Module, tokens: int) -> int:
    """Extra operations in matrix products to read a text of `tokens` tokens before writing; for one sequence.

    A soft prompt pays here for its own way through the network, once per sequence. (Its keys and values are
    the same for every text, so a server may keep them, and then pays what a prefix does.)
    """
    added = require_method(model)
    if added.tokens is None or isinstance(added.tokens, Prefix):
        return tokens * cost(model).flops_per_token
    s, n = decoder_shape(unwrap(model)), added.tokens.length
    linears = [widths(layer) for layer in decoder(model).modules() if is_linear(layer)]
    pairs = (tokens + n) ** 2 - tokens**2  # of queries and keys
    per_pair = 2 * 2 * s.num_attention_heads * s.head_dim  # a score, and a part of the sum of values
    return 2 * n * sum(a * b for a, b in linears) + s.num_hidden_layers * per_pair * pairs
