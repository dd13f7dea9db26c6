"""Room for n tokens before the text: what a soft prompt and a prefix have in common.

Why hooks on the decoder and not a model around it: the base keeps its class and names, so `model(...)`, the loss, `generate` and
gradient checkpointing work as before. The hidden states of a soft prompt are cut off before the output layer: logits line up with
the tokens that were given, and labels need no shift. (PEFT keeps them, so its loss also counts the first token of the text, if that
is supervised; the last vector of the prompt predicts it.)

Positions count up over prompt and text: the text begins at n. Padding on the left comes between them in memory, but takes no
position. (In PEFT the positions of a soft prompt depend on that padding.)
"""

import inspect
import math

import torch
from torch import Tensor, nn

from labkit.alternatives.sublayers import decoder
from labkit.checks import check_choice, check_whole


def check_tokens(length: int, init: str, inits: tuple[str, ...], text: str | None) -> None:
    check_whole("length", length)
    check_choice("init", init, inits)
    if (init == "text") != bool(text):
        raise ValueError(f"init={init!r} and text={text!r}: give a text with init='text', and only then")


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


def text_ids(text: str, length: int, tokenizer) -> Tensor:
    """The tokens of `text`, repeated or cut to (length,)."""
    if tokenizer is None:
        raise ValueError("init='text' needs the tokenizer: give it as the third argument")
    ids = tokenizer(text)["input_ids"]
    return torch.tensor((ids * math.ceil(length / len(ids)))[:length])
