"""What is no data set is refused in one sentence that says what to do."""

from pathlib import Path

import pytest

from labkit.data.records import records_of
from labkit.data.splits import read_jsonl

RECORD = {"prompt": "a", "completion": "b"}


class Table(list):
    """Like a DataFrame: iterating gives the names of its columns."""

    def to_dict(self, orient: str) -> list[dict]:
        raise AssertionError("nothing is converted behind the reader's back")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("file.jsonl", r"data='file.jsonl' is a text, .* read them with labkit.data.read_jsonl\(path\)"),
        (Path("file.jsonl"), r"data=PosixPath\('file.jsonl'\) is a text"),
        (
            RECORD,
            r"data is a dict with the keys \['prompt', 'completion'\], .* put a single record into a list",
        ),
        ({"train": [RECORD], "test": [RECORD]}, "of several splits choose one"),
        (["a", "b"], r"record 0 of data: 'a' is a str, and must be a dict: {'prompt': …, 'completion': …}"),
        ([RECORD, None], "record 1 of data: None is a NoneType"),
        (
            Table(["prompt", "completion"]),
            r"record 0 of data: .*data.to_dict\('records'\) makes records of a table",
        ),
        (None, "data=None must be a list of records"),
        (3, "data=3 must be a list of records"),
    ],
)
def test_what_is_no_list_of_records_is_refused_with_what_to_do(given, message):
    with pytest.raises(ValueError, match=message):
        records_of(given)


def test_whatever_gives_dicts_is_a_list_of_records():
    assert (
        records_of([RECORD])
        == records_of((RECORD,))
        == records_of(dict(RECORD) for _ in range(1))
        == [RECORD]
    )
    assert records_of([]) == []


def test_a_file_of_records_is_read_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "\u2028b"}\n\n{"prompt": "c", "completion": "d"}\n', "utf-8"
    )
    assert (
        read_jsonl(path)
        == read_jsonl(str(path))
        == [RECORD | {"completion": "\u2028b"}, {"prompt": "c", "completion": "d"}]
    )
    for line, message in (
        ("{'prompt': 1}", "line 2 of .*file.jsonl is not JSON"),
        ("[1]", "line 2 .* is a JSON list"),
    ):
        path.write_text(f'{{"prompt": "a", "completion": "b"}}\n{line}\n')
        with pytest.raises(ValueError, match=message):
            read_jsonl(path)
    with pytest.raises(FileNotFoundError, match=r"none.jsonl is missing; check the path"):
        read_jsonl(tmp_path / "none.jsonl")
