"""Choose what a trainer is told, and see which tokens of a record it learns."""

from collections.abc import Callable, Sequence

from IPython.display import display
from matplotlib import pyplot as plt

from labkit.data.batches import IGNORE
from labkit.lab.explore.panel import SLOW, WIDE, panel
from labkit.lab.explore.supervision import SPACES
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas

WIDTH = 92  # letters in a line of the picture
LONGEST = 24  # letters of a token


def lines_of(texts: Sequence[str]) -> list[list[int]]:
    """The places of the tokens in each line of the picture, so that no line has more than `WIDTH` letters."""
    lines: list[list[int]] = [[]]
    used = 0
    for place, text in enumerate(texts):
        if used + len(text) > WIDTH and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append(place)
        used += len(text)
    return lines


def labels_explorer(
    prepare: Callable[[int, str, int], tuple[Sequence[int], Sequence[int]]],
    decode: Callable[[int], str],
    count: int,
    columns: Sequence[str],
    longest: int,
    static: Sequence[dict],
) -> None:
    """Choose a record, the columns it comes in and `max_length`: its tokens are drawn, those that are learned on colour.

    Args:
        prepare: (record, columns, max_length) to the ids and the labels of the row that the trainer makes of it.
        decode: an id to its text.
        count: records to choose from.
        columns: names of the forms.
        longest: the largest max_length to offer.
        static: what to show headless: {"record": …, "columns": …, "max_length": …}.
    """

    def draw(record: int, columns: str, max_length: int) -> None:
        ids, labels = prepare(record, columns, max_length)
        texts = [decode(one).translate(SPACES)[:LONGEST] for one in ids]
        lines, learned = lines_of(texts), sum(label != IGNORE for label in labels)
        figure, axes = canvas(width=8.6, height=0.23 * len(lines) + 0.5)
        for row, places in enumerate(lines):
            left = 0
            for place in places:
                kept = labels[place] != IGNORE
                box = {"facecolor": COLOURS["qlora"] if kept else "white", "alpha": 0.45 if kept else 1.0}
                axes.barh(
                    row, len(texts[place]), 0.86, left, edgecolor=COLOURS["control"], linewidth=0.4, **box
                )
                look = {"family": "monospace", "fontsize": 8, "va": "center", "parse_math": False}
                axes.text(left, row, texts[place], weight="bold" if kept else "normal", **look)
                left += len(texts[place])
        axes.set(xlim=(0, WIDTH), ylim=(len(lines) - 0.4, -0.6))
        axes.axis("off")
        axes.set_title(
            f"{columns}, max_length {max_length}: {learned} of {len(ids)} tokens are learned", loc="left"
        )
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, IntSlider

        controls = {
            "record": IntSlider(0, 0, count - 1, description="record", **SLOW),
            "columns": Dropdown(options=list(columns), description="columns", **WIDE),
            "max_length": IntSlider(longest, 8, longest, description="max_length", **SLOW),
        }
    panel(draw, controls, [dict(values) for values in static])
