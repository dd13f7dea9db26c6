"""What people say about LoRA and QLoRA, settled by a measurement and recorded where it was made.

A verdict is an output of the cell that made the measurement. Besides the text that a reader sees, the output
carries the verdict as data, so `ledger` can gather all of them from the notebooks as they stand.
"""

import json
import re
from pathlib import Path

from IPython.display import display

from labkit.checks import check_choice

VERDICTS = ("confirmed", "refuted", "depends", "not seen here", "not testable here")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z“*(α-ω|])")
MIME = "application/vnd.labkit.claim+json"
SOURCES = {
    "S1": "“LoRA and Parameter-Efficient Fine-Tuning”, a practitioner's blog, 2026",
    "S2": "“Fine-Tuning LLMs: LoRA, QLoRA, and Adapter Methods”, an infrastructure company's article, 2025",
    "S3": "“AI Explained: LoRA, QLoRA & PEFT”, a five-minute module",
    "S4": "“Parameter-Efficient Fine-Tuning”, a chapter of an interview guide",
}


def claim(number: str, statement: str, verdict: str, evidence: str, said: str = "") -> None:
    """Record and show the verdict on a claim: a line, and the rest of the evidence folded below it.

    Args:
        number: its number in the course's list, such as "C28".
        statement: what people say.
        verdict: one of `VERDICTS`.
        evidence: the numbers just measured, and for "depends" what the verdict depends on; its first sentence
            stands in the line.
        said: who says so: names in `SOURCES`, with spaces between, such as "S1 S4".

    Raises:
        ValueError: an unknown verdict or source, or no evidence.
    """
    check_choice("verdict", verdict, VERDICTS)
    if not evidence.strip():
        raise ValueError(f"claim {number} needs evidence: the numbers that settle it")
    for source in said.split():
        check_choice("said", source, tuple(SOURCES))
    by = " ".join(f"Said in {SOURCES[source]}." for source in said.split())
    first, *rest = SENTENCE_END.split(evidence.strip(), maxsplit=1)
    folded = " ".join([*rest, *([f"*{by}*"] if by else [])])
    data: dict[str, object] = {
        "claim": number,
        "statement": statement,
        "verdict": verdict,
        "evidence": evidence,
    }
    data |= {"said": said.split()} if said else {}
    line = f"**{number}** “{statement}” — **{verdict}.** {first}"
    fold = f"\n\n<details><summary>The evidence</summary>\n\n{folded}\n\n</details>" if folded else ""
    display({MIME: data, "text/markdown": line + fold, "text/plain": f"{line} {folded}".strip()}, raw=True)


def ledger(folder: str | Path = ".") -> list[dict]:
    """All verdicts recorded in the notebooks of `folder`, by number, each with the name of its notebook, the id of its
    cell, and the last heading above it.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.ipynb")):
        heading = ""
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                heading = next(iter(headings_of("".join(cell["source"]))[::-1]), heading)
            found = [out["data"][MIME] for out in cell.get("outputs", []) if MIME in out.get("data", {})]
            place = {"notebook": path.name, "cell": cell.get("id", ""), "heading": heading}
            rows += [{**verdict, **place} for verdict in found]
    return sorted(rows, key=lambda row: int(row["claim"].lstrip("C")))


def headings_of(source: str) -> list[str]:
    """The headings in the source of a markdown cell, as they read: without marks of code and emphasis."""
    without_code = re.sub(r"^(```|~~~).*?^\1", "", source, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#{1,6} +(.+?) *#*$", without_code, re.MULTILINE)
    return [re.sub(r"[`*]", "", heading).strip() for heading in found]
