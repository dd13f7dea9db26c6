"""Support messages and the JSON to extract from them: the task of the QLoRA lesson."""

import json

from labkit.data.splits import rows

TICKET_FIELDS = ("customer", "product", "category", "order", "urgency", "contact")
TICKET_CLASSES = {
    "category": ("delivery", "fault", "billing", "return", "question"),
    "urgency": ("high", "normal", "low"),
    "contact": ("first", "again"),
}
TICKET_TOKENS = 64  # of an answer, at most; the longest right one to a test ticket has fewer
TICKET_INSTRUCTION = "Ticket to JSON."


def load_tickets(split: str) -> list[dict]:
    """Support messages with the JSON to extract: `{"id", "message", "label", "tags"}`; see
    data/tickets/README.md.

    Args:
        split: "train", "validation" or "test". Test has products, names and phrasings that train never shows.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: the data folder is missing.
    """
    return rows("tickets", split)


def ticket_answer(label: dict) -> str:
    """The JSON to learn, without spaces: one after each colon and comma would be ten tokens more than 38."""
    return json.dumps(label, ensure_ascii=False, separators=(",", ":"))


def ticket_chat(ticket: dict) -> dict:
    """A ticket as a chat record: instruction, message, and the label as the JSON answer."""
    return {
        "messages": [
            {"role": "system", "content": TICKET_INSTRUCTION},
            {"role": "user", "content": ticket["message"]},
            {"role": "assistant", "content": ticket_answer(ticket["label"])},
        ]
    }
