"""Look through the ledger: by theme, by verdict, by who says it, by a word."""

from collections.abc import Mapping, Sequence

from IPython.display import display
from matplotlib import pyplot as plt

from labkit.lab.claims import SOURCES
from labkit.lab.explore.panel import WIDE, panel
from labkit.lab.figures.capstone import register_table, verdict_bars
from labkit.lab.interactive import is_interactive
from labkit.lab.register import RegisteredClaim, counted

ALL = "all"
SHOWN = 12  # rows of a table; the rest is counted


def chosen(
    claims: Sequence[RegisteredClaim], theme: str = ALL, verdict: str = ALL, said: str = ALL, word: str = ""
) -> list[RegisteredClaim]:
    """The claims of a theme, with a verdict, of a source, and with a word in what is said or to do.

    A claim in parts, or one whose lessons differ, is found under each of its verdicts.
    """
    return [
        claim
        for claim in claims
        if theme in (ALL, claim.theme)
        and (verdict in (ALL, claim.verdict) or verdict in {ruling.verdict for ruling in claim.rulings})
        and (said == ALL or said in claim.said)
        and word.lower() in f"{claim.number} {claim.statement} {claim.do}".lower()
    ]


def ledger_explorer(claims: Sequence[RegisteredClaim], static: Sequence[Mapping[str, str]]) -> None:
    """Choose by theme, verdict, source or a word: bars of the verdicts by theme, and the first rows of the table.

    Args:
        claims: the register.
        static: what to show headless: {"theme": …}; what is not named is "all".
    """

    def draw(theme: str = ALL, verdict: str = ALL, said: str = ALL, word: str = "") -> None:
        found = chosen(claims, theme, verdict, said, word)
        words = [
            value
            for value in (theme, verdict, said if said == ALL else SOURCES[said], word)
            if value not in (ALL, "")
        ]
        title = f"{len(found)} of {len(claims)} claims" + (f": {', '.join(words)}" if words else "")
        if not found:
            print(f"no claim matches {', '.join(words)}")
            return
        themes = dict.fromkeys(claim.theme for claim in found)
        groups = {one: counted([claim for claim in found if claim.theme == one]) for one in themes}
        figure = verdict_bars(groups, title)
        display(figure)
        plt.close(figure)
        display(register_table(found[:SHOWN]))
        if len(found) > SHOWN:
            print(f"and {len(found) - SHOWN} more")

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, Text

        lists = {
            "theme": sorted({claim.theme for claim in claims}),
            "verdict": sorted({ruling.verdict for claim in claims for ruling in claim.rulings}),
            "said": list(SOURCES),
        }
        controls = {
            name: Dropdown(options=[ALL, *values], description=name, **WIDE) for name, values in lists.items()
        }
        controls["word"] = Text(description="word", continuous_update=False, **WIDE)
    panel(draw, controls, [dict(values) for values in static])
