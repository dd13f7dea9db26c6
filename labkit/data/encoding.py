"""From a record to token ids.

A record is a dict, either a chat, whose last message is the assistant's answer to learn,

    {"messages": [{"role": "system", "content": …}, {"role": "user", "content": …},
                  {"role": "assistant", "content": …}]}

or plain text: `{"prompt": "…", "completion": "…"}`. Only the completion is *supervised*: the loss is taken on
its tokens, and the prompt is context. A model that is trained on its prompts too spends most of its gradient
on learning to write customers' messages, which nobody asked it to do.
"""

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Encoded:
    """One record as token ids: the prompt, and the completion, which alone is supervised."""

    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def encode(record: dict, tokenizer) -> Encoded:
    """Token ids of a record. Prompt and completion are tokenized separately, as when the model generates.

    Raises:
        ValueError: the record is neither a chat that ends with the assistant nor a prompt with a completion.
    """
    if "messages" in record:
        prompt, completion = split_chat(record["messages"], tokenizer)
    else:
        missing = [field for field in ("prompt", "completion") if not isinstance(record.get(field), str)]
        if missing:
            raise ValueError(
                f"a record needs 'messages', or the texts 'prompt' and 'completion'; {missing} is missing or "
                f"not a text. It has: {sorted(record)}"
            )
        prompt, completion = record["prompt"], record["completion"] + (tokenizer.eos_token or "")
    if not completion:
        raise ValueError(f"the completion is empty, so there is nothing to learn from: {record}")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
    return Encoded(*ids)


def split_chat(messages: list[dict], tokenizer) -> tuple[str, str]:
    """The chat template's text up to the assistant's last answer, and that answer with its end mark."""
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError(
            "a chat record must end with the assistant's message; its roles are "
            f"{[m.get('role') for m in messages]}"
        )
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template does not write the prompt unchanged before the answer; use prompt/completion"
        )
    return prompt, whole[len(prompt) :].rstrip()  # what follows the end mark is not worth learning


def encode_all(records: list[dict], tokenizer, max_length: int) -> tuple[list[Encoded], list[int]]:
    """Encode records; one that is longer than `max_length` tokens is left out, never cut.

    Returns:
        the encoded records, and the indices of those left out.

    Raises:
        ValueError: no records, a record that cannot be encoded (with its index), or none that fits.
    """
    if not records:
        raise ValueError("the data set is empty; there is nothing to train on")
    encoded, too_long = [], []
    for i, record in enumerate(records):
        try:
            one = encode(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"record {i}: {error}") from None
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
