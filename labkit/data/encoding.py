"""From a record to token ids.

A record is a dict, either a chat, whose last message is the assistant's answer to learn,

    {"messages": [{"role": "system", "content": …}, {"role": "user", "content": …},
                  {"role": "assistant", "content": …}]}

or plain text: `{"prompt": "…", "completion": "…"}`. Only the completion is *supervised*: the loss is taken on
its tokens, and the prompt is context. A model that is trained on its prompts too spends most of its gradient
on learning to write customers' messages, which nobody asked it to do.

What begins and ends a plain text, the tokenizer says; for a chat, its template (`labkit.data.chats`) says both.
Without an end, a model would not learn to stop: where the template writes none, the tokenizer's is added. How
prompt and completion become tokens is in `labkit.data.tokens`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from labkit.data.chats import split_chat
from labkit.data.records import not_a_record, records_of, shortened
from labkit.data.tokens import completion_ids, end_ids, ids_of, prompt_ids, special_ids


@dataclass(frozen=True)
class Encoded:
    """One record as token ids: the prompt, and the completion, which alone is supervised.

    Attributes:
        prompt: context.
        completion: what is learned, with the mark that ends it.
        end: how many of the completion's last tokens are that mark.
    """

    prompt: list[int]
    completion: list[int]
    end: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def n_supervised(self) -> int:
        """Tokens with something before them to predict them from."""
        return len(self.completion) if self.prompt else max(0, len(self.completion) - 1)

    def without_end(self) -> "Encoded":
        """The same without the mark that ends it."""
        return Encoded(self.prompt, self.completion[: len(self.completion) - self.end])


def encode(record: Mapping, tokenizer) -> Encoded:
    """Token ids of a record; those of its prompt are what `labkit.training.evaluate.generate` would go on from.

    Raises:
        ValueError: the record is neither a chat that ends with the assistant nor a prompt with a completion, or
            template or tokenizer lose something of its answer, or nothing of it would be supervised.
    """
    if not isinstance(record, Mapping):
        raise ValueError(not_a_record(record))
    is_chat = "messages" in record
    if not is_chat:
        check_texts(record)
    prompt, text, mark = (
        split_chat(record, tokenizer) if is_chat else (record["prompt"], record["completion"], "")
    )
    before, learned = prompt_ids(prompt, tokenizer), completion_ids(prompt, text + mark, tokenizer)
    end = ids_of(mark, tokenizer) if mark else end_ids(tokenizer)
    ended = learned[max(0, len(learned) - len(end)) :] == end
    if not mark and not ended and not (is_chat and learned and learned[-1] in special_ids(tokenizer)):
        learned, ended = learned + end, True
    one = Encoded(before, learned, len(end) if ended else 0)
    if one.n_supervised == 0 or (text.strip() and one.n_supervised == one.end):
        raise ValueError(
            f"nothing of {shortened(dict(record))} would be learned: "
            + (
                "its only token has nothing before it to predict it from; give a prompt"
                if learned
                else "the completion is empty, and the tokenizer has no EOS token to end it with"
            )
        )
    return one


def check_texts(record: Mapping) -> None:
    """Raise a `ValueError` unless the record has a prompt and a completion, both texts."""
    wrong = [field for field in ("prompt", "completion") if not isinstance(record.get(field), str)]
    if wrong:
        chat = isinstance(record.get("prompt"), (list, tuple)) and isinstance(
            record.get("completion"), (list, tuple)
        )
        raise ValueError(
            f"a record needs 'messages', or the texts 'prompt' and 'completion'; {wrong} is missing or not a text. "
            + ("Of a chat, make {'messages': prompt + completion}. " if chat else "")
            + f"It has: {sorted(map(str, record))}"
        )


def encode_all(records: Iterable[Mapping], tokenizer, max_length: int) -> tuple[list[Encoded], list[int]]:
    """Encode records; one that is longer than `max_length` tokens is left out, never cut.

    Returns:
        the encoded records, and the indices of those left out.

    Raises:
        ValueError: no records, something else than records, a record that cannot be encoded (with its index), or
            none that fits.
    """
    records = records_of(records)
    if not records:
        raise ValueError("the data set is empty; there is nothing to train on")
    encoded, too_long = [], []
    for i, record in enumerate(records):
        try:
            one = encode(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"record {i}: {error}") from error.__cause__
        if len(one) > max_length:
            too_long.append(i)
        else:
            encoded.append(one)
    if not encoded:
        raise ValueError(
            f"all {len(records)} records are longer than max_length={max_length} tokens; raise max_length"
        )
    return encoded, too_long


def fingerprint(examples: list[Encoded]) -> str:
    """A short hash of encoded data: a run resumes only on the data that it started with."""
    text = json.dumps([[e.prompt, e.completion] for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
