"""How the prompts of a file are posed to a model: as chats where it has a template, else as plain text with a border.

A file holds prompt and answer apart, "Translate: hello" and "bonjour". Joined as they are they would be one word,
"hellobonjour": something must stand between, and in generation as in training. A model that was tuned on chats is best asked as
one. Its template then marks where the answer begins, and stands before the prompt too, which matters more than it
seems: much of the attention goes to the first token whatever it is (Xiao et al. 2023, "attention sinks"), and is lost to reading it
if that is the prompt's own first word.
"""

from collections.abc import Mapping, Sequence

BORDER = "\n"


def posed(records: Sequence[Mapping], tokenizer, instruction: str = "") -> list[dict]:
    """The records as they are to be trained on and asked. Chats, and texts without a prompt, stay as they are.

    Args:
        records: of one form, as `read_records` returns them.
        tokenizer: with a chat template or without.
        instruction: one line for all records: the chats' system message, or the line before a plain prompt. "" for
            none.
    """
    is_chat_model = bool(getattr(tokenizer, "chat_template", None))
    made = []
    for record in records:
        if "messages" in record or not record["prompt"].strip():
            made.append(dict(record))
        elif is_chat_model:
            system = [{"role": "system", "content": instruction}] if instruction else []
            user = {"role": "user", "content": record["prompt"].strip()}
            answer = {"role": "assistant", "content": record["completion"].strip()}
            made.append({"messages": [*system, user, answer]})
        else:
            made.append(bordered(record, instruction))
    return made


def bordered(record: Mapping, instruction: str = "") -> dict:
    """A plain record with the instruction before its prompt, and a line break between prompt and answer.

    White space that is there already is border enough.

    >>> bordered({"prompt": "hello", "completion": "bonjour"}, "To French:")
    {'prompt': 'To French:\\nhello\\n', 'completion': 'bonjour'}
    """
    prompt, completion = record["prompt"], record["completion"]
    if completion and not (prompt[-1:].isspace() or completion[0].isspace()):
        prompt += BORDER
    return {**record, "prompt": f"{instruction}{BORDER}{prompt}" if instruction else prompt}
