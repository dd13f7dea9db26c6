"""The ledger as a table and as bars, gates as a table, and prompts beside adapters."""

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from labkit.lab.claims import SOURCES, VERDICTS
from labkit.lab.gates import Gate
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.lab.register import IN_PARTS, OPEN, GuideLine, RegisteredClaim, Ruling
from labkit.training.intervals import wilson

SHADES = {  # of verdicts; the word always stands beside it
    "confirmed": COLOURS["lora"],
    "refuted": COLOURS["qlora"],
    "depends": COLOURS["gold"],
    "not seen here": COLOURS["base"],
    "not testable here": COLOURS["control"],
    IN_PARTS: COLOURS["nf4"],
    OPEN: "#ffffff",
}
HATCHES = {"not testable here": "//"}  # beside another grey
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
    kinds = [kind for kind in ruling.kinds if kind not in ruling.sample]
    rests = " · ".join([*([ruling.sample] if ruling.sample else []), *([", ".join(kinds)] if kinds else [])])
    link = f'<a href="{html.escape(ruling.link)}">{ruling.lesson}, {as_html(ruling.heading)}</a>'
    return verdict, f"{as_html(ruling.first)}<br><em>{as_html(rests)}</em><br>{link}"


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
        rows.append(row_of([as_html(line.ask), as_html(line.do), " · ".join(rests)]))
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
    """A bar of the same length for each group, divided by verdict; how many claims stands in its parts.

    Args:
        groups: name → verdict → how many claims.
        title: of the figure.
    """
    figure, axes = canvas(width=8.2, height=1.4 + 0.42 * len(groups))
    names = list(groups)[::-1]
    verdicts = [v for v in (*VERDICTS, IN_PARTS, OPEN) if any(group.get(v) for group in groups.values())]
    for row, name in enumerate(names):
        left, total = 0.0, groups[name].total()
        for verdict in verdicts:
            if n := groups[name].get(verdict, 0):
                axes.barh(
                    row,
                    100 * n / total,
                    left=left,
                    color=SHADES[verdict],
                    edgecolor="white",
                    hatch=HATCHES.get(verdict),
                )
                dark = verdict in ("depends", "not testable here", OPEN)
                axes.text(left + 50 * n / total, row, str(n), ha="center", va="center", fontsize=9.5,
                          color="black" if dark else "white")  # fmt: skip
                left += 100 * n / total
    handles = [Patch(facecolor=SHADES[v], edgecolor="white", hatch=HATCHES.get(v), label=v) for v in verdicts]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5)
    axes.set_yticks(range(len(names)), [f"{name} ({groups[name].total()})" for name in names])
    axes.set_xlim(0, 100)
    finish(axes, title, "share of the claims (%)", "")
    return figure


def prompt_or_adapter(panels: Mapping[str, Mapping[str, Sequence[Sequence[int]]]]) -> Figure:
    """Shares of right answers: a panel for each task, a row for each way, a dot for each seed, and the 95 % interval of all.

    Args:
        panels: title → way → for each seed the scores, 0 or 1, of what was asked.
    """
    sizes = [len(ways) for ways in panels.values()]
    figure, columns = canvas(width=8.6, height=1.1 + 0.42 * max(sizes), columns=len(panels))
    for axes, (title, ways) in zip(columns, panels.items()):
        for row, (way, runs) in enumerate(reversed(list(ways.items()))):
            colour = COLOURS["lora"] if "adapter" in way else COLOURS["full"]
            right, asked = sum(map(sum, runs)), sum(map(len, runs))
            low, high = (100 * bound for bound in wilson(right, asked))
            axes.plot(
                [100 * sum(run) / len(run) for run in runs], [row] * len(runs), "o", color=colour, alpha=0.5
            )
            axes.plot([low, high], [row, row], color=colour, linewidth=2)
            axes.annotate(f"{right / asked:.0%}", (100 * right / asked, row), xytext=(0, 7), textcoords="offset points",
                          ha="center", color=colour, fontsize=9.5)  # fmt: skip
        axes.set_yticks(range(len(ways)), list(ways)[::-1])
        axes.set_xlim(-4, 104)
        axes.set_ylim(-0.6, len(ways) - 0.2)
        finish(axes, title, "right (%)", "")
    return figure
