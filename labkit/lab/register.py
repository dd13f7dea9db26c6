"""The register: every claim of the course with its verdict, the evidence, who says it, where it was settled, what to do.

    read_register("notebooks")  →  81 claims, in order

What people say, and what to do about it, is written down in `data/claims.json`. Verdicts and evidence are not: they are
read from the outputs of the lessons as they stand, so a lesson that is run again changes the register, and one that was
not run leaves its claims open. Of the evidence, too, kind and sample are what the lesson printed.

A claim that several cells settle keeps all their rulings. Where these differ on one statement, the claim *depends*, and
`paths` says on which condition each stands; where the statement has parts, each part has its own.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labkit.lab.claims import SENTENCE_END, SOURCES, VERDICTS, ledger
from labkit.paths import data_folder

RULED = ("verdict", "evidence", "statement", "notebook", "cell", "heading")
OPEN, IN_PARTS = "open", "in parts"
KINDS = {
    "measured": r"\b(?:measured|timed)\b",
    "counted": r"\bcounted\b",
    "planned": r"\bplanned\b",
    "recorded": r"\brecorded\b",
}
DENIED = re.compile(r"\bnot (?:been )?measured\b|\bwere not measured\b|\bno run is recorded\b", re.IGNORECASE)
WITHIN = re.compile(r"\([^()]*\)")  # parentheses
MOST_DEPENDS = 27  # of 81: a third


@dataclass(frozen=True)
class Ruling:
    """What one cell of one lesson says of a claim.

    Attributes:
        verdict: one of `labkit.lab.claims.VERDICTS`.
        evidence: all of it, as the cell printed it.
        statement: the claim, or the part of it that is ruled on.
        notebook: "04_rank_alpha_targets.ipynb".
        cell: its id there.
        heading: the last one above it.
    """

    verdict: str
    evidence: str
    statement: str
    notebook: str
    cell: str
    heading: str

    @property
    def sentences(self) -> list[str]:
        """Of the evidence, without what to do."""
        return [one for one in SENTENCE_END.split(self.evidence.strip()) if not one.startswith("Do:")]

    @property
    def pieces(self) -> list[str]:
        """The sentences, those that begin with a number or a name in small letters by themselves too."""
        return [piece for one in self.sentences for piece in re.split(r"(?<=[.!?]) +", one)]

    @property
    def first(self) -> str:
        """What it says first, without the sample; of "depends", up to the first number: where it turns."""
        said = [piece for piece in self.pieces if " · " not in WITHIN.sub("", piece)] or self.sentences
        taken = said[:1]
        for piece in said[1:5]:
            if self.verdict != "depends" or re.search(r"\d", " ".join(taken)):
                break
            taken.append(piece)
        return " ".join(taken)

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the evidence came about: some of `KINDS`."""
        said = DENIED.sub("", self.evidence)
        return tuple(kind for kind, words in KINDS.items() if re.search(words, said, re.IGNORECASE))

    @property
    def sample(self) -> str:
        """Seeds, model and steps, as the lesson says them; "" where nothing was sampled."""
        dotted = [piece for piece in self.pieces if " · " in piece]
        if not dotted:
            return ""
        last = (
            dotted[-1] if " · " in WITHIN.sub("", dotted[-1]) else WITHIN.findall(dotted[-1])[-1].strip("()")
        )
        return last.partition("; lesson")[0].rstrip(".")

    @property
    def lesson(self) -> str:
        """Its number: "08b"."""
        return self.notebook.partition("_")[0]

    @property
    def link(self) -> str:
        """To the cell, relative to the lessons' folder. JupyterLab opens such a fragment, and nbconvert's pages have it."""
        return f"{self.notebook}#cell-id={self.cell}" if self.cell else self.notebook


@dataclass(frozen=True)
class RegisteredClaim:
    """A claim and what the course says of it.

    Attributes:
        number: "C28".
        statement: what people say.
        said: who: names in `SOURCES`.
        theme: a word or two, such as "merging".
        do: what to do, in a sentence.
        paths: by notebook, the condition that its verdict stands for, where verdicts differ or need one.
        rulings: the verdicts, in the order of the lessons.
    """

    number: str
    statement: str
    said: tuple[str, ...]
    theme: str
    do: str
    paths: dict[str, str] = field(default_factory=dict)
    rulings: tuple[Ruling, ...] = ()

    @property
    def verdict(self) -> str:
        """Of all rulings: one of `VERDICTS`, "in parts", or "open"."""
        verdicts = {ruling.verdict for ruling in self.rulings}
        if len(verdicts) < 2:
            return verdicts.pop() if verdicts else OPEN
        return IN_PARTS if self.has_parts else "depends"

    @property
    def has_parts(self) -> bool:
        """Are there different statements in one lesson?"""
        return len({ruling.statement for ruling in self.rulings}) > len(
            {ruling.notebook for ruling in self.rulings}
        )

    @property
    def is_depends(self) -> bool:
        """Does it depend, in whole or in a part?"""
        return self.verdict == "depends" or any(ruling.verdict == "depends" for ruling in self.rulings)

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the evidence came about, of all rulings."""
        return tuple(kind for kind in KINDS if any(kind in ruling.kinds for ruling in self.rulings))

    def path_of(self, ruling: Ruling) -> str:
        """The condition that a ruling stands for; of a part, the part."""
        if self.has_parts:
            return ruling.statement
        return self.paths.get(ruling.notebook.removesuffix(".ipynb"), "")


def read_register(notebooks: str | Path = ".", path: str | Path | None = None) -> list[RegisteredClaim]:
    """All claims with the verdicts that the lessons in `notebooks` have reached.

    Args:
        notebooks: the lessons' folder.
        path: of the claims; default: `data/claims.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a lesson rules on a number that is not registered, or a line lacks something.
    """
    path = Path(path or data_folder() / "claims.json")
    lines = json.loads(path.read_text(encoding="utf-8"))
    rulings: dict[str, list[Ruling]] = {line["claim"]: [] for line in lines}
    for row in ledger(notebooks):
        if row["claim"] not in rulings:
            raise ValueError(
                f"{row['notebook']} rules on {row['claim']}, which {path.name} does not have; add a line with claim, "
                "statement, said, theme and do"
            )
        rulings[row["claim"]].append(Ruling(**{name: row[name] for name in RULED}))
    return [registered(line, rulings[line["claim"]], path.name) for line in lines]


def registered(line: dict, rulings: Sequence[Ruling], name: str) -> RegisteredClaim:
    """A line of the file as a claim."""
    lacks = [key for key in ("statement", "said", "theme", "do") if not line.get(key)]
    if lacks:
        raise ValueError(f"{line['claim']} in {name} has no {', '.join(lacks)}")
    strangers = set(line["said"]) - set(SOURCES)
    if strangers:
        raise ValueError(
            f"{line['claim']} in {name} is said by {sorted(strangers)}; known are {', '.join(SOURCES)}"
        )
    return RegisteredClaim(
        line["claim"],
        line["statement"],
        tuple(line["said"]),
        line["theme"],
        line["do"],
        line.get("paths", {}),
        tuple(rulings),
    )


def counted(claims: Sequence[RegisteredClaim]) -> Counter[str]:
    """How many claims have which verdict, in the order of `VERDICTS`."""
    found = Counter(claim.verdict for claim in claims)
    return Counter({verdict: found[verdict] for verdict in (*VERDICTS, IN_PARTS, OPEN) if found[verdict]})


@dataclass(frozen=True)
class GuideLine:
    """A line of the decision guide.

    Attributes:
        ask: the question that somebody has.
        do: the advice.
        because: the claims that it rests on, each with the verdict that it was written for.
    """

    ask: str
    do: str
    because: dict[str, str]

    def changed(self, claims: Sequence[RegisteredClaim]) -> list[str]:
        """Claims whose verdict is another one now: then the line must be read again. Open ones cannot tell."""
        now = {claim.number: claim.verdict for claim in claims}
        return [number for number, verdict in self.because.items() if now[number] not in (verdict, OPEN)]


def read_guide(path: str | Path | None = None) -> list[GuideLine]:
    """The decision guide; default: `data/decisions.json`.

    Raises:
        ValueError: a line without a claim to rest on.
    """
    path = Path(path or data_folder() / "decisions.json")
    lines = [GuideLine(**line) for line in json.loads(path.read_text(encoding="utf-8"))]
    for line in lines:
        if not line.because:
            raise ValueError(f"{path.name}: {line.ask!r} rests on no claim; name one with its verdict")
    return lines
