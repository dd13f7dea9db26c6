"""Classes that only one of two splits has: what is never trained on cannot be learned, and what is never tested on is
not known to be.

A class is a value that many answers share: a whole answer, or, if the answers are JSON objects, the value of a field.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from labkit.data.own.findings import Findings, counted
from labkit.data.own.shingles import asked_and_answered

MAX_CLASSES = 50  # values of a field that can still be called classes …
MIN_SHARED = 3  # … if there are so many records of each, on average
WHOLE = "the answer"


class OneSided(NamedTuple):
    """A value that only one split has.

    Attributes:
        field: of the JSON answers, or "the answer".
        value: as text.
        is_in_train: else it is in test.
        records: the indices of those that have it.
    """

    field: str
    value: str
    is_in_train: bool
    records: list[int]


def one_sided_classes(train: Sequence[Mapping], test: Sequence[Mapping]) -> list[OneSided]:
    """The classes that are in the answers of one split only."""
    sides = [values_by_field(records) for records in (train, test)]
    found = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        here, there = (side.get(name, {}) for side in sides)
        n_values = len({*here, *there})
        n_records = sum(len(records) for side in (here, there) for records in side.values())
        if n_values <= MAX_CLASSES and n_values * MIN_SHARED <= n_records:
            found += [OneSided(name, value, True, here[value]) for value in here if value not in there]
            found += [OneSided(name, value, False, there[value]) for value in there if value not in here]
    return found


def values_by_field(records: Sequence[Mapping]) -> dict[str, dict[str, list[int]]]:
    """Field -> value -> the indices of the records that have it; of answers that are not JSON, they as a whole."""
    found: dict[str, dict[str, list[int]]] = {}
    for i, record in enumerate(records):
        answer = asked_and_answered(record)[1].strip()
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            value = None
        fields = value.items() if isinstance(value, dict) else [(WHOLE, answer)]
        for name, inner in fields:
            if isinstance(inner, (str, int, bool)):
                found.setdefault(name, {}).setdefault(str(inner), []).append(i)
    return found


def note_classes(
    train: Sequence[Mapping], test: Sequence[Mapping], places: Sequence[str], findings: Findings
) -> None:
    """Note on the training file the classes that one split only has; `places` are those of the test records."""
    for one in one_sided_classes(train, test):
        what = f"{one.field} = {one.value!r}"
        n = counted(len(one.records), "record")
        findings.add(
            "class in one split",
            0,
            f"has {n} with {what}, and test has none"
            if one.is_in_train
            else f"has no record with {what}, and test has {n}, first {places[one.records[0]]}",
        )
