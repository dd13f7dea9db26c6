"""Pictures of a run on your own data: results with their intervals, and how probable a written answer is."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from labkit.lab.plots import COLOURS, canvas, finish


def result_rows(
    rows: Mapping[str, tuple[float, tuple[float, float]]],
    title: str,
    x: str,
    is_share: bool,
    axes: Axes | None = None,
) -> Axes:
    """One row for each result: a dot, its 95 % interval as a line, and the number beside it.

    Args:
        rows: {name: (value, (low, high))}; names that begin with "adapted" or "base" get the colours of the two.
        title, x: of the figure and of its axis.
        is_share: values are shares, drawn from 0 to 100 %; else losses, drawn from 0.
        axes: where to draw; default: a new figure.
    """
    if axes is None:
        _, axes = canvas(height=0.45 * len(rows) + 1.3)
    top = 1.0 if is_share else max(high for _, (_, high) in rows.values())
    for y, (name, (value, (low, high))) in enumerate(rows.items()):
        colour = COLOURS["full"]
        for start, concept in (("adapted", "qlora"), ("base", "base")):
            if name.startswith(start):
                colour = COLOURS[concept]
        axes.plot([low, high], [y, y], "-", color=colour, linewidth=3, alpha=0.45, solid_capstyle="butt")
        axes.plot(value, y, "o", color=colour, markersize=8)
        text = f"{value:.0%}" if is_share else f"{value:.2f}"
        beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "color": colour}
        axes.annotate(text, (high, y), **beside)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.01 * top, 1.12 * top)
    if is_share:
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}" if share < 1.01 else "")
    finish(axes, title, x, "")
    return axes


def written_answer(
    pieces: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    title: str,
    axes: Axes | None = None,
) -> Axes:
    """How probable each token of a written answer is: to the base grey, to the adapted model orange.

    Args:
        pieces: the text of each token.
        before, after: its probability, given all before it.
        title: of the figure.
        axes: where to draw; default: a new figure.
    """
    if axes is None:
        _, axes = canvas(width=9, height=2.9)
    x = range(len(pieces))
    axes.plot(x, before, ".", color=COLOURS["base"], markersize=7)
    axes.plot(x, after, "-o", color=COLOURS["qlora"], markersize=4, linewidth=1)
    labels = [repr(p)[1:-1].strip().replace("\ufffd", "·").replace("$", r"\$") or "␣" for p in pieces]
    axes.set_xticks(x, labels, rotation=90, fontsize=8, family="monospace")
    axes.set_ylim(-0.03, 1.05)
    axes.margins(x=0.01)
    finish(axes, title, "", "probability")
    return axes
