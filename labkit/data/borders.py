"""What stands between a prompt and its answer, so that one ends and the other begins.

Files often hold the two apart, "Translate: hello" and "bonjour", and joined as they are they would be one word,
"hellobonjour". Training on that teaches an answer that no prompt asks for, and a tokenizer may merge the two. A chat template
writes a border of its own; plain prompts get a line break here, unless there is white space already.
"""

from collections.abc import Mapping, Sequence

BORDER = "\n"


def with_borders(records: Sequence[Mapping]) -> list[dict]:
    """The records, with a line break after every prompt that runs into its answer. Chats and plain texts stay as they are.

    >>> with_borders([{"prompt": "Translate: hello", "completion": "bonjour"}])
    [{'prompt': 'Translate: hello\\n', 'completion': 'bonjour'}]
    """
    return [
        {**record, "prompt": record["prompt"] + BORDER} if runs_on(record) else dict(record)
        for record in records
    ]


def runs_on(record: Mapping) -> bool:
    """Does the answer begin right behind the prompt's last letter or sign?"""
    if "messages" in record or not record["prompt"] or not record["completion"]:
        return False
    return not (record["prompt"][-1].isspace() or record["completion"][0].isspace())
