"""From text to token ids: one way for training, measuring, generating and virtual tokens.

    prompt       what the tokenizer makes of the prompt alone, as whoever serves the model will: with the BOS token
                 that it puts before a text, and without what it puts after one
    completion   what the tokens of the joined text, prompt + completion, have after those of the prompt

The completion by itself would get other tokens: Llama 2's tokenizer puts a space before every text, WordPiece
marks what continues a word.

*A token across the border*: "Package: " and "A" join to "Package", ":", " A", but a model that is served
"Package: " has to go on from ":", " ". So the prompt keeps its own tokens, and the completion begins anew after
them. Joined tokens would teach a context that generation never has. If the completion begins with the space
instead, nothing crosses.
"""

# what a completion is shown behind, to learn its tokens in the middle of a text
NEIGHBOURS = ("", "\n", " ", ".", "a", "0")


class ChatPrompt(str):
    """A prompt that a chat template wrote whole: with its own BOS token, or on purpose without one."""


def ids_of(text: str, tokenizer) -> list[int]:
    """The tokens of `text`, and nothing around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_of(ids: list[int], tokenizer) -> str:
    """The text of these tokens, special ones included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def tokens_around(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after any text: often a BOS token, or nothing."""
    inner, whole = ids_of("a", tokenizer), list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []


def end_ids(tokenizer) -> list[int]:
    """What ends a text: what the tokenizer puts there, or its EOS token; [] if it has none."""
    _, after = tokens_around(tokenizer)
    eos = tokenizer.eos_token_id
    return after or ([] if eos is None else [eos])


def special_ids(tokenizer) -> set[int]:
    """Tokens that stand for themselves, as `<|im_end|>`: no text is merged or cut into them."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}


def prompt_ids(prompt: str, tokenizer) -> list[int]:
    """The tokens of a prompt, in training and when the model generates; a BOS token in the text is not doubled."""
    ids = ids_of(prompt, tokenizer)
    if isinstance(prompt, ChatPrompt):
        return ids
    before, _ = tokens_around(tokenizer)
    return ids if ids[: len(before)] == before else before + ids


def completion_ids(prompt: str, completion: str, tokenizer) -> list[int]:
    """The tokens of a completion behind those of its prompt; see the module docstring.

    Raises:
        ValueError: the tokenizer has no token for a part of it, or cannot begin it after the prompt.
    """
    start, joined = ids_of(prompt, tokenizer), ids_of(prompt + completion, tokenizer)
    ids = (
        joined[len(start) :]
        if joined[: len(start)] == start
        else continued(start, completion, joined, tokenizer)
    )
    if not ids and completion:
        raise ValueError(
            f"the tokenizer makes nothing of the completion {completion[:60]!r}; leave the record out"
        )
    unknown = tokenizer.unk_token_id
    if unknown in ids and tokenizer.unk_token not in completion:
        parts = [c for c in sorted(set(completion)) if unknown in ids_of(c, tokenizer)]
        raise ValueError(
            f"the tokenizer has no token for {''.join(parts) or 'a part'!r} in the completion {completion[:60]!r}, so "
            f"{tokenizer.unk_token!r} would be learned in its place; replace it, or leave the record out"
        )
    return ids


def continued(start: list[int], completion: str, joined: list[int], tokenizer) -> list[int]:
    """The tokens of `completion` where no token of the joined text begins at the border.

    They are taken from the completion behind a neighbour that it does not merge with; behind the prompt, they must
    be the joined text again.
    """
    whole = text_of(joined, tokenizer)
    for neighbour in NEIGHBOURS:
        first, both = ids_of(neighbour, tokenizer), ids_of(neighbour + completion, tokenizer)
        ids = both[len(first) :]
        if both[: len(first)] == first and text_of(start + ids, tokenizer) == whole:
            return ids
    raise ValueError(
        f"the tokenizer joins the end of the prompt and the beginning of the completion {completion[:60]!r} into one "
        "token, and cannot write them apart; let the completion begin where a word does, with the space before it"
    )
