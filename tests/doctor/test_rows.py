"""Rows of a trainer, beside the records that they were made of."""

import pytest
import torch

from labkit.data.encoding import Encoded
from labkit.doctor.inputs import FAULTS, difference
from labkit.doctor.rows import matched, place_of, rows_of

ONE = Encoded([5, 6, 7], [8, 9, 0], end=1)


def faults(ids: list[int], labels: list[int]) -> list[str]:
    (row,) = matched([(ids, labels)], [Encoded([1], [2], 1), ONE])
    return [name for name, (has, _, _) in FAULTS.items() if has(row)]


@pytest.mark.parametrize(
    ("ids", "labels", "expected"),
    [
        ([5, 6, 7, 8, 9, 0], [-100, -100, -100, 8, 9, 0], []),
        ([5, 6, 7, 8, 9, 0, 0, 0], [-100, -100, -100, 8, 9, 0, -100, -100], []),
        ([0, 0, 5, 6, 7, 8, 9, 0], [-100] * 5 + [8, 9, 0], []),
        ([5, 6, 7, 8, 9, 0], [-100, -100, -100, -100, 9, 0], ["first"]),
        ([5, 6, 7, 8, 9, 0], [-100, -100, -100, 8, 9, -100], ["end"]),
        ([5, 6, 7, 8, 9], [-100, -100, -100, 8, 9], ["end"]),
        ([5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 9, 0], ["prompt"]),
        ([5, 6, 7, 8, 9, 0], [-100] * 6, ["none", "end"]),
        ([5, 6, 7, 8, 9, 0], [-100, -100, 8, 9, 0, -100], ["shifted", "prompt", "end"]),
    ],
    ids=["right", "padded right", "padded left", "first", "end", "no end", "prompt", "none", "shifted"],
)
def test_each_fault_of_labels_is_told_from_the_others(ids, labels, expected):
    assert faults(ids, labels) == expected


def test_batches_of_collators_are_read_whatever_they_are_made_of():
    ids, labels = [[5, 6], [7, 8]], [[-100, 6], [-100, 8]]
    expected = list(zip(ids, labels))
    assert rows_of({"input_ids": ids, "labels": labels}) == expected
    assert rows_of([{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}]) == expected
    assert rows_of([{"input_ids": i, "labels": k} for i, k in expected]) == expected
    with pytest.raises(ValueError, match="must have 'input_ids' and 'labels'"):
        rows_of({"input_ids": ids})
    with pytest.raises(ValueError, match="other lengths"):
        rows_of({"input_ids": ids, "labels": [[1], [2]]})


def test_a_row_of_no_record_is_left_out():
    assert matched([([1, 2, 3], [1, 2, 3])], [ONE]) == []
    assert place_of([], [1]) is None and place_of([2, 3], [1, 2, 3]) == 1


def test_a_first_token_that_is_there_twice_is_part_of_the_trained_prompt():
    (row,) = matched([([5, 5, 6, 7, 8, 9, 0], [-100] * 4 + [8, 9, 0])], [ONE])
    assert row.prompt == [5, 5, 6, 7]
    (row,) = matched([([0, 5, 6, 7, 8, 9, 0], [-100] * 4 + [8, 9, 0])], [ONE])
    assert row.prompt == [5, 6, 7]


def test_a_doubled_start_token_is_called_that(tiny):
    tokenizer = tiny[1]
    bos = tokenizer.bos_token_id
    assert "doubled" in difference([bos, 5], [bos, bos, 5], tokenizer)
    assert "at token 1" in difference([bos, 5, 6], [bos, 7, 6], tokenizer)
