"""Greedy generation: at each step the token with the largest logit, until the mark that training teaches.

transformers takes the steps: it knows the caches and positions of every family. But what it does besides, it reads
from `model.generation_config`, which came with the weights and says what somebody wanted of another model: sampling,
beams, a penalty on repetition, forced and forbidden tokens, lengths. All of it is set aside meanwhile.

Generation stops where `labkit.data.encoding.encode` ends a completion: at what the tokenizer puts after a text, its
EOS token, or the mark of the chat template. The config is asked for one thing: further special tokens that end a
text, such as `<|endoftext|>` of a chat model. An ordinary token never ends one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.data.chats import end_mark
from labkit.data.tokens import end_ids, ids_of, special_ids
from labkit.models.walk import unwrap


@dataclass(frozen=True)
class Stops:
    """Where an answer ends: at any of `ids`, or where its text comes to `text` ("" for none)."""

    ids: frozenset[int]
    text: str

    def cut(self, ids: list[int]) -> list[int]:
        """The tokens before the first that stops."""
        return ids[: next((i for i, token in enumerate(ids) if token in self.ids), len(ids))]


def stops_of(model: nn.Module, tokenizer) -> Stops:
    """Where the completions end that `encode` makes with this tokenizer."""
    special, mark = special_ids(tokenizer), end_mark(tokenizer)
    ids, marked = set(end_ids(tokenizer)[:1]), ids_of(mark, tokenizer) if mark else []
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if marked and marked[0] in special:
        ids.add(marked[0])
        mark = ""
    for holder in with_generation_config(model):
        named = holder.generation_config.eos_token_id
        ids |= special.intersection(named if isinstance(named, list) else [named])
    return Stops(frozenset(ids), mark)


class StopAtText:
    """Ends an answer when its text holds the mark, which may be several tokens, and merged with others."""

    def __init__(self, tokenizer, text: str, width: int):
        self.tokenizer, self.text, self.width = tokenizer, text, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :])
        return torch.tensor([self.text in text for text in texts], device=input_ids.device)


def greedy(
    model: nn.Module, tokenizer, ids: Tensor, mask: Tensor, stops: Stops, limit: int, pad_id: int
) -> Tensor:
    """The tokens after `ids`, up to `limit`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        ids, mask: (batch, time), padded on the left.
        stops: where a row ends.
        limit: new tokens at most.
        pad_id: what follows a row's end.

    Returns:
        (batch, at most `limit`).
    """
    width = ids.shape[1]
    stopping = [StopAtText(tokenizer, stops.text, width)] if stops.text else []
    out = generate_only(
        model,
        ids,
        mask,
        stopping,
        max_new_tokens=limit,
        eos_token_id=sorted(stops.ids) or None,
        pad_token_id=pad_id,
    )
    return out[:, width:]


def generate_only(model: nn.Module, ids: Tensor, mask: Tensor, stopping: Sequence[Callable] = (), **settings):
    """transformers' `generate`, greedy, with these settings and no others."""
    from transformers import GenerationConfig, StoppingCriteriaList  # late: it takes seconds

    able = model if hasattr(model, "generate") else unwrap(model)  # data parallelism has no `generate`
    with generation_config_aside(model):
        return able.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(do_sample=False, **settings),
            stopping_criteria=StoppingCriteriaList(stopping),
        )


def needs_solitude(model: nn.Module, ids: list[int], pad_id: int) -> bool:
    """Does the model write something else in a batch with padding than alone, as RWKV does, which has no mask?

    Two tokens are written, and their logits compared with those of the forward pass that is trained.

    Raises:
        ValueError: they differ even if `ids` are alone, or are not finite.
    """
    name, device = type(unwrap(model)).__name__, next(model.parameters()).device
    settings: dict[str, Any] = dict(
        max_new_tokens=2, pad_token_id=pad_id, output_logits=True, return_dict_in_generate=True
    )

    def differs(rows: list[list[int]], padding: int) -> bool:
        mask = torch.ones(len(rows), len(rows[0]), dtype=torch.long, device=device)
        mask[0, :padding] = 0
        out = generate_only(model, torch.tensor(rows, device=device), mask, **settings)
        said = torch.stack([step[0] for step in out.logits]).float()  # (2, vocab)
        own = out.sequences[:1, padding:-1]
        trained = model(input_ids=own, use_cache=False).logits[0, -2:].float()
        if not trained.isfinite().all():
            raise ValueError(
                f"the logits of {name} are not finite, so no token is the most likely one; a weight is NaN or "
                "infinite, or the dtype too narrow: load it in float32"
            )
        spread = trained - trained.mean(dim=1, keepdim=True)
        return bool((said - trained).norm() > 0.1 * spread.norm())  # rounding is far less

    if differs([ids], 0):
        raise ValueError(
            f"generate of transformers does not compute with {name} what training does, for example because it counts "
            "positions otherwise; its answers would not be those of the model that was trained"
        )
    return differs([[pad_id, pad_id, *ids], [ids[0], ids[0], *ids]], 2)


def with_generation_config(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a generation config: the model, or several where wrappers hold one too."""
    return [m for m in model.modules() if vars(m).get("generation_config") is not None]


@contextmanager
def generation_config_aside(model: nn.Module) -> Iterator[None]:
    """Within the block the model's generation config says nothing; afterwards it is the one that it was."""
    from transformers import GenerationConfig

    before = [(module, module.generation_config) for module in with_generation_config(model)]
    for module, _ in before:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in before:
            module.generation_config = config
