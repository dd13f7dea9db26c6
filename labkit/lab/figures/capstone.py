"""The ledger as a table and as bars, gates as a table, and a prompt against an adapter by labelled records."""

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from IPython.display import HTML
from matplotlib.figure import Figure

from labkit.lab.claims import SOURCES, VERDICTS
from labkit.lab.gates import Gate
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.lab.register import IN_PARTS, OPEN, GuideLine, RegisteredClaim, Ruling
from labkit.sweeps.records import mean_interval

SHADES = {  # of verdicts; the word always stands beside it
    "confirmed": COLOURS["lora"],
    "refuted": COLOURS["qlora"],
    "depends": COLOURS["gold"],
    "not seen here": COLOURS["base"],
    "not testable here": COLOURS["control"],
    IN_PARTS: COLOURS["nf4"],
    OPEN: "#ffffff",
}
CELL = "text-align:left;vertical-align:top;white-space:normal"


def titled(source: str) -> str:
    """The title of a source, without what it is: “AI Explained: LoRA, QLoRA & PEFT”."""
    return SOURCES[source].partition("”")[0] + "”"


def as_html(text: str) -> str:
    """A line of Markdown: escaped, with code and emphasis."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*([^*\s][^*]*)\*", r"<em>\1</em>", text)


def row_of(cells: Iterable[str], tag: str = "td", id: str = "") -> str:
    marked = f' id="{id}"' if id else ""
    return f"<tr{marked}>" + "".join(f'<{tag} style="{CELL}">{cell}</{tag}>' for cell in cells) + "</tr>"


def ruled(claim: RegisteredClaim, ruling: Ruling) -> tuple[str, str]:
    """The verdict of one ruling, and its evidence: what it rests on, and where it was reached."""
    path = claim.path_of(ruling)
    verdict = f"<b>{ruling.verdict}</b>" + (f"<br>{as_html(path)}" if path else "")
    rests = " · ".join([", ".join(ruling.kinds), *([as_html(ruling.sample)] if ruling.sample else [])])
    turns = f"{as_html(ruling.first)}<br>" if ruling.verdict == "depends" else ""
    link = f'<a href="{html.escape(ruling.link)}">{ruling.lesson}, {as_html(ruling.heading)}</a>'
    return verdict, f"{turns}<em>{rests}</em><br>{link}"


def register_table(claims: Sequence[RegisteredClaim]) -> HTML:
    """A row for each claim: what is said, by whom, the verdicts, what they rest on, a link, and what to do."""
    rows = [row_of(["", "what people say", "verdict", "evidence, and where", "what to do"], "th")]
    for claim in claims:
        rulings = [ruled(claim, ruling) for ruling in claim.rulings] or [
            (f"<b>{OPEN}</b>", "its lesson was not run here")
        ]
        said = f"{as_html(claim.statement)}<br><small>{'<br>'.join(map(titled, claim.said))}</small>"
        for i, (verdict, evidence) in enumerate(rulings):
            first = i == 0
            cells = [claim.number if first else "", said if first else "", verdict, evidence]
            rows.append(
                row_of([*cells, as_html(claim.do) if first else ""], id=claim.number if first else "")
            )
    return HTML(f"<table>{''.join(rows)}</table>")


def guide_table(lines: Sequence[GuideLine], claims: Sequence[RegisteredClaim]) -> HTML:
    """The decision guide: a question, what to do, and the claims that it rests on with their verdicts as they are now."""
    by_number = {claim.number: claim for claim in claims}
    rows = [row_of(["you ask", "do", "because"], "th")]
    for line in lines:
        rests = []
        for number, verdict in line.because.items():
            now = by_number[number].verdict
            changed = "" if now == verdict else f" (was {verdict}: read this line again)"
            rests.append(f'<a href="#{number}">{number}</a> {now}{changed}')
        rows.append(row_of([as_html(line.ask), as_html(line.do), "<br>".join(rests)]))
    return HTML(f"<table>{''.join(rows)}</table>")


def gate_table(walks: Mapping[str, Sequence[Gate]]) -> HTML:
    """What each gate said, for each of what was led through them."""
    rows = [row_of(["", "gate", "lesson", "number", "limit", "", "says"], "th")]
    for name, gates in walks.items():
        for i, gate in enumerate(gates):
            says = as_html(gate.says) + (
                "" if gate.passed else f"<br><b>To do:</b> {as_html(gate.do.partition(chr(10))[0])}"
            )
            mark = "pass" if gate.passed else "<b>STOP</b>"
            number = f"{gate.number:.3g}"
            rows.append(
                row_of(["" if i else as_html(name), gate.name, gate.lesson, number, gate.limit, mark, says])
            )
    return HTML(f"<table>{''.join(rows)}</table>")


def verdict_bars(groups: Mapping[str, Counter[str]], title: str) -> Figure:
    """Stacked bars of verdicts, a row for each group, the numbers in them.

    Args:
        groups: name → verdict → how many claims.
        title: of the figure.
    """
    figure, axes = canvas(width=8.2, height=0.9 + 0.42 * len(groups))
    names = list(groups)[::-1]
    for row, name in enumerate(names):
        left = 0
        for verdict in (*VERDICTS, IN_PARTS, OPEN):
            n = groups[name].get(verdict, 0)
            if not n:
                continue
            axes.barh(row, n, left=left, color=SHADES[verdict], edgecolor="white")
            axes.text(left + n / 2, row, str(n), ha="center", va="center", fontsize=9.5, color="white")
            left += n
    shown = [v for v in (*VERDICTS, IN_PARTS, OPEN) if any(group.get(v) for group in groups.values())]
    for verdict in shown:
        axes.barh(0, 0, color=SHADES[verdict], edgecolor="#888888", label=verdict)
    axes.set_yticks(range(len(names)), names)
    axes.legend(
        ncols=len(shown),
        loc="upper center",
        bbox_to_anchor=(0.42, -0.28 / len(groups) ** 0.5 - 0.08),
        frameon=False,
    )
    finish(axes, title, "claims", "")
    return figure


def by_records(lines: Sequence[Mapping], asked: int) -> Figure:
    """Right answers of a prompt with n solved records, and of an adapter trained on n, each at its best rate.

    Args:
        lines: of `data/results/capstone.jsonl`.
        asked: held-out records.
    """
    figure, axes = canvas(width=7.0, height=3.4)
    for how, colour, mark in (("prompt", COLOURS["full"], "s"), ("adapter", COLOURS["lora"], "o")):
        sizes, means, halves = [], [], []
        for n in sorted({line["n"] for line in lines if line["how"] == how}):
            shares = [100 * sum(line["right"]) / asked for line in best_of(lines, how, n)]
            mean, half = mean_interval(shares)
            sizes.append(n)
            means.append(mean)
            halves.append(half)
            axes.plot([n] * len(shares), shares, mark, color=colour, alpha=0.35, markersize=5)
        axes.errorbar(sizes, means, halves, color=colour, marker=mark, linewidth=2, capsize=3)
        axes.annotate(how, (sizes[-1], means[-1]), xytext=(8, -3), textcoords="offset points", color=colour)
    axes.set_xscale("log")
    axes.set_xticks([6, 24, 48, 96], ["6", "24", "48", "96"])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.set_ylim(0, 100)
    finish(axes, "The same labelled records, in a prompt or in an adapter", "labelled records", "right (%)")
    return figure


def best_of(lines: Sequence[Mapping], how: str, n: int) -> list[Mapping]:
    """The runs of an adapter at the rate that is best on the mean of all seeds; all those of a prompt."""
    some = [line for line in lines if line["how"] == how and line["n"] == n]
    seeds = {line["seed"] for line in some}
    rates = {line.get("lr") for line in some}
    whole = [lr for lr in rates if {line["seed"] for line in some if line.get("lr") == lr} == seeds]
    best = max(
        whole, key=lambda lr: sum(sum(line["right"]) for line in some if line.get("lr") == lr), default=None
    )
    return [line for line in some if line.get("lr") == best]
