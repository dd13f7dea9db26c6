"""What people say about LoRA and QLoRA, settled by a measurement and recorded where it was made.

A verdict is an output of the cell that made the measurement. Besides the text that a reader sees, the output
carries the verdict as data, so `ledger` can gather all of them from the notebooks as they stand.
"""

import json
from pathlib import Path

from IPython.display import display

from labkit.checks import check_choice

VERDICTS = ("confirmed", "refuted", "depends", "not seen here", "not testable here")
MIME = "application/vnd.labkit.claim+json"


def claim(number: str, statement: str, verdict: str, evidence: str) -> None:
    """Record and show the verdict on a claim.

    Args:
        number: its number in the course's list, such as "C28".
        statement: what people say.
        verdict: one of `VERDICTS`.
        evidence: the numbers just measured, and for "depends" what the verdict depends on.

    Raises:
        ValueError: an unknown verdict, or no evidence.
    """
    check_choice("verdict", verdict, VERDICTS)
    if not evidence.strip():
        raise ValueError(f"claim {number} needs evidence: the numbers that settle it")
    data = {"claim": number, "statement": statement, "verdict": verdict, "evidence": evidence}
    text = f"**{number}** “{statement}” — **{verdict}.** {evidence}"
    display({MIME: data, "text/markdown": text, "text/plain": text}, raw=True)


def ledger(folder: str | Path = ".") -> list[dict]:
    """All verdicts recorded in the notebooks of `folder`, by number, each with the name of its notebook."""
    rows = []
    for path in sorted(Path(folder).glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            found = [out["data"][MIME] for out in cell.get("outputs", []) if MIME in out.get("data", {})]
            rows += [{**verdict, "notebook": path.name} for verdict in found]
    return sorted(rows, key=lambda row: int(row["claim"].lstrip("C")))
