"""Records that are there twice: in one file, or in the training file and the test file.

What was trained on is no test. A test record leaks if what it asks is asked in the training file: exactly (but for
case and space), or nearly, by `labkit.data.own.shingles`. Where nothing particular is asked, as of plain texts, the
completions are compared. `hold_out` makes a split without leaks.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from labkit.checks import is_number, said
from labkit.data.own.findings import Findings
from labkit.data.own.shingles import ALIKE, ShingleIndex, asked_and_answered, folded, often, shingles_of
from labkit.data.records import records_of


class Leak(NamedTuple):
    """A test record that is in the training data.

    Attributes:
        test: its index in the test records.
        train: the index of the training record that is most like it.
        kind: "exact" or "near".
        similarity: in (0, 1]; resemblance, or how much of the test record is inside the other.
    """

    test: int
    train: int
    kind: str
    similarity: float


def find_leaks(train: Sequence[Mapping], test: Sequence[Mapping], threshold: float = ALIKE) -> list[Leak]:
    """The test records that are in the training data, exactly or nearly, each with the record most like it.

    Args:
        train: records.
        test: records.
        threshold: similarity from which on two are near copies; at 1 only copies of all three-word runs are.

    Raises:
        ValueError: no records, or a threshold outside (0, 1].
    """
    check_threshold(threshold)
    train, test = records_of(train, "train"), records_of(test, "test")
    usual = usual_questions(train)
    texts = [compared(record, usual) for record in train]
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(folded(text), i)
    index = ShingleIndex(texts)
    leaks = []
    for t, record in enumerate(test):
        text = compared(record, usual)
        if (copy := first.get(folded(text))) is not None:
            leaks.append(Leak(t, copy, "exact", 1.0))
            continue
        found, score = index.alike(index.without_common(shingles_of(text)), threshold)
        if len(found):
            best = int(np.argmax(score))
            leaks.append(Leak(t, int(found[best]), "near", float(score[best])))
    return leaks


def hold_out(
    records: Sequence[Mapping], share: float = 0.2, seed: int = 0, threshold: float = ALIKE
) -> tuple[list[dict], list[dict]]:
    """Split records at random into some to train on and some to test on, with no copies or near copies across.

    Copies stay together, so that fewer may be held out than `share`, but at least half of that.

    Args:
        records: at least two.
        share: of the records, to be held out.
        seed: of the choice.
        threshold: as in `find_leaks`.

    Returns:
        training records and held-out records, both in the order of `records`.

    Raises:
        ValueError: fewer than two records, a share outside (0, 1), or the records are too much alike to be split.
    """
    check_threshold(threshold)
    if not is_number(share) or not 0 < share < 1:
        raise ValueError(said("share", share, "a number above 0 and below 1", "0.2 holds out a fifth"))
    own = [dict(record) for record in records_of(records, "records")]
    wanted = max(1, min(round(share * len(own)), len(own) - 1))
    groups = groups_of_copies(own, threshold)
    random.Random(seed).shuffle(groups)
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= wanted:
            held.update(group)
    if len(held) < wanted / 2 or len(own) < 2:
        raise ValueError(
            f"of {len(own)} records, {wanted} should be held out, but only {len(held)} can be without near copies "
            f"of them in training: the largest group of records that are alike has {max(map(len, groups), default=0)}. "
            f"Raise threshold={threshold}, or give records that differ more"
        )
    chosen = [[r for i, r in enumerate(own) if (i in held) is side] for side in (False, True)]
    return chosen[0], chosen[1]


def groups_of_copies(records: Sequence[Mapping], threshold: float) -> list[list[int]]:
    """The indices of the records in groups: whoever is a copy or near copy of another is in its group."""
    usual = usual_questions(records)
    texts = [compared(record, usual) for record in records]
    index = ShingleIndex(texts)
    leader = list(range(len(records)))

    def lead(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        for other in (first.setdefault(folded(text), i), *index.alike(index.sets[i], threshold)[0].tolist()):
            a, b = sorted((lead(i), lead(other)))
            leader[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(len(records)):
        groups.setdefault(lead(i), []).append(i)
    return list(groups.values())


def note_leaks(
    train: Sequence[Mapping],
    test: Sequence[Mapping],
    lines: Sequence[int],
    places: Sequence[str],
    findings: Findings,
) -> None:
    """Note, at the lines of the training records, which test records (at `places`) they are copies of."""
    for leak in find_leaks(train, test):
        if leak.kind == "exact":
            findings.add("leak", lines[leak.train], f"is {places[leak.test]} too")
        else:
            found = f"is much like {places[leak.test]}: similarity {leak.similarity:.2f}"
            findings.add("near leak", lines[leak.train], found)


def note_duplicates(records: Sequence[Mapping], lines: Sequence[int], findings: Findings) -> None:
    """Note records that are in one file twice, and questions that have two answers."""
    usual = usual_questions(records)
    seen: dict[tuple[str, str], int] = {}
    asked_before: dict[str, int] = {}
    for record, line in zip(records, lines):
        asked, answer = asked_and_answered(record)
        system = " ".join(str(m["content"]) for m in record.get("messages", ()) if m["role"] == "system")
        pair = (folded(f"{system}\n{asked}"), answer.strip())
        if pair in seen:
            findings.add("duplicate", line, f"asks and answers the same as line {seen[pair]}")
        elif pair[0] in asked_before and folded(asked) not in usual:
            findings.add(
                "two answers", line, f"asks the same as line {asked_before[pair[0]]}, with another answer"
            )
        seen.setdefault(pair, line)
        asked_before.setdefault(pair[0], line)


def usual_questions(records: Sequence[Mapping]) -> set[str]:
    """What so many of the records ask that it is no question of theirs: nothing, or one instruction for all."""
    counts = Counter(folded(asked_and_answered(record)[0]) for record in records)
    return {"", *(asked for asked, n in counts.items() if n > often(len(records)))}


def compared(record: Mapping, usual: set[str]) -> str:
    """The text by which a record is compared with others: what it asks, or else its answer."""
    asked, answer = asked_and_answered(record)
    return answer if folded(asked) in usual else asked


def check_threshold(threshold: object) -> None:
    """Raise a `ValueError` unless it is above 0 and at most 1."""
    if not is_number(threshold) or not 0 < threshold <= 1:
        raise ValueError(said("threshold", threshold, "a number above 0 and at most 1", f"{ALIKE} is usual"))
