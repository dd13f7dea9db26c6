"""Many adapters in pictures: rows sorted into segments, requests that join and leave, what a step costs, evidence."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.lab.plots import COLOURS, canvas, finish

SHADES = (
    "#08306b",
    COLOURS["lora"],
    "#9ecae1",
    "#c6dbef",
)  # of adapters: one hue, since they are one concept


def shade_of(name: str | None, names: Sequence[str]) -> str:
    """The colour of an adapter, one of `names`; grey for the base."""
    return COLOURS["base"] if name is None else SHADES[list(names).index(name) % len(SHADES)]


def ink_on(colour: str) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else "white"


def batch_picture(
    rows: Sequence[str | None],
    order: Sequence[int],
    starts: Sequence[int],
    names: Sequence[str],
    tenants: Sequence[str] = (),
) -> Figure:
    """Rows as they came, and the same rows sorted into one segment for each adapter.

    Args:
        rows: the adapter of each row, or None.
        order, starts, names: what sorting them gave; see `labkit.serving.segments.sort_rows`.
        tenants: in the order of their colours; by default that of `names`.
    """
    figure, axes = canvas(width=7.2, height=0.31 * len(rows) + 0.9)
    total = len(rows)

    def box(x: float, place: int, row: int) -> None:
        colour = shade_of(rows[row], tenants or names)
        axes.barh(total - 1 - place, 2.0, left=x, height=0.86, color=colour, edgecolor="white")
        label = f"row {row} · {rows[row] or 'base'}"
        at = (x + 1, total - 1 - place)
        axes.text(*at, label, ha="center", va="center", fontsize=9, color=ink_on(colour))

    for row in range(total):
        box(0, row, row)
    for place, row in enumerate(order):
        box(3.2, place, row)
        axes.plot([2.05, 3.15], [total - 1 - row, total - 1 - place], color=COLOURS["control"], linewidth=1)
    for name, start, stop in zip(names, starts, starts[1:]):
        middle = total - 1 - (start + stop - 1) / 2
        words = f"rows[{start}:{stop}] += s · (x Aᵀ) Bᵀ of {name}"
        axes.text(5.35, middle, words, va="center", fontsize=9.5)
        axes.plot(
            [5.27, 5.27], [total - start - 0.6, total - stop - 0.4], color=COLOURS["full"], linewidth=1.5
        )
    if len(order) < total:
        words = "base rows: in no segment"
        axes.text(5.35, (total - len(order) - 1) / 2, words, va="center", fontsize=9.5, color=COLOURS["base"])
    axes.set_xlim(-0.1, 8.6)
    axes.axis("off")
    axes.set_title("as they came        →        sorted: one product pair for each segment", loc="left")
    return figure


class Span(NamedTuple):
    """A request in steps of the engine: submitted, first token, end; its adapter, or None; and its tokens."""

    adapter: str | None
    submitted: int
    first: int
    end: int
    tokens: int


def schedule_picture(spans: Sequence[Span], names: Sequence[str], title: str) -> Figure:
    """Requests over the steps of an engine: a thin line while one waits, a bar while it is written.

    Args:
        spans: in the order in which they came.
        names: of the adapters, in the order of their colours.
        title: of the figure.
    """
    figure, axes = canvas(width=7.2, height=0.21 * len(spans) + 1.1)
    for row, span in enumerate(spans):
        colour = shade_of(span.adapter, names)
        axes.plot([span.submitted, span.first], [row, row], color=COLOURS["control"], linewidth=1.2)
        axes.barh(row, span.end - span.first + 1, left=span.first - 0.5, height=0.8, color=colour)
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axes.annotate(span.adapter or "base", (span.end + 0.5, row), color=COLOURS["full"], **beside)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlim(-1, 1.14 * max(span.end for span in spans))
    finish(axes, title, "step of the engine", "requests, in the order they came")
    return figure


def cost_curves(
    axes: Axes,
    measured: Mapping[int, Mapping[int, float]],
    predicted: Mapping[int, Mapping[int, float]],
    title: str,
) -> None:
    """What a step takes with n distinct adapters, over the base alone: points as measured, lines by the formula.

    Args:
        axes: where to draw.
        measured, predicted: {rows of the batch: {n: seconds}}; n = 0 is the base alone, and both are divided by it.
        title: of the figure.
    """
    looks = dict(
        zip(
            sorted(measured),
            ((COLOURS["control"], "v"), ("#9ecae1", "s"), (COLOURS["lora"], "o"), ("#08306b", "D")),
        )
    )
    counts = sorted({n for by_n in measured.values() for n in by_n})
    where = {n: i for i, n in enumerate(counts)}
    for batch, by_n in sorted(measured.items()):
        colour, mark = looks[batch]
        line = sorted(predicted[batch])
        axes.plot(
            [where[n] for n in line], [predicted[batch][n] / predicted[batch][0] for n in line], color=colour
        )
        axes.plot(
            [where[n] for n in sorted(by_n)], [by_n[n] / by_n[0] for n in sorted(by_n)], mark, color=colour
        )
        last = max(by_n)
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 9.5}
        axes.annotate(f"b = {batch}", (where[last], by_n[last] / by_n[0]), **beside)
    axes.axhline(1, color=COLOURS["base"], linewidth=0.8)
    axes.set_xticks(range(len(counts)), [str(n) for n in counts])
    axes.margins(x=0.1)
    finish(axes, title, "distinct adapters in the batch", "time of a step / base alone")


def evidence_picture(paths: Mapping[str, Sequence[float]], enough: float, title: str) -> Figure:
    """How evidence grows with requests, up to the threshold at which a trial ends.

    Args:
        paths: {name: the evidence after each request}; at 1 it says nothing.
        enough: the threshold.
        title: of the figure.
    """
    figure, axes = canvas(width=7.0, height=3.0)
    looks = {"worse": (COLOURS["qlora"], "-"), "better": (COLOURS["lora"], "--")}
    for name, path in paths.items():
        colour, style = looks.get(name, (COLOURS["full"], "-"))
        axes.plot(range(1, len(path) + 1), path, style, color=colour, linewidth=2)
        beside = {"xytext": (5, -9), "textcoords": "offset points", "va": "center", "color": colour}
        axes.annotate(f"it is {name}", (len(path), path[-1]), **beside)
    axes.axhline(enough, color=COLOURS["full"], linewidth=1)
    axes.text(1, enough * 1.15, f"{enough:g}: enough, at α = {1 / enough:g}", fontsize=9.5)
    axes.set_yscale("log")
    axes.margins(x=0.14, y=0.15)
    finish(axes, title, "requests", "evidence")
    return figure
