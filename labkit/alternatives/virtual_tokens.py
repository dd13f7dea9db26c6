"""Room for n tokens before the text: what a soft prompt and a prefix have in common.

Why hooks on the decoder rather than a model around it: the base keeps its class and its names, so
`model(...)`, the loss, `generate` and gradient checkpointing work as before. The hidden states of a soft
prompt are cut off before the output layer, so logits line up with the tokens that were given and labels need
no shift. (PEFT keeps them, so if the first token of the text is supervised, its loss counts that one too,
predicted by the last vector of the prompt.)

Positions count up over prompt and text: the text begins at n. Padding on the left takes none, and a soft prompt
stands behind it: else a sliding window, ALiBi or a recurrent state would count it. (In PEFT it does.)
"""

import inspect
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from labkit.alternatives.sublayers import decoder, device_of
from labkit.checks import check_choice, check_whole
from labkit.data.tokens import prompt_ids


def check_tokens(length: int, init: str, inits: tuple[str, ...], text: str | None) -> None:
    """The checks that both configs share: a length, a known start, and a text exactly if it needs one."""
    check_whole("length", length)
    check_choice("init", init, inits)
    if (init == "text") != bool(text):
        raise ValueError(f"init={init!r} and text={text!r}: give a text with init='text', and only then")


class VirtualTokens(nn.Module):
    """Room in the mask, the positions and the context for n tokens before the text; a subclass inserts them.

    Args:
        length: n.
        context: positions of the model; None if it sets no limit.

    Raises:
        ValueError: they leave no room for text.
    """

    def __init__(self, length: int, context: int | None):
        super().__init__()
        if context is not None and length >= context:
            raise ValueError(
                f"length={length} leaves no room for text in this model's context of {context} positions; "
                "choose far fewer"
            )
        self.length, self.context = length, math.inf if context is None else context
        self.is_used = False  # has a forward pass taken them in?
        # of the pass under way: must hidden states be cut off; the cache that was filled before it, and whether
        # that was made here, unasked; padding on the left
        self.cut, self.own_cache = False, False
        self.filled: Any = None
        self.lead: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Take part in every forward pass of `model` from now on, as its child `virtual_tokens`."""
        stack = decoder(model)
        self.names = tuple(inspect.signature(stack.forward).parameters)
        enter = stack.register_forward_pre_hook(self.enter, with_kwargs=True)
        leave = stack.register_forward_hook(self.leave)
        self.handles = enter, leave
        model.virtual_tokens = self.to(device_of(stack))
        forget_compiled()

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`."""
        for handle in self.handles:
            handle.remove()
        del model.virtual_tokens
        forget_compiled()

    def insert(self, decoder: nn.Module, inputs: dict, batch: int) -> None:
        """Change the `inputs` of the decoder, by name, so that the virtual tokens come before the text."""
        raise NotImplementedError

    def enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the decoder: put the virtual tokens before the text, unless its cache holds them already."""
        inputs = dict(zip(self.names, args)) | kwargs
        ids, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if ids is None and embedded is None:
            return args, kwargs  # the decoder says what it misses
        batch, time = (ids if embedded is None else embedded).shape[:2]
        cache = inputs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "virtual tokens need a cache that grows, and a static one has no room for them; "
                "leave out cache_implementation='static'"
            )
        seen = 0 if cache is None else int(cache.get_seq_length())
        total = time + (seen or self.length)
        if total > self.context:
            raise ValueError(
                f"{total - self.length} tokens of text after {self.length} virtual ones are {total}, above this "
                f"model's context of {self.context} positions; shorten the text, or train a shorter prompt"
            )
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ValueError(
                    "virtual tokens need the mask of the text as (batch, time); they make the mask of four dimensions "
                    "themselves"
                )
            inputs["attention_mask"] = self.with_tokens(mask[..., None], self.lead_of(mask), 1)[..., 0]
        if positions is not None:
            inputs["position_ids"] = positions + self.length
        self.cut, self.filled, self.own_cache, self.lead = False, None, False, None
        if not seen:
            self.lead = self.lead_of(mask) if mask is not None and mask.shape[1] == time else None
            self.insert(decoder, inputs, batch)
        self.total = total
        return (), inputs

    def lead_of(self, mask: Tensor) -> Tensor | None:
        """Positions of padding on the left, (batch,), behind which the virtual tokens stand; None for none."""
        return None

    def with_tokens(self, text: Tensor, lead: Tensor | None, tokens: Tensor | float) -> Tensor:
        """Rows of what comes per token, (batch, time, size), with the `tokens`, (length, size), among them.

        Args:
            text: what there is.
            lead: see `lead_of`.
            tokens: what to put in, or one number for all of it.
        """
        batch, _, size = text.shape
        if not isinstance(tokens, Tensor):
            tokens = text.new_full((self.length, size), tokens)
        both = torch.cat([tokens.expand(batch, -1, -1), text], 1)  # (batch, length + time, size)
        if lead is None:
            return both
        at = torch.arange(both.shape[1], device=both.device)[None]  # place in the result
        n, lead = self.length, lead[:, None]
        source = torch.where(at < lead, at + n, torch.where(at < lead + n, at - lead, at))
        return both.gather(1, source[..., None].expand(-1, -1, size))

    def without_tokens(self, states: Tensor, lead: Tensor | None) -> Tensor:
        """The rows of the text: (batch, length + time, size) to (batch, time, size)."""
        if lead is None:
            return states[:, self.length :]
        at = torch.arange(states.shape[1] - self.length, device=states.device)[None]
        source = at + self.length * (at >= lead[:, None])
        return states.gather(1, source[..., None].expand(-1, -1, states.shape[2]))

    def leave(self, decoder: nn.Module, args: tuple, output):
        """After the decoder: drop the hidden states before the text, and a cache that nobody asked for."""
        cut, filled, own_cache, lead = self.cut, self.filled, self.own_cache, self.lead
        self.cut, self.filled, self.own_cache, self.lead = False, None, False, None
        reached = output[0].shape[1] if cut else self.total if filled is None else filled.get_seq_length()
        if reached == self.total:  # else the decoder read neither, and the model's first pass is an error
            self.is_used = True
        if cut and isinstance(output, tuple):
            return (self.without_tokens(output[0], lead), *output[1:])
        if cut:
            output.last_hidden_state = self.without_tokens(output.last_hidden_state, lead)
        if own_cache and not isinstance(output, tuple):
            output.past_key_values = None
        return output

    def extra_repr(self) -> str:
        return f"length={self.length}"


def forget_compiled() -> None:
    """Have what `torch.compile` made be made again: it does not look whether hooks have come or gone."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def text_ids(text: str, length: int, tokenizer) -> Tensor:
    """The tokens of `text`, repeated or cut to (length,).

    Raises:
        ValueError: there is no tokenizer, or it makes nothing of the text.
    """
    if tokenizer is None:
        raise ValueError("init='text' needs the tokenizer: give it as the third argument")
    ids = prompt_ids(text, tokenizer)
    if not ids:
        raise ValueError(f"text={text!r} has no tokens; give a text with words in it")
    return torch.tensor((ids * math.ceil(length / len(ids)))[:length])
