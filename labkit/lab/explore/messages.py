"""A box to type a message into: what the base makes of it, what the adapted model makes of it, and how surely."""

import html
import json
from collections.abc import Callable, Mapping, Sequence

from IPython.display import HTML, display
from torch import nn

from labkit.data.tickets import TICKET_CLASSES, ticket_chat
from labkit.data.tokens import prompt_ids
from labkit.lab.explore.answers import Answer, read_answer
from labkit.lab.explore.background import between_steps
from labkit.lab.interactive import is_interactive
from labkit.lora.merging import adapter_strength
from labkit.training.evaluate import chat_prompts
from labkit.training.limits import context_of

EXAMPLES = (
    "My neighbour got her Tarn Kettle at once. Mine, order 7-4410, has still not come. Ana Ruiz",
    "Not broken after all, I had it upside down! But can the Tarn Kettle go on a gas stove?",
)
OWN = "(a message of your own)"
LEAST = 0.005  # what is less is written as <1 %
CELL = "text-align:left;vertical-align:top;line-height:1.5;padding:3px 18px 3px 0"


def ticket_record(message: str) -> dict:
    """The chat in which a ticket's message is asked about."""
    return {"messages": ticket_chat({"message": message, "label": {}})["messages"][:-1]}


def message_box(
    model: nn.Module,
    tokenizer,
    tickets: Sequence[Mapping] = (),
    classes: Mapping[str, Sequence[str]] = TICKET_CLASSES,
    to_record: Callable[[str], dict] = ticket_record,
    max_new_tokens: int = 64,
    max_length: int = 512,
) -> None:
    """Type a message, or pick one with a gold answer; press Answer, and see base and adapted model answer it.

    Each token is coloured by its probability, and each field of a JSON answer has that of its value; a field in
    `classes`, those of all its allowed values. Nothing is sampled: an answer is the likeliest token, again and again.
    A training panel that has the same model is made to stand between two steps meanwhile. Headless, two messages are
    answered.

    Args:
        model: the adapted model, not merged. The base is the same with `adapter_strength(model, 0)`.
        tokenizer: its tokenizer.
        tickets: to pick from; each with its "message", and the gold answer as "label".
        classes: {field: its allowed values}; {} if no field has few.
        to_record: makes a record of a message, without an answer: a chat, or {"prompt": …}.
        max_new_tokens: of an answer.
        max_length: tokens of message and answer together, at most.
    """
    box = MessageBox(model, tokenizer, tickets, classes, to_record, max_new_tokens, max_length)
    if is_interactive():
        box.show()
        return
    messages = [ticket["message"] for ticket in tickets[:2]] or EXAMPLES
    for message in messages:
        display(HTML("".join(box.answer(message).values())))


class MessageBox:
    """What `message_box` shows; `answer` makes its pages."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        tickets: Sequence[Mapping] = (),
        classes: Mapping[str, Sequence[str]] = TICKET_CLASSES,
        to_record: Callable[[str], dict] = ticket_record,
        max_new_tokens: int = 64,
        max_length: int = 512,
    ):
        self.model, self.tokenizer, self.classes, self.to_record = model, tokenizer, classes, to_record
        self.max_new_tokens, self.max_length = max_new_tokens, max_length
        self.gold = {ticket["message"]: ticket.get("label") for ticket in tickets}

    def prompt_of(self, message: str) -> str:
        """The prompt for a message.

        Raises:
            ValueError: there is no message, or it is too long.
        """
        if not message.strip():
            raise ValueError("there is no message yet; type one, or pick one from the list")
        record = self.to_record(message.strip())
        prompt = record["prompt"] if "prompt" in record else chat_prompts([record], self.tokenizer)[0]
        context = context_of(self.model)
        room = min(self.max_length, self.max_length if context is None else context) - self.max_new_tokens
        tokens = len(prompt_ids(prompt, self.tokenizer))
        if tokens > room:
            raise ValueError(
                f"the message is too long: {tokens} tokens with its instruction, and at most {room} leave room for "
                f"an answer of {self.max_new_tokens}; shorten it"
            )
        return prompt

    def read(self, message: str, strength: float = 1.0) -> Answer:
        """The answer to a message, with the adapter at this strength: 0 is the base.

        Raises:
            ValueError: there is no message, it is too long, or there is no adapter to turn down.
        """
        prompt = self.prompt_of(message)
        with between_steps(self.model), adapter_strength(self.model, strength):
            return read_answer(self.model, self.tokenizer, prompt, self.classes, self.max_new_tokens)

    def answer(
        self, message: str, show: Callable[[dict[str, str]], None] = lambda parts: None
    ) -> dict[str, str]:
        """The parts of the page that answers a message, as HTML; `show` is called as soon as there is another."""
        gold = self.gold.get(message)
        parts = {"message": f"<p style='max-width:52em'>“{html.escape(message)}”</p>"}
        answers: dict[str, Answer] = {}
        for who, strength in (("adapted", 1.0), ("base", 0.0)):
            answers[who] = self.read(message, strength)
            parts["fields"] = fields_table(answers, gold)
            parts[who] = tokens_line(who, answers[who])
            show(parts)
        return parts

    def show(self) -> None:
        """Make the widgets and display them."""
        from ipywidgets import HTML as Page
        from ipywidgets import Button, Dropdown, HBox, Layout, Textarea, VBox

        wide = Layout(width="100%", max_width="56em")
        options = [(OWN, "")] + [(f"{n}: {message[:70]}", message) for n, message in enumerate(self.gold)]
        chosen = Dropdown(options=options, layout=wide)
        text = Textarea(placeholder="Type a message here", rows=3, layout=wide)
        button = Button(description="Answer", icon="comment", layout=Layout(width="8em"))
        page, status = Page(layout=wide), Page()

        def pick(change: dict) -> None:
            if change["new"]:
                text.value = change["new"]

        def press(_) -> None:
            button.disabled, page.value = True, ""
            status.value = "Answering: the adapted model first, then the base …"
            try:
                self.answer(text.value, lambda parts: setattr(page, "value", "".join(parts.values())))
                status.value = ""
            except ValueError as error:
                status.value = html.escape(str(error))
            except Exception as error:  # the button would swallow it
                status.value = html.escape(f"{type(error).__name__}: {error}")
            finally:
                button.disabled = False

        chosen.observe(pick, "value")
        button.on_click(press)
        pickers = [chosen] if self.gold else []
        display(VBox([*pickers, text, HBox([button, status]), page]))


def fields_table(answers: Mapping[str, Answer], gold: Mapping | None) -> str:
    """A row per field: its value and probability in each answer, and the gold value; a wrong value is underlined."""
    names = list(dict.fromkeys([*(gold or {}), *(n for one in answers.values() for n in one.fields or {})]))
    heads = ["", *answers, *(["gold"] if gold is not None else [])]
    head = "".join(f"<th style='{CELL}'>{html.escape(name)}</th>" for name in heads)
    rows = ""
    for i, name in enumerate(names):
        cells = f"<td style='{CELL}'><b>{html.escape(name)}</b></td>"
        for one in answers.values():
            if one.fields is not None:
                cells += field_cell(one, name, gold)
            elif i == 0:
                cells += (
                    f"<td rowspan='{len(names)}' style='{CELL}'><i>the answer is not a JSON object</i></td>"
                )
        if gold is not None:
            cells += f"<td style='{CELL}'>{written(gold[name]) if name in gold else ''}</td>"
        rows += f"<tr>{cells}</tr>"
    if not names:
        return "<p><i>No answer is a JSON object, so there are no fields.</i></p>"
    return f"<table><tr>{head}</tr>{rows}</table>"


def field_cell(answer: Answer, name: str, gold: Mapping | None) -> str:
    """The value of a field with its probability, or those of all allowed values."""
    one = (answer.fields or {}).get(name)
    if one is None:
        return f"<td style='{CELL}'><i>missing</i></td>"
    wrong = gold is not None and json.dumps(one.value) != json.dumps(gold.get(name))
    mark = "text-decoration:underline wavy;font-weight:bold" if wrong else ""
    chance = (
        f"<span style='background:{shade(one.probability)};padding:1px 4px'>{percent(one.probability)}</span>"
    )
    lines = f"<span style='{mark}'>{written(one.value)}</span> {chance}"
    others = [f"{html.escape(str(v))} {percent(p)}" for v, p in one.choices.items() if v != one.value]
    if others:
        rest = 1 - sum(one.choices.values())
        others += [f"something else {percent(rest)}"] if rest >= LEAST else []
        lines += f"<br><small>{' · '.join(others)}</small>"
    return f"<td style='{CELL}'>{lines}</td>"


def tokens_line(who: str, answer: Answer) -> str:
    """The tokens of an answer, each over its probability; the less sure, the darker."""
    boxes = ""
    for piece, chance in zip(answer.pieces, answer.probabilities):
        shown = html.escape(piece.replace("\n", "⏎")).replace(" ", "␣") or "·"
        boxes += (
            f"<span style='display:inline-block;margin:1px;padding:1px 3px;background:{shade(chance)};border:1px solid #ccc;"
            f"text-align:center'><code style='background:none'>{shown}</code><br><small>{percent(chance)}</small></span>"
        )
    return f"<p style='margin:8px 0 2px'><b>{html.escape(who)}</b>, token by token</p><div>{boxes}</div>"


def shade(chance: float) -> str:
    """The colour behind a probability: none where the model is sure."""
    return f"rgba(217,95,2,{0.85 * (1 - chance):.2f})"


def written(value) -> str:
    return html.escape(json.dumps(value, ensure_ascii=False))


def percent(chance: float) -> str:
    """A probability for reading, as HTML.

    >>> percent(0.9996), percent(0.42), percent(0.0004)
    ('100 %', '42 %', '&lt;1 %')
    """
    return "&lt;1 %" if chance < LEAST else f"{chance:.0%}".replace("%", " %")
