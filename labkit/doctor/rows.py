"""The rows that a trainer really feeds, beside the records that they were made of.

A record says what is to be learned; the row says what is. They are compared token by token. A row may be padded on
either side, and may come in any order: it is found by the tokens of its prompt and answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from labkit.data.batches import IGNORE, Batch
from labkit.data.encoding import Encoded


@dataclass(frozen=True)
class Row:
    """One row of a batch, and the record it was made of.

    Attributes:
        ids: the tokens that go into the model.
        labels: the tokens to predict, at their own positions, or -100.
        example: the record as labkit encodes it.
        start: where the record's prompt begins in `ids`.
    """

    ids: list[int]
    labels: list[int]
    example: Encoded
    start: int

    @property
    def answer(self) -> int:
        """Where the answer begins in `ids`."""
        return self.start + len(self.example.prompt)

    @property
    def end(self) -> int:
        """Where the answer's text ends, and its end mark begins."""
        return self.start + len(self.example) - self.example.end

    @property
    def supervised(self) -> list[int]:
        """The positions that are learned. The first token of a row has nothing before it."""
        return [i for i, label in enumerate(self.labels) if label != IGNORE and i > 0]

    @property
    def prompt(self) -> list[int]:
        """The tokens before the answer, without padding. A first token that is there twice is none."""
        doubled = self.ids[: self.start] == self.example.prompt[:1]
        return self.ids[0 if doubled else self.start : self.answer]


def rows_of(fed: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of batches: `Batch`es, or mappings with `input_ids` and `labels`, as collators make them.

    Raises:
        ValueError: something else.
    """
    if isinstance(fed, Batch):
        fed = {"input_ids": fed.ids, "labels": fed.targets}
    if isinstance(fed, Mapping):
        if not {"input_ids", "labels"} <= set(fed):
            raise ValueError(
                f"a batch has {sorted(map(str, fed))}, and must have 'input_ids' and 'labels', as the trainer's "
                "collator returns it"
            )
        ids, labels = (as_lists(fed[key]) for key in ("input_ids", "labels"))
        if [len(row) for row in ids] != [len(row) for row in labels]:
            raise ValueError("the rows of 'input_ids' and 'labels' in fed have other lengths")
        return list(zip(ids, labels))
    if isinstance(fed, (str, bytes)) or not isinstance(fed, Iterable):
        raise ValueError(
            f"fed is a {type(fed).__name__}, and must be a batch of the trainer, or a list of them"
        )
    return [row for batch in fed for row in rows_of(batch)]


def as_lists(values: Any) -> list[list[int]]:
    """Rows of whole numbers, of a tensor or of lists; a single row becomes one of one."""
    rows = values.tolist() if isinstance(values, Tensor) else list(values)
    if rows and isinstance(rows[0], int):
        return [rows]
    return [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]


def matched(rows: Sequence[tuple[list[int], list[int]]], examples: Sequence[Encoded]) -> list[Row]:
    """The rows that were made of one of the examples; others are left out."""
    found = []
    for ids, labels in rows:
        for example in examples:
            text = example.prompt + example.without_end().completion
            if (start := place_of(text, ids)) is not None:
                found.append(Row(ids, labels, example, start))
                break
    return found


def place_of(part: list[int], whole: list[int]) -> int | None:
    """Where `part` begins in `whole`; None if it is not in it."""
    if not part:
        return None
    last = len(whole) - len(part)
    return next(
        (i for i in range(last + 1) if whole[i] == part[0] and whole[i : i + len(part)] == part), None
    )
