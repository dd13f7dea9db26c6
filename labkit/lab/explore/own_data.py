"""A model that was adapted to your records: what it answers, and how probable it finds what was written."""

import html
from collections.abc import Sequence

from IPython.display import HTML, display
from matplotlib import pyplot as plt

from labkit.data.encoding import encode
from labkit.data.own.shingles import asked_and_answered
from labkit.lab.explore.panel import item_and_strength, panel
from labkit.lab.explore.tickets import token_probabilities
from labkit.lab.figures.own_data import written_answer
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import canvas
from labkit.lora.merging import adapter_strength

SHOWN = 600  # characters of a text in a table


def answers_beside(record: dict, answers: dict[str, str]) -> HTML:
    """What a record asks, the answer that was written, and those of models, one below the other.

    Args:
        record: as for `labkit.train`.
        answers: {who: text}.
    """
    asked, written = asked_and_answered(record)
    rows = "".join(
        f"<tr><td style='text-align:left'><b>{html.escape(who)}</b></td>"
        f"<td style='text-align:left;max-width:48em'>{broken(text)}</td></tr>"
        for who, text in {"asked": asked, "written": written, **answers}.items()
    )
    return HTML(f"<table>{rows}</table>")


def broken(text: str) -> str:
    """A text as HTML, with its line breaks, and cut if it is long."""
    shown = text.strip()
    shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + " …"
    return html.escape(shown).replace("\n", "<br>") or "<i>nothing</i>"


def record_explorer(model, tokenizer, records: Sequence[dict]) -> None:
    """Pick a held-out record, turn the adapter up and down, and see how probable each token of the written answer is.

    Args:
        model: the adapted model, not merged.
        tokenizer: its tokenizer.
        records: held out from training.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("there are no records to show")

    def draw(record: int, strength: float) -> None:
        chosen = records[record]
        example = encode(chosen, tokenizer)
        with adapter_strength(model, 0):
            before = token_probabilities(model, example)
        with adapter_strength(model, strength):
            after = token_probabilities(model, example)
        pieces = [tokenizer.decode([token]) for token in example.completion[-len(before) :]]
        asked = " ".join(asked_and_answered(chosen)[0].split())
        asked = asked if len(asked) <= 70 else asked[:69] + "…"
        figure, axes = canvas(width=9, height=3.1)
        title = f"“{asked}”\nthe written answer: base grey, adapter × {strength:g} orange".replace("$", r"\$")
        written_answer(pieces, before, after, title, axes)
        display(figure)
        plt.close(figure)

    controls = item_and_strength("record", len(records), "record") if is_interactive() else {}
    panel(draw, controls, [{"record": 0, "strength": 1.0}])
