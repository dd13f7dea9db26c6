"""A JSON answer, and how sure the model was of each token and of each field's value.

The probability of a value is the product of those of the tokens that write it, from the colon before it to the
comma or brace after it, each given all that was written before:

    P(value) = product over its tokens of p(token | prompt, tokens before)

For a field with few allowed values, each of them is written in place of the value given, and measured in the same
way. What their probabilities lack to one would have been something else. Later fields are conditioned on earlier
ones as they were written, so these are not probabilities that the whole answer is right.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from labkit.data.batches import collate
from labkit.data.encoding import Encoded
from labkit.data.tokens import completion_ids, text_of
from labkit.training.evaluate import ids_of_prompts
from labkit.training.greedy import Stops, greedy, stops_of
from labkit.training.limits import padding_id
from labkit.training.metrics import parse_json
from labkit.training.readiness import own_modes

ROWS = 4  # in a forward pass: a row of 200 tokens has 40 MB of logits


class Span(NamedTuple):
    """Where a value stands in a JSON text: from the colon before it, from its first sign, to behind its last."""

    colon: int
    start: int
    end: int


class Replaced(NamedTuple):
    """An answer with another value: its tokens, the first that writes the value, and the first behind it."""

    ids: list[int]
    first: int
    last: int


@dataclass(frozen=True)
class FieldReading:
    """One field of an answer.

    Attributes:
        value: as given.
        probability: of this value; see the module docstring.
        choices: {allowed value: its probability in this place}, the likeliest first; empty for a free text.
    """

    value: Any
    probability: float
    choices: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: without the mark that ends it.
        pieces: the text of each token, the end mark's included.
        probabilities: of each token, given all before it.
        fields: {name: `FieldReading`}; None if the text is no JSON object.
    """

    text: str
    pieces: list[str]
    probabilities: list[float]
    fields: dict[str, FieldReading] | None


@torch.no_grad()
def read_answer(
    model: nn.Module,
    tokenizer,
    prompt: str,
    classes: Mapping[str, Sequence[str]] | None = None,
    max_new_tokens: int = 64,
) -> Answer:
    """Answer a prompt greedily, and measure every token and every field of the answer.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: a text; of a chat, what `labkit.training.evaluate.chat_prompts` makes.
        classes: {field: its allowed values}, for fields with few of them.
        max_new_tokens: of the answer.

    Raises:
        ValueError: the prompt does not fit; see `labkit.training.evaluate.generate`.
    """
    (ids,) = ids_of_prompts(model, tokenizer, [prompt], max_new_tokens)
    stops, pad_id = stops_of(model, tokenizer), padding_id(tokenizer, model)
    asked = torch.tensor([ids], device=next(model.parameters()).device)
    with own_modes(model):
        model.eval()
        rows = greedy(model, tokenizer, asked, torch.ones_like(asked), stops, max_new_tokens, pad_id)
        new = rows[0].tolist()
        written = stops.cut(new)
        new = new[: len(written) + 1]  # the end is a decision too
        pieces, text = pieces_of(written, stops, tokenizer)
        found = parse_json(text)
        spans = {} if found is None else value_spans(text)
        places = [(name, value) for name in spans for value in (classes or {}).get(name, ())]
        others = [in_place(prompt, new, pieces, text, spans[name], v, tokenizer) for name, v in places]
        examples = [Encoded(ids, new), *(Encoded(ids, one.ids) for one in others)]
        own, *chances = probabilities(model, examples, pad_id)
    choices: dict[str, dict[str, float]] = {name: {} for name in spans}
    for (name, value), other, chance in zip(places, others, chances):
        choices[name][value] = chance[other.first : other.last].prod().item()
    fields = {}
    for name, span in spans.items():
        first, last = tokens_between(pieces, span.colon, span.end + 1)
        ranked = dict(sorted(choices[name].items(), key=lambda one: -one[1]))
        fields[name] = FieldReading(found[name], own[first:last].prod().item(), ranked)
    ends = [text_of([token], tokenizer) for token in new[len(written) :]]
    return Answer(text.strip(), [*pieces, *ends], own.tolist(), None if found is None else fields)


def pieces_of(ids: list[int], stops: Stops, tokenizer) -> tuple[list[str], str]:
    """What each token adds to the text, and the whole text, up to the mark that ends it."""
    texts = [text_of(ids[: n + 1], tokenizer) for n in range(len(ids))]
    # a token may hold a part of a letter: its text comes with the token that ends the letter
    whole = [text.rstrip("\ufffd") for text in texts]
    pieces = [now[len(before) :] for before, now in zip(["", *whole], whole)]
    text = whole[-1] if whole else ""
    return pieces, text.partition(stops.text)[0] if stops.text else text


def value_spans(text: str) -> dict[str, Span]:
    """Where the values of a JSON object stand in its text, by field; of a field that stands twice, the last."""
    decoder, spaces = json.JSONDecoder(), " \t\n\r"

    def skip(at: int) -> int:
        while at < len(text) and text[at] in spaces:
            at += 1
        return at

    spans: dict[str, Span] = {}
    at = skip(skip(0) + 1)
    while text[at] != "}":
        name, at = decoder.raw_decode(text, at)
        colon = skip(at)
        start = skip(colon + 1)
        _, end = decoder.raw_decode(text, start)
        spans[name] = Span(colon, start, end)
        at = skip(end)
        at = skip(at + 1) if text[at] == "," else at
    return spans


def tokens_between(pieces: Sequence[str], start: int, end: int) -> tuple[int, int]:
    """The tokens that hold a part of the text from `start` to `end`: number of the first, and behind the last."""
    at, found = 0, []
    for i, piece in enumerate(pieces):
        if at < end and at + len(piece) > start:
            found.append(i)
        at += len(piece)
    return found[0], found[-1] + 1


def in_place(
    prompt: str, ids: list[int], pieces: list[str], text: str, span: Span, value: str, tokenizer
) -> Replaced:
    """The answer up to this value, with `value` in its place."""
    first, _ = tokens_between(pieces, span.colon, span.colon + 1)
    before = "".join(pieces[:first])
    kept = text[len(before) : span.start]  # from the token that holds the colon
    behind = text[span.end : span.end + 2]  # what follows may share a token with the value's end
    changed = kept + json.dumps(value, ensure_ascii=False)
    new = ids[:first] + completion_ids(prompt + before, changed + behind, tokenizer)
    now, _ = pieces_of(new, Stops(frozenset(), ""), tokenizer)
    _, last = tokens_between(now, 0, len(before) + len(changed) + 1)
    return Replaced(new, first, last)


@torch.no_grad()
def probabilities(model: nn.Module, examples: list[Encoded], pad_id: int) -> list[torch.Tensor]:
    """The model's probability of each token of the completions, given all before it: one (n_completion,) each."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(examples), ROWS):
        rows = examples[start : start + ROWS]
        batch = collate(rows, pad_id).to(device)
        logits = model(input_ids=batch.ids, use_cache=False).logits  # (rows, time, vocab)
        for row, one in enumerate(rows):
            targets = torch.tensor(one.completion, device=device)
            before = slice(len(one.prompt) - 1, len(one) - 1)  # the positions that predict them
            found.append(logits[row, before].float().softmax(-1).gather(1, targets[:, None])[:, 0].cpu())
    return found
