"""Prompt tuning: leave every weight alone, and train n vectors that stand before the embeddings of the text.

    h_0 = [P; E(text)]           P: (n, width)

A soft prompt passes through the network as tokens do, so each layer makes its keys and values from it. The
text meets it only through attention: n more keys to attend to in each layer, n more entries in the key-value
cache, n positions of the context. It cannot be merged into weights.

E is the embedding *layer*, not its table: Gemma's multiplies a row by sqrt(width), and OPT's may be narrower than
the blocks. A start from words is what the layer makes of them.

Source: Lester et al. 2021, section 2. Agrees with: PEFT `tuners/prompt_tuning` and `peft_model.py`, except
for positions under padding on the left; see `labkit.alternatives.virtual_tokens`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.alternatives.methods import AddedMethod, check_unadapted, install
from labkit.alternatives.sublayers import (
    decoder,
    device_of,
    embed,
    embedding_width,
    evaluating,
    input_embeddings,
    train_dtype,
)
from labkit.alternatives.virtual_tokens import VirtualTokens, check_tokens, text_ids
from labkit.models.shapes import decoder_shape
from labkit.models.walk import unwrap

KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")  # inputs per token that are handled


@dataclass(frozen=True)
class PromptConfig:
    """Prompt tuning.

    Args:
        length: soft tokens before the text.
        init: "random", from N(0, 1), as PEFT does: vectors far longer than those of words; "vocab", the
            embeddings of random tokens; "text", those of `text`, repeated or cut to `length`.
        text: for init="text".

    Raises:
        ValueError: a value is out of its range.
    """

    length: int = 20
    init: str = "vocab"
    text: str | None = None

    def __post_init__(self):
        check_tokens(self.length, self.init, ("random", "vocab", "text"), self.text)


class SoftPrompt(VirtualTokens):
    """Prompt tuning: `embedding`, (length, width), before the embeddings of the text.

    Args:
        embedding: where training starts.
        context: positions of the model; None if it sets no limit.
    """

    def __init__(self, embedding: Tensor, context: int | None):
        super().__init__(len(embedding), context)
        self.embedding = nn.Parameter(embedding)

    def insert(self, decoder: nn.Module, inputs: dict, batch: int) -> None:
        text = inputs.get("inputs_embeds")
        if text is None:
            text = decoder.get_input_embeddings()(inputs["input_ids"])  # (batch, time, width)
        per_token = [
            name
            for name, value in inputs.items()
            if name not in KNOWN and isinstance(value, Tensor) and value.shape[:2] == text.shape[:2]
        ]
        if per_token:
            raise ValueError(
                f"a soft prompt has no {', '.join(per_token)} to put before those of the text; leave them out"
            )
        inputs |= {
            "input_ids": None,
            "inputs_embeds": self.with_tokens(text, self.lead, self.embedding.to(text.dtype)),
        }
        positions = inputs.get("position_ids")  # (batch, time); those of the text start at length already
        if positions is not None:
            own = torch.arange(self.length, device=positions.device)[:, None]
            inputs["position_ids"] = self.with_tokens(positions[..., None], self.lead, own)[..., 0]
        self.cut = True

    def lead_of(self, mask: Tensor) -> Tensor | None:
        lead = (mask.cumsum(1) == 0).sum(1)  # (batch,)
        return lead if lead.any() else None


def add_prompt(model: nn.Module, config: PromptConfig, tokenizer=None) -> nn.Module:
    """Freeze `model` and put a trained soft prompt before everything it reads; in place. Returns `model`.

    Raises:
        ValueError: the model has a method already, the prompt is as long as its context, `text` has no
            tokenizer, or the model reads more of a token than its embedding. Nothing is changed then.
    """
    check_unadapted(model, "prompt tuning")
    table, dtype = input_embeddings(model), train_dtype(model)
    check_embeddings_are_enough(model)
    device = device_of(table)
    if config.init == "random":
        start = torch.randn(config.length, embedding_width(model), device=device, dtype=dtype)
    elif config.init == "vocab":
        start = embed(model, torch.randint(table.num_embeddings, (config.length,), device=device))
    else:
        start = embed(model, text_ids(config.text, config.length, tokenizer))
    prompt = SoftPrompt(start.to(device, dtype), decoder_shape(unwrap(model)).max_position_embeddings)
    return install(model, AddedMethod(config, tokens=prompt))


@torch.no_grad()
def check_embeddings_are_enough(model: nn.Module) -> None:
    """Raise a `ValueError` if the decoder makes another thing of two tokens than of their embeddings.

    Gemma 3n, for one, looks up more about a token in each of its layers, which a soft prompt does not have.
    """
    stack, ids = decoder(model), torch.arange(2)
    embedded = embed(model, ids)[None]
    if embedded.is_meta:
        return  # shapes alone: nothing can be computed
    with evaluating(stack):
        by_ids = stack(input_ids=ids[None].to(embedded.device), use_cache=False)[0]
        by_embeddings = stack(inputs_embeds=embedded, use_cache=False)[0]
    if not torch.allclose(by_ids, by_embeddings, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"{type(model).__name__} reads more of a token than its embedding, and a soft prompt has nothing more; "
            "train a prefix (add_prefix), or use LoRA"
        )
