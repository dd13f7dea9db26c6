"""The register of claims and the decision guide, as a page of Markdown."""

from pathlib import Path

from labkit.lab.claims import SOURCES
from labkit.lab.register import RegisteredClaim, counted, read_guide, read_register


def register_page(notebooks: Path) -> str:
    """What people claim, what the lessons found, and what to do."""
    claims = read_register(notebooks)
    found = ", ".join(f"{n} {verdict}" for verdict, n in counted(claims).items())
    lines = [
        "# What people claim, and what was measured",
        "",
        f"{len(claims)} claims about LoRA and QLoRA: {found}. Each verdict was recorded by the cell that measured it, and the link leads "
        "there, to the controls. S1 to S4 say who says so; they are named at the end.",
        "",
        "## What to do",
        "",
        "| question | advice | because of |",
        "|---|---|---|",
    ]
    for line in read_guide():
        because = ", ".join(f"[{number}](#claim-{number})" for number in line.because)
        lines.append(f"| {cell(line.ask)} | {cell(line.do)} | {because} |")
    lines += ["", "## All claims", "", "| | claim | verdict | what was found | do |", "|---|---|---|---|---|"]
    lines += [row(claim) for claim in claims]
    lines += ["", "## Who says so", ""] + [f"- **{name}**: {title}" for name, title in SOURCES.items()]
    return "\n".join(lines)


def row(claim: RegisteredClaim) -> str:
    """A claim as a row of the table."""
    rulings = []
    for ruling in claim.rulings:
        condition = f"*{cell(path)}*: " if (path := claim.path_of(ruling)) else ""
        where = f"[{ruling.lesson}](../notebooks/{ruling.notebook}#{claim.number})"
        rulings.append(f"{condition}{cell(ruling.first)} ({where})")
    who = f" ({', '.join(claim.said)})" if claim.said else ""
    return (
        f"| <span id='claim-{claim.number}'>{claim.number}</span> | “{cell(claim.statement)}”{who} "
        f"| <span class='verdict'>{claim.verdict}</span> | {'<br>'.join(rulings)} | {cell(claim.do)} |"
    )


def cell(text: str) -> str:
    """Text that fits into a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
