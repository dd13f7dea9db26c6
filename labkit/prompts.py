"""Prompt tuning and prefix tuning: leave every weight alone, and train what the model reads before the text.

    prompt tuning    n vectors before the embeddings of the text:      h_0 = [P; E(text)]           P: (n, width)
    prefix tuning    n keys and values before those of every layer:    K_l = [P_l^K; K(text)]       P: (n, layers, 2, kv_width)

A soft prompt passes through the network as tokens do, so that each layer makes its keys and values from it. A prefix is those keys
and values themselves: it has `2 layers kv_width / width` times the parameters, and reaches combinations that no input could make.
The text only ever meets either through attention, so that both cost the same when it is written: n more keys to attend to in each
layer, n more entries of the key-value cache, and n positions of the context. Neither can be merged into weights.

*Reparametrization.* Li and Liang found the prefix unstable to train directly, and trained P = W2 tanh(W1 e + b1) + b2, with one MLP
for all n. After training only P matters: `fold_prefix` computes it and drops the MLP.

Why hooks on the decoder and not a model around it: the base keeps its class and names, so that `model(...)`, the loss,
`generate` and gradient checkpointing work as before. The hidden states of a soft prompt are cut off before the output layer: logits line
up with the tokens that were given, and labels need no shift. (PEFT keeps them, so that its loss also counts the first token of
the text, if that is supervised; the last vector of the prompt predicts it.)

Positions count up over prompt and text: the text begins at n. Padding on the left comes between them in memory, but takes no position.

Sources: prefix tuning (Li & Liang 2021), section 4; prompt tuning (Lester et al. 2021), section 2. Agrees with PEFT
`tuners/prefix_tuning`, `tuners/prompt_tuning` and `peft_model.py`, but for the positions of a soft prompt under padding on the
left, which PEFT lets depend on the padding.
"""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.anatomy import Sizes, check_bare, decoder, sizes, train_dtype


@dataclass(frozen=True)
class PromptConfig:
    """Prompt tuning.

    Args:
        length: soft tokens before the text.
        init: "random", from N(0, 1), as PEFT does: far longer vectors than those of words; "vocab", the embeddings of random
            tokens; "text", those of `text`, repeated or cut to `length`.
        text: for init="text".

    Raises:
        ValueError: a value is out of its range.
    """

    length: int = 20
    init: str = "vocab"
    text: str | None = None

    def __post_init__(self):
        check(self.length, self.init, ("random", "vocab", "text"), self.text)


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
        check(self.length, self.init, ("random", "text"), self.text)
        if self.projection is not None:
            check_whole("projection", self.projection)
            if self.init == "text":
                raise ValueError(
                    "init='text' sets the prefix itself, which no choice of the MLP's weights gives; use projection=None with it"
                )


def check(length: int, init: str, inits: tuple[str, ...], text: str | None) -> None:
    check_whole("length", length)
    if init not in inits:
        raise ValueError(f"init={init!r} is not known; choose one of {inits}")
    if (init == "text") != bool(text):
        raise ValueError(f"init={init!r} and text={text!r}: give a text with init='text', and only then")


def check_whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number of at least 1")


class VirtualTokens(nn.Module):
    """What both have in common: room in the mask, the positions and the context for n tokens before the text."""

    def __init__(self, length: int, context: int):
        super().__init__()
        if length >= context:
            raise ValueError(
                f"length={length} leaves no room for text in this model's context of {context} positions; choose far fewer"
            )
        self.length, self.context = length, context
        self.enabled = True
        # of the pass that is under way: hidden states before the text, and whether its cache was made here, unasked
        self.cut, self.private = 0, False

    def attach(self, model: nn.Module) -> None:
        """From now on, enter every forward pass of `model`."""
        model.virtual_tokens = self
        self.names = tuple(inspect.signature(decoder(model).forward).parameters)
        enter = decoder(model).register_forward_pre_hook(self.enter, with_kwargs=True)
        leave = decoder(model).register_forward_hook(self.leave)
        self.handles = enter, leave

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        for handle in self.handles:
            handle.remove()
        del model.virtual_tokens

    def enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the decoder runs: put the virtual tokens before the text, unless its cache holds them already."""
        if not self.enabled:
            return None
        inputs = dict(zip(self.names, args)) | kwargs
        ids, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
        batch, time = (ids if embedded is None else embedded).shape[:2]
        cache = inputs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "virtual tokens need a cache that grows, and a static one has no room for them; leave cache_implementation='static' away"
            )
        seen = 0 if cache is None else int(cache.get_seq_length())
        total = time + (seen or self.length)
        if total > self.context:
            raise ValueError(
                f"{total - self.length} tokens of text after {self.length} virtual ones are {total}, above this model's context of "
                f"{self.context} positions; shorten the text, or train a shorter prompt"
            )
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ValueError(
                    "virtual tokens need the mask of the text as (batch, time), and make the mask of four dimensions themselves"
                )
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.length), mask], 1)
        if positions is not None:
            inputs["position_ids"] = positions + self.length
        self.cut, self.private = 0, False
        if not seen:
            self.insert(decoder, inputs, batch)
        return (), inputs

    def leave(self, decoder: nn.Module, args: tuple, output):
        """After the decoder ran: drop the hidden states before the text, and a cache that nobody asked for."""
        if isinstance(output, tuple):
            return (output[0][:, self.cut :], *output[1:]) if self.cut else output
        if self.cut:
            output.last_hidden_state = output.last_hidden_state[:, self.cut :]
        if self.private:
            output.past_key_values = None
        self.cut, self.private = 0, False
        return output

    def extra_repr(self) -> str:
        return f"length={self.length}"


class SoftPrompt(VirtualTokens):
    """Prompt tuning: `embedding`, (length, width), before the embeddings of the text."""

    def __init__(self, embedding: Tensor, context: int):
        super().__init__(len(embedding), context)
        self.embedding = nn.Parameter(embedding)

    def insert(self, decoder: nn.Module, inputs: dict, batch: int) -> None:
        text = inputs.get("inputs_embeds")
        if text is None:
            text = decoder.get_input_embeddings()(inputs["input_ids"])  # (batch, time, width)
        prompt = self.embedding.to(text.dtype).expand(batch, -1, -1)  # (batch, length, width)
        inputs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, text], 1)}
        positions = inputs.get("position_ids")
        if positions is not None:  # those of the text start at length already
            own = torch.arange(self.length, device=positions.device).expand(len(positions), -1)
            inputs["position_ids"] = torch.cat([own, positions], 1)
        self.cut = self.length


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


def add_prompt(model: nn.Module, config: PromptConfig, tokenizer=None) -> nn.Module:
    """Freeze `model` and put a trained soft prompt before everything that it reads; in place. Returns `model`.

    Raises:
        ValueError: the model has a method already, the prompt is as long as its context, or there is no tokenizer for `text`.
    """
    check_bare(model, "prompt tuning")
    embeddings = model.get_input_embeddings().weight  # (vocab, width)
    shape, like = sizes(model), dict(device=embeddings.device, dtype=train_dtype(model))
    if config.init == "random":
        start = torch.randn(config.length, embeddings.shape[1], **like)
    elif config.init == "vocab":
        start = embeddings[torch.randint(len(embeddings), (config.length,), device=embeddings.device)]
    else:
        start = embeddings[text_ids(config, tokenizer).to(embeddings.device)]
    prompt = SoftPrompt(start.detach().clone().to(**like), shape.context)
    model.requires_grad_(False)
    prompt.attach(model)
    model.method_config = config
    return model


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
        prefix = Prefix(keys_and_values(model, text_ids(config, tokenizer)).to(**like), shape)
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


def text_ids(config: PromptConfig | PrefixConfig, tokenizer) -> Tensor:
    """The tokens of `config.text`, repeated or cut to (length,)."""
    if tokenizer is None:
        raise ValueError("init='text' needs the tokenizer: give it as the third argument")
    ids = tokenizer(config.text)["input_ids"]
    return torch.tensor((ids * math.ceil(config.length / len(ids)))[: config.length])
