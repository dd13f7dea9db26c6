"""Prefix tuning: leave every weight alone, and train n keys and values per layer, before those of the text.

    K_l = [P_l^K; K(text)],  V_l = [P_l^V; V(text)]           P: (n, layers, 2, kv_width)

Each layer makes keys and values out of a soft prompt; a prefix *is* those keys and values. So it has
`2 layers kv_width / width` times the parameters, and reaches combinations that no input could produce. It
costs the same when text is written, and cannot be merged into weights.

*Reparametrization.* Li and Liang found the prefix unstable to train directly, and trained
P = W2 tanh(W1 e + b1) + b2, with one MLP for all n. After training only P matters: `fold_prefix` computes it
and drops the MLP.

Source: Li & Liang 2021, section 4. Agrees with: PEFT `tuners/prefix_tuning`.
"""

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from labkit.alternatives.methods import AddedMethod, check_unadapted, install, method_of
from labkit.alternatives.sublayers import (
    decoder,
    device_of,
    evaluating,
    input_embeddings,
    stream_dtype,
    train_dtype,
)
from labkit.alternatives.virtual_tokens import VirtualTokens, check_tokens, text_ids
from labkit.checks import check_whole
from labkit.models.shapes import DecoderShape, decoder_shape
from labkit.models.walk import unwrap


@dataclass(frozen=True)
class PrefixConfig:
    """Prefix tuning.

    Args:
        length: keys and values before the text, in each layer.
        projection: width of the MLP that makes the prefix in training; None to train the prefix itself.
        init: "random", from N(0, 1), as PEFT does; "text", the keys and values that the model itself makes of
            `text`: training then starts exactly at that prompt.
        text: for init="text".

    Raises:
        ValueError: a value is out of its range, or init="text" comes with a projection, which cannot be set
            to a given prefix.
    """

    length: int = 20
    projection: int | None = None
    init: str = "random"
    text: str | None = None

    def __post_init__(self):
        check_tokens(self.length, self.init, ("random", "text"), self.text)
        if self.projection is not None:
            check_whole("projection", self.projection)
            if self.init == "text":
                raise ValueError(
                    "init='text' sets the prefix itself, which no choice of the MLP's weights gives; "
                    "use projection=None with it"
                )


class Prefix(VirtualTokens):
    """Prefix tuning: keys and values before those of the text, in every layer.

    Args:
        prefix: (length, 2 * layers * kv_width), for each layer its keys and then its values; None if the MLP
            makes it.
        shape: of the model, its heads as the cache keeps them.
        embedding, mlp: with prefix=None; (length, kv_width), and the MLP from there to the width of a prefix.
        reach: virtual tokens and text up to which padding between them changes nothing (see `reach_of`).
    """

    def __init__(
        self,
        prefix: Tensor | None,
        shape: DecoderShape,
        embedding: Tensor | None = None,
        mlp: nn.Sequential | None = None,
        reach: float = math.inf,
    ):
        super().__init__(len(embedding if prefix is None else prefix), shape.max_position_embeddings)
        self.shape, self.reach = shape, reach
        self.prefix = None if prefix is None else nn.Parameter(prefix)
        self.embedding = None if embedding is None else nn.Parameter(embedding)
        self.mlp = mlp

    def values(self) -> Tensor:
        """The prefix, (length, 2 * layers * kv_width)."""
        return self.mlp(self.embedding) if self.prefix is None else self.prefix

    def lead_of(self, mask: Tensor) -> None:
        """A prefix is in the cache before any padding, which must therefore not count."""
        if self.length + mask.shape[1] > self.reach and not mask[:, 0].all():
            raise ValueError(
                "padding on the left stands between a prefix and the text here, and this model has layers that "
                f"count places in the cache{f', beyond {self.reach}' if self.reach else ''}: pad on the right, or "
                "give texts of one length"
            )

    def insert(self, decoder: nn.Module, inputs: dict, batch: int) -> None:
        from transformers import DynamicCache

        if decoder.training and any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules()):
            raise ValueError(
                "prefix tuning does not train with gradient checkpointing: transformers drops the key-value cache "
                "then, and the prefix is in it. Use checkpointing=False; a prefix leaves little to save"
            )
        if inputs.get("past_key_values") is None:
            inputs["past_key_values"] = DynamicCache(config=decoder.config)
            self.own_cache = inputs.get("use_cache") is False
        self.filled, s = inputs["past_key_values"], self.shape
        values = self.values().to(stream_dtype(decoder))
        layers = values.view(-1, s.num_hidden_layers, 2, s.num_key_value_heads, s.head_dim)
        layers = layers.permute(1, 2, 3, 0, 4)  # (layers, 2, kv_heads, length, head_dim)
        for i, (keys, values) in enumerate(layers):
            keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
            self.filled.update(keys, values, i)


def add_prefix(model: nn.Module, config: PrefixConfig, tokenizer=None) -> nn.Module:
    """Freeze `model` and put trained keys and values before those of its text; in place. Returns `model`.

    Raises:
        ValueError: as for `add_prompt`.
    """
    check_unadapted(model, "prefix tuning")
    shape = prefix_shape(model)
    reach = reach_of(model, shape, config.length)
    like = dict(device=device_of(input_embeddings(model)), dtype=train_dtype(model))
    width = prefix_width(shape)
    if config.projection:
        embedding = torch.randn(config.length, shape.kv_width, **like)
        mlp = nn.Sequential(
            nn.Linear(shape.kv_width, config.projection, **like),
            nn.Tanh(),
            nn.Linear(config.projection, width, **like),
        )
        prefix = Prefix(None, shape, embedding, mlp, reach)
    elif config.init == "text":
        ids = text_ids(config.text, config.length, tokenizer)
        prefix = Prefix(keys_and_values(model, ids).to(**like), shape, reach=reach)
    else:
        prefix = Prefix(torch.randn(config.length, width, **like), shape, reach=reach)
    return install(model, AddedMethod(config, tokens=prefix))


def fold_prefix(model: nn.Module) -> nn.Module:
    """Compute the prefix that the MLP makes, keep that and drop the MLP; in place. Returns `model`.

    The output stays what it was.

    Raises:
        ValueError: the model has no prefix that an MLP makes.
    """
    added = method_of(model)
    prefix = None if added is None else added.tokens
    if not isinstance(prefix, Prefix) or prefix.mlp is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has no prefix with a projection to fold")
    prefix.prefix = nn.Parameter(prefix.values().detach().clone())
    prefix.mlp = prefix.embedding = None
    return model


@torch.no_grad()
def cache_of(model: nn.Module, ids: Tensor) -> Any:
    """The cache that the model keeps of the tokens `ids`, (length,)."""
    stack = decoder(model)
    with evaluating(stack):
        return stack(input_ids=ids[None].to(device_of(stack)), use_cache=True).past_key_values


def prefix_shape(model: nn.Module) -> DecoderShape:
    """The shape of the model, with the heads that its layers keep keys and values of.

    The model is asked, by a pass over one token, because configs say it in many ways (Falcon: `multi_query`).

    Raises:
        ValueError: not every layer keeps keys and values, or not of one shape. Some layers of hybrid models keep a
            state instead, some share those of another; DeepSeek's values are narrower than its keys.
    """
    stack = decoder(model)
    shape = decoder_shape(unwrap(model))
    if device_of(stack).type == "meta":
        return shape  # nothing can be computed
    cache = cache_of(model, torch.zeros(1, dtype=torch.long))
    layers = [] if cache is None else cache.layers
    kept = [
        (tuple(layer.keys.shape), tuple(layer.values.shape))
        for layer in layers
        if isinstance(getattr(layer, "keys", None), Tensor)
    ]
    if len(kept) != shape.num_hidden_layers or len({s for pair in kept for s in pair}) != 1:
        raise ValueError(
            f"a prefix is keys and values of one shape in each of the {shape.num_hidden_layers} layers of "
            f"{type(unwrap(model)).__name__}, and {len(kept)} of them keep any, of (1, heads, token, size): "
            f"{sorted({s for pair in kept for s in pair})}; use prompt tuning or LoRA"
        )
    return replace(shape, num_key_value_heads=kept[0][0][1], head_dim=kept[0][0][3])


def prefix_width(shape: DecoderShape) -> int:
    """Numbers of one token of a prefix: a key and a value in each layer."""
    return 2 * shape.num_hidden_layers * shape.kv_width


@torch.no_grad()
def reach_of(model: nn.Module, shape: DecoderShape, length: int) -> float:
    """Virtual tokens and text up to which padding on the left, between the two, changes nothing.

    Infinite for most models: positions and mask pass over the padding. A sliding window counts it, and MPT takes
    distances from places in the cache (0). That is tried with one token, another one before it, and a gap.

    Raises:
        ValueError: a window is no longer than the prefix, which would have no effect there.
    """
    stack = decoder(model)
    if device_of(stack).type == "meta":
        return math.inf
    ids, hidden = torch.tensor([[2, 1]], device=device_of(stack)), []
    for gap in (0, 1):
        cache = cache_of(model, torch.zeros(1, dtype=torch.long))
        inputs = {"input_ids": ids[:, 1 - gap :], "attention_mask": ids.new_tensor([[1] + [0] * gap + [1]])}
        if "position_ids" in inspect.signature(stack.forward).parameters:
            inputs["position_ids"] = ids.new_ones(1, 1 + gap)
        with evaluating(stack):
            hidden.append(stack(**inputs, past_key_values=cache, use_cache=True)[0][:, -1])
    window = min((w for layer in cache.layers if (w := layer.get_max_length()) > 0), default=math.inf)
    if length >= window:
        raise ValueError(
            f"length={length}: some layers of {type(unwrap(model)).__name__} look back over {window} tokens, so part "
            "of the prefix would have no effect there; choose a shorter one"
        )
    return window if torch.allclose(*hidden, rtol=1e-3, atol=1e-3) else 0


def keys_and_values(model: nn.Module, ids: Tensor) -> Tensor:
    """What the model keeps of the tokens `ids`, (length,), as a prefix, (length, 2 * layers * kv_width)."""
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache_of(model, ids).layers]
    kept = torch.stack(pairs)  # (layers, 2, kv_heads, length, head_dim)
    return kept.permute(3, 0, 1, 2, 4).flatten(1)
