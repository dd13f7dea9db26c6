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

from dataclasses import dataclass

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
        shape: of the model.
        embedding, mlp: with prefix=None; (length, kv_width), and the MLP from there to the width of a prefix.
    """

    def __init__(
        self,
        prefix: Tensor | None,
        shape: DecoderShape,
        embedding: Tensor | None = None,
        mlp: nn.Sequential | None = None,
    ):
        super().__init__(len(embedding if prefix is None else prefix), shape.max_position_embeddings)
        self.shape = shape
        self.prefix = None if prefix is None else nn.Parameter(prefix)
        self.embedding = None if embedding is None else nn.Parameter(embedding)
        self.mlp = mlp

    def values(self) -> Tensor:
        """The prefix, (length, 2 * layers * kv_width)."""
        return self.mlp(self.embedding) if self.prefix is None else self.prefix

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
        layers = (
            self.values()
            .to(stream_dtype(decoder))
            .view(-1, s.num_hidden_layers, 2, s.num_key_value_heads, s.head_dim)
        )
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
    shape = decoder_shape(unwrap(model))
    check_cache(model, shape, config.length)
    like = dict(device=device_of(input_embeddings(model)), dtype=train_dtype(model))
    width = 2 * shape.num_hidden_layers * shape.kv_width
    if config.projection:
        embedding = torch.randn(config.length, shape.kv_width, **like)
        mlp = nn.Sequential(
            nn.Linear(shape.kv_width, config.projection, **like),
            nn.Tanh(),
            nn.Linear(config.projection, width, **like),
        )
        prefix = Prefix(None, shape, embedding, mlp)
    elif config.init == "text":
        ids = text_ids(config.text, config.length, tokenizer)
        prefix = Prefix(keys_and_values(model, ids).to(**like), shape)
    else:
        prefix = Prefix(torch.randn(config.length, width, **like), shape)
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
def cache_of(model: nn.Module, ids: Tensor) -> list:
    """What the layers of the model's cache keep of the tokens `ids`, (length,)."""
    stack = decoder(model)
    with evaluating(stack):
        ids = ids[None].to(device_of(stack))
        return stack(input_ids=ids, use_cache=True).past_key_values.layers


def check_cache(model: nn.Module, shape: DecoderShape, length: int) -> None:
    """Raise a `ValueError` unless each layer keeps keys and values of one token as a prefix has them.

    The model is asked, by a pass over one token: some layers of hybrid models keep a state instead, the values of
    others are narrower than the keys, and a window that slides passes over what lies before it.
    """
    if next(decoder(model).parameters()).is_meta:
        return  # shapes alone: nothing can be computed
    each = (1, shape.num_key_value_heads, 1, shape.head_dim)
    layers = cache_of(model, torch.zeros(1, dtype=torch.long))
    kept = [
        tuple(tuple(getattr(layer, n).shape) for n in ("keys", "values") if hasattr(layer, n))
        for layer in layers
    ]
    if kept != [(each, each)] * shape.num_hidden_layers:
        odd = next((str(k) for k in kept if k != (each, each)), f"{len(kept)} layers")
        raise ValueError(
            f"{type(model).__name__} does not keep keys and values of {each[1:]} in each of its "
            f"{shape.num_hidden_layers} layers, but {odd}, and a prefix has nowhere to be; use prompt tuning or LoRA"
        )
    window = min((w for layer in layers if (w := layer.get_max_length()) > 0), default=length + 1)
    if length >= window:
        raise ValueError(
            f"length={length}: some layers of {type(model).__name__} look back over {window} tokens, so part of the "
            "prefix would have no effect there; choose a shorter one"
        )


def keys_and_values(model: nn.Module, ids: Tensor) -> Tensor:
    """What the model keeps of the tokens `ids`, (length,), as a prefix, (length, 2 * layers * kv_width)."""
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache_of(model, ids)]
    kept = torch.stack(pairs)  # (layers, 2, kv_heads, length, head_dim)
    return kept.permute(3, 0, 1, 2, 4).flatten(1)
