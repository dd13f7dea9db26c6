"""Several ranks in pictures: what each holds, what crosses the wire, where a plan and a measurement part, who ran when."""

from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.lab.figures.bill import LOOK
from labkit.lab.plots import COLOURS, STYLE, canvas, finish
from labkit.memory.ledger import Ledger

KEPT = (
    "weights",
    "constants",
    "lora",
    "gradients",
    "optimizer",
)  # of a ledger: what a rank has between steps


def rank_bars(ways: Mapping[str, Mapping[str, Ledger]], ranks: int = 2) -> Figure:
    """What each rank keeps, a panel for each model, a pair of bars for each way to share: whole on both, or divided.

    Args:
        ways: {title of the panel: {way: the ledger of a rank}}.
        ranks: how many bars stand for a way.
    """
    plt.rcParams.update(STYLE)
    figure, panels = plt.subplots(
        1, len(ways), figsize=(3.3 * len(ways), 3.3), layout="constrained", squeeze=False
    )
    for axes, (title, ledgers) in zip(panels[0], ways.items()):
        for n, (_, ledger) in enumerate(ledgers.items()):
            for rank in range(ranks):
                x, start = n + (rank - (ranks - 1) / 2) * 0.36, 0.0
                for part in KEPT:
                    height = ledger[part] / 1e9
                    colour, hatch = LOOK[part]
                    axes.bar(
                        x,
                        height,
                        0.32,
                        bottom=start,
                        color=colour,
                        hatch=hatch,
                        edgecolor="white",
                        label=part,
                    )
                    start += height
                if rank == ranks - 1:
                    axes.text(
                        n, start, f"{start:.3g}", ha="center", va="bottom", fontsize=10, fontweight="bold"
                    )
        axes.set_xticks(range(len(ledgers)), list(ledgers), fontsize=10)
        axes.margins(y=0.1)
        finish(axes, title, "", "GB on a rank, between steps")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(
        unique.values(), unique, loc="outside lower center", ncols=len(unique), frameon=False, fontsize=9.5
    )
    return figure


def wire_bars(measured: Mapping[str, int], planned: Mapping[str, int], title: str) -> Axes:
    """Bytes on the wire in a step: counted as bars, the formula as a line in each.

    Args:
        measured, planned: {what: bytes of all ranks}, with the same keys.
        title: of the figure.
    """
    _, axes = canvas(width=7.4, height=0.46 * len(measured) + 1.2)
    for row, (name, nbytes) in enumerate(measured.items()):
        axes.barh(row, nbytes / 1e6, color=COLOURS["lora"], height=0.62)
        axes.plot([planned[name] / 1e6] * 2, [row - 0.42, row + 0.42], color=COLOURS["full"], linewidth=2.5)
        axes.text(nbytes / 1e6 * 1.06, row, f"{nbytes:,} B", va="center", fontsize=10)
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(measured.values()) / 4e6, max(measured.values()) / 1e6 * 8)
    axes.xaxis.set_major_formatter("{x:g}")
    finish(axes, title, "MB per step, all ranks (line: formula)", "")
    return axes


def rank_curves(
    peaks: Mapping[str, Mapping[int, float]],
    title: str,
    cards: Sequence[float] = (24, 80),
    colours: Sequence[str] = (),
) -> Axes:
    """Peak of a rank over the number of ranks, both on logarithmic axes, beside the memory of cards.

    Args:
        peaks: {name: {ranks: GB}}; the name stands at the last point.
        title: of the figure.
        cards: GB.
        colours: one for each curve; by default those of the course in turn.
    """
    _, axes = canvas(width=7.6, height=3.8)
    turn = [COLOURS[name] for name in ("qlora", "lora", "nf4", "full", "optimizer")]
    for (name, curve), colour in zip(peaks.items(), [*colours, *turn[len(colours) :]]):
        ranks, sizes = zip(*sorted(curve.items()))
        axes.plot(ranks, sizes, "o-", color=colour, markersize=4)
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 10}
        axes.annotate(name, (ranks[-1], sizes[-1]), color=colour, **beside)
    counts = sorted({n for curve in peaks.values() for n in curve})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xlim(counts[0] * 0.9, counts[-1] * 4)
    ticks = [
        t
        for t in (2, 4, 8, 16, 32, 64, 128, 256, 512)
        if t <= 1.5 * max(max(c.values()) for c in peaks.values())
    ]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    for card in cards:
        axes.axhline(card, color=COLOURS["base"], linestyle=":", linewidth=1.2)
        axes.text(counts[0] * 0.92, card * 1.03, f"{card:g} GB card", fontsize=9, color="#555555")
    finish(axes, title, "ranks", "GB at the peak of a rank")
    return axes


def gap_bars(
    rows: Mapping[str, Sequence[tuple[str, float, str]]], published: Mapping[str, float], title: str
) -> Axes:
    """A plan, and what may lie between it and a published figure: a bar for each case, made of (name, GB, kind).

    Args:
        rows: {case: [(what, GB, "plan", "fact" or "guess"), …]}, from left to right.
        published: {case: GB}, drawn as a line.
        title: of the figure.
    """
    look = {
        "plan": (COLOURS["base"], ""),
        "fact": (COLOURS["lora"], "//"),
        "guess": (COLOURS["gold"], ".."),
        "left": ("#ffffff", ""),
    }
    _, axes = canvas(width=8.2, height=0.85 * len(rows) + 1.3)
    for y, (case, parts) in enumerate(rows.items()):
        start = 0.0
        for _, size, kind in [*parts, ("", published[case] - sum(size for _, size, _ in parts), "left")]:
            colour, hatch = look[kind]
            axes.barh(
                y, size, left=start, color=colour, hatch=hatch, edgecolor="#555555", height=0.6, linewidth=0.6
            )
            start += size
        by_kind = {kind: sum(size for _, size, k in parts if k == kind) for kind in look}
        by_kind["left"] = published[case] - sum(by_kind.values())
        start = 0.0
        for kind, size in by_kind.items():
            if size:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.88}
                place = {"fact": (y - 0.32, "bottom"), "guess": (y + 0.32, "top")}.get(kind, (y, "center"))
                x = start + size / 2
                axes.text(x, place[0], f"{size:.1f}", ha="center", va=place[1], fontsize=9.5, bbox=box)
            start += size
        axes.plot([published[case]] * 2, [y - 0.42, y + 0.42], color=COLOURS["full"], linewidth=3)
        axes.text(published[case] + 0.4, y, f"{published[case]:g} GB published", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlim(0, max(published.values()) * 1.3)
    axes.invert_yaxis()
    words = {
        "plan": "our plan",
        "fact": "in their set-up, computed",
        "guess": "a guess",
        "left": "not accounted for",
    }
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=c, hatch=h, edgecolor="#555555") for c, h in look.values()
    ]
    axes.figure.legend(
        handles, words.values(), loc="outside lower center", ncols=4, frameon=False, fontsize=9.5
    )
    finish(axes, title, "GB on each of 2 cards", "")
    return axes


def worker_spans(sweeps: Mapping[str, Sequence[Sequence[float]]], workers: int = 2) -> Figure:
    """When worker processes of a sweep lived, one panel a sweep, a row for each that ran beside others; a cross: killed.

    Args:
        sweeps: {title: [[first second, last second, killed?], …]}.
        workers: rows.
    """
    plt.rcParams.update(STYLE)
    figure, panels = plt.subplots(
        len(sweeps), 1, figsize=(7.6, 1.35 * len(sweeps) + 0.6), layout="constrained", squeeze=False
    )
    for axes, (title, spans) in zip(panels[:, 0], sweeps.items()):
        free = [0.0] * workers
        for first, last, killed in sorted(spans, key=lambda span: span[0]):
            row = min(range(workers), key=lambda n: (free[n] > first, free[n]))
            free[row] = last
            colour = COLOURS["qlora"] if killed else COLOURS["lora"]
            axes.barh(row, max(last - first, 0.4), left=first, height=0.6, color=colour, edgecolor="white")
            if killed:
                axes.plot(last, row, "X", color=COLOURS["full"], markersize=9)
                axes.annotate("killed", (last, row), xytext=(0, 17), textcoords="offset points", fontsize=10)
        axes.set_yticks(range(workers), [f"worker {n + 1}" for n in range(workers)])
        axes.set_ylim(-0.5, workers + 0.1)
        axes.set_xlim(left=0)
        finish(axes, title, "", "")
    panels[-1, 0].set_xlabel("seconds")
    return figure
