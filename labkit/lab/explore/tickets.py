"""A model that has learned to read tickets: its answers side by side, and how sure it is, token by token."""

import html
import json
from collections.abc import Sequence

import torch
from IPython.display import HTML, display
from matplotlib import pyplot as plt

from labkit.data.batches import collate
from labkit.data.encoding import Encoded, encode
from labkit.data.tickets import ticket_chat
from labkit.lab.explore.panel import item_and_strength, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.lora.merging import adapter_strength
from labkit.training.metrics import parse_json


@torch.no_grad()
def token_probabilities(model, example: Encoded) -> torch.Tensor:
    """The model's probability of each token of the completion, (n_completion,), given all before it."""
    device = next(model.parameters()).device
    batch = collate([example], pad_id=0).to(device)
    logits = model(input_ids=batch.ids, use_cache=False).logits[0]  # (time, vocab)
    logits = logits[len(example.prompt) - 1 : -1]  # (n_completion, vocab)
    targets = torch.tensor(example.completion, device=device)
    return logits.float().softmax(-1).gather(1, targets[:, None])[:, 0].cpu()


def answer_table(message: str, answers: dict[str, str], gold: dict) -> HTML:
    """The message, and a table with a row per answer and the gold one; wrong fields are underlined."""
    head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in ["", *gold])
    rows = ""
    for who, text in {**answers, "gold": json.dumps(gold)}.items():
        parsed = parse_json(text)
        if parsed is None:
            cells = f"<td colspan='{len(gold)}' style='text-align:left'><i>not JSON:</i> "
            cells += f"{html.escape(text[:160])}</td>"
        else:
            cells = "".join(field_cell(parsed.get(name, "(missing)"), gold[name]) for name in gold)
        rows += f"<tr><td style='text-align:left'><b>{html.escape(who)}</b></td>{cells}</tr>"
    return HTML(f"<p style='max-width:48em'>“{html.escape(message)}”</p><table><tr>{head}</tr>{rows}</table>")


def field_cell(value, gold) -> str:
    wrong = json.dumps(value) != json.dumps(gold)
    mark = "text-decoration:underline wavy;font-weight:bold;" if wrong else ""
    return f"<td style='text-align:left;{mark}'>{html.escape(json.dumps(value, ensure_ascii=False))}</td>"


def ticket_explorer(
    model, tokenizer, tickets: Sequence[dict], base_answers: Sequence[str], answers: Sequence[str]
) -> None:
    """Pick a ticket and see the base, adapted and gold answers side by side; then turn the adapter up and
    down and see, token by token, how probable it makes the gold answer. The probabilities are computed live.

    Args:
        model: the adapted model, not merged.
        tokenizer: its tokenizer.
        tickets, base_answers, answers: test tickets, and what was generated for each before and after
            training.

    Raises:
        ValueError: not one answer of each kind for every ticket.
    """
    if not len(tickets) == len(base_answers) == len(answers):
        raise ValueError(
            f"{len(tickets)} tickets with {len(base_answers)} and {len(answers)} answers; "
            "give one of each for every ticket"
        )

    def draw(ticket: int, strength: float) -> None:
        chosen = tickets[ticket]
        given = {"base": base_answers[ticket], "adapted": answers[ticket]}
        display(answer_table(chosen["message"], given, chosen["label"]))
        example = encode(ticket_chat(chosen), tokenizer)
        with adapter_strength(model, 0):
            before = token_probabilities(model, example)
        with adapter_strength(model, strength):
            after = token_probabilities(model, example)
        figure, axes = canvas(width=9, height=2.9)
        x = range(len(before))
        axes.plot(x, before, ".", color=COLOURS["base"], markersize=7)
        axes.plot(x, after, "-o", color=COLOURS["qlora"], markersize=4, linewidth=1)
        pieces = [tokenizer.decode([token]) for token in example.completion]
        labels = [repr(p)[1:-1].strip().replace("\ufffd", "·") or "␣" for p in pieces]
        axes.set_xticks(x, labels, rotation=90, fontsize=8, family="monospace")
        axes.set_ylim(-0.03, 1.05)
        axes.margins(x=0.01)
        title = f"Probability of each token of the gold answer: base grey, adapter × {strength:g} orange"
        finish(axes, title, "", "probability")
        display(figure)
        plt.close(figure)

    right = [parse_json(answer) == ticket["label"] for ticket, answer in zip(tickets, answers)]
    shown = [right.index(verdict) for verdict in (True, False) if verdict in right]  # the first of each
    static = [{"ticket": ticket, "strength": 1.0} for ticket in shown]
    controls = item_and_strength("ticket", len(tickets), "test ticket") if is_interactive() else {}
    panel(draw, controls, static)
