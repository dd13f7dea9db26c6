"""Prompt tuning: leave every weight alone, and train n vectors that stand before the embeddings of the text.

    h_0 = [P; E(text)]           P: (n, width)

A soft prompt passes through the network as tokens do, so each layer makes its keys and values from it. The
text meets it only through attention: n more keys to attend to in each layer, n more entries in the key-value
cache, n positions of the context. It cannot be merged into weights.

Source: Lester et al. 2021, section 2. Agrees with: PEFT `tuners/prompt_tuning` and `peft_model.py`, except
for positions under padding on the left; see `labkit.alternatives.virtual_tokens`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.alternatives.methods import AddedMethod, check_unadapted, install
from labkit.alternatives.sublayers import train_dtype
from labkit.alternatives.virtual_tokens import VirtualTokens, check_tokens, text_ids
from labkit.models.shapes import decoder_shape


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
        prompt = self.embedding.to(text.dtype).expand(batch, -1, -1)  # (batch, length, width)
        inputs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, text], 1)}
        positions = inputs.get("position_ids")
        if positions is not None:  # those of the text start at length already
            own = torch.arange(self.length, device=positions.device).expand(len(positions), -1)
            inputs["position_ids"] = torch.cat([own, positions], 1)
        self.cut = self.length


def add_prompt(model: nn.Module, config: PromptConfig, tokenizer=None) -> nn.Module:
    """Freeze `model` and put a trained soft prompt before everything it reads; in place. Returns `model`.

    Raises:
        ValueError: the model has a method already, the prompt is as long as its context, or `text` has no
            tokenizer.
    """
    check_unadapted(model, "prompt tuning")
    embeddings = model.get_input_embeddings().weight  # (vocab, width)
    device, dtype = embeddings.device, train_dtype(model)
    if config.init == "random":
        start = torch.randn(config.length, embeddings.shape[1], device=device, dtype=dtype)
    elif config.init == "vocab":
        start = embeddings[torch.randint(len(embeddings), (config.length,), device=device)]
    else:
        start = embeddings[text_ids(config.text, config.length, tokenizer).to(device)]
    start = start.detach().clone().to(device, dtype)  # (length, width)
    prompt = SoftPrompt(start, decoder_shape(model).max_position_embeddings)
    return install(model, AddedMethod(config, tokens=prompt))
