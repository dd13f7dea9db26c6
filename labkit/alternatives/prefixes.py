"""Prefix tuning: leave every weight alone, and train n keys and values before those of the text, in every layer.

    K_l = [P_l^K; K(text)],  V_l = [P_l^V; V(text)]           P: (n, layers, 2, kv_width)

Where a soft prompt is made into keys and values by each layer, a prefix is those keys and values: it has
`2 layers kv_width / width` times the parameters, and reaches combinations that no input could make. It costs the same when text
is written, and cannot be merged into weights.

*Reparametrization.* Li and Liang found the prefix unstable to train directly, and trained P = W2 tanh(W1 e + b1) + b2, with one MLP
for all n. After training only P matters: `fold_prefix` computes it and drops the MLP.

Source: Li & Liang 2021, section 4. Agrees with: PEFT `tuners/prefix_tuning`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.alternatives.sublayers import Sizes, check_bare, decoder, sizes, train_dtype
from labkit.alternatives.virtual_tokens import VirtualTokens, check_tokens, text_ids
from labkit.checks import check_whole


@dataclass(frozen=True)
class PrefixConfig:
    """Prefix tuning.

    Args:
        length: keys and values before the text, in each layer.
        projection: width of the MLP that makes the prefix in training; None to train the prefix itself.
        init: "random", from N(0, 1), as PEFT does; "text", the keys and values that the model itself makes of `text`: training then
            starts at that prompt, exactly.
        text: for init="text".

    Raises:
        ValueError: a value is out of its range, or init="text" with a projection, which cannot be set to a given prefix.
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
                    "init='text' sets the prefix itself, which no choice of the MLP's weights gives; use projection=None with it"
                )


class Prefix(VirtualTokens):
    """Prefix tuning: keys and values before those of the text, in every layer.

    Args:
        prefix: (length, 2 * layers * kv_width), for each layer its keys and then its values; None to make it by the MLP.
        shape: of the model.
        embedding, mlp: with prefix=None; (length, kv_width), and the MLP from there to the width of a prefix.
    """

    def __init__(
        self,
        prefix: Tensor | None,
        shape: Sizes,
        embedding: Tensor | None = None,
        mlp: nn.Sequential | None = None,
    ):
        super().__init__(len(embedding if prefix is None else prefix), shape.context)
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
                "prefix tuning does not train with gradient checkpointing: transformers drops the key-value cache then, and the "
                "prefix is in it. Use checkpointing=False; a prefix leaves little to save"
            )
        if inputs.get("past_key_values") is None:
            inputs["past_key_values"] = DynamicCache(config=decoder.config)
            self.private = inputs.get("use_cache") is False
        s, dtype = self.shape, decoder.get_input_embeddings().weight.dtype
        layers = self.values().to(dtype).view(-1, s.layers, 2, s.kv_heads, s.head_dim)
        layers = layers.permute(1, 2, 3, 0, 4)  # (layers, 2, kv_heads, length, head_dim)
        for i, (keys, values) in enumerate(layers):
            keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
            inputs["past_key_values"].update(keys, values, i)


def add_prefix(model: nn.Module, config: PrefixConfig, tokenizer=None) -> nn.Module:
    """Freeze `model` and put trained keys and values before those of its text in every layer; in place. Returns `model`.

    Raises:
        ValueError: as for `add_prompt`.
    """
    check_bare(model, "prefix tuning")
    shape = sizes(model)
    like = dict(device=model.get_input_embeddings().weight.device, dtype=train_dtype(model))
    width = 2 * shape.layers * shape.kv_width
    if config.projection:
        embedding = torch.randn(config.length, shape.kv_width, **like)
        mlp = nn.Sequential(
            nn.Linear(shape.kv_width, config.projection, **like),
            nn.Tanh(),
            nn.Linear(config.projection, width, **like),
        )
        prefix = Prefix(None, shape, embedding, mlp)
    elif config.init == "text":
        prefix = Prefix(
            keys_and_values(model, text_ids(config.text, config.length, tokenizer)).to(**like), shape
        )
    else:
        prefix = Prefix(torch.randn(config.length, width, **like), shape)
    model.requires_grad_(False)
    prefix.attach(model)
    model.method_config = config
    return model


def fold_prefix(model: nn.Module) -> nn.Module:
    """Compute the prefix that the MLP makes, keep it alone and drop the MLP; the output stays what it was.

    Raises:
        ValueError: the model has no prefix that an MLP makes.
    """
    prefix = getattr(model, "virtual_tokens", None)
    if not isinstance(prefix, Prefix) or prefix.mlp is None:
        raise ValueError(f"{type(model).__name__} has no prefix with a projection to fold")
    prefix.prefix = nn.Parameter(prefix.values().detach().clone())
    prefix.mlp = prefix.embedding = None
    return model


@torch.no_grad()
def keys_and_values(model: nn.Module, ids: Tensor) -> Tensor:
    """What the model keeps of the tokens `ids`, (length,), as a prefix, (length, 2 * layers * kv_width)."""
    was_training, stack = model.training, decoder(model).eval()
    cache = stack(input_ids=ids[None].to(model.get_input_embeddings().weight.device), use_cache=True)
    model.train(was_training)
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.past_key_values.layers]
    return torch.stack(pairs).permute(3, 0, 1, 2, 4).flatten(1)  # (layers, 2, heads, length, dim) before
