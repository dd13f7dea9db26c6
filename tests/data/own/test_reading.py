"""Your own file becomes labkit's records, and the report counts right."""

import csv
import json
import os

import pytest

from labkit.data import encode, read_records
from labkit.data.own.report import FaultyData
from tests.data.tokenizers import tiny_llama


def write(path, raw: bytes):
    path.write_bytes(raw)
    return path


def test_a_text_is_learned_as_a_whole_and_tools_stay_with_a_chat(tmp_path):
    path = write(
        tmp_path / "a.jsonl", b'{"text": "Call me Ishmael.", "book": 1}\n\n{"text": "It was a bright day."}\n'
    )
    records, report = read_records(path)
    assert records == [
        {"prompt": "", "completion": "Call me Ishmael."},
        {"prompt": "", "completion": "It was a bright day."},
    ]
    assert report.form == "text" and report.lines == [1, 3] and report.n_lines == 3
    assert report.other_fields == {"book": 1} and "not read: book (1)" in str(report)

    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    chat = {
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "17:30"},
            {"role": "assistant", "content": "Half past five."},
        ],
        "tools": [{"type": "function", "function": {"name": "clock"}}],
    }
    records, _ = read_records(write(tmp_path / "b.jsonl", json.dumps(chat | {"id": 7}).encode()))
    assert records == [chat]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_two_columns_are_named_in_csv_and_in_json(tmp_path, name):
    row = {"id": "7", "question": "2 + 2, please?", "answer": "4"}
    table = 'id,question,answer\n7,"2 + 2, please?",4\n'
    path = write(tmp_path / name, (table if name.endswith("csv") else json.dumps(row)).encode())
    records, report = read_records(path, columns=("question", "answer"))
    assert records == [{"prompt": "2 + 2, please?", "completion": "4"}] and report.other_fields == {"id": 1}
    with pytest.raises(FaultyData, match="has the (columns|fields) .*'question'"):
        read_records(path)


def test_a_column_may_be_called_as_a_parquet_file_begins(tmp_path):
    path = write(tmp_path / "a.csv", b"PAR1,prompt,completion\n1,a,b\n")
    assert read_records(path)[0] == [{"prompt": "a", "completion": "b"}]


def test_lengths_are_those_of_training_and_the_too_long_are_warned_of(tmp_path):
    tokenizer = tiny_llama()
    given = [{"prompt": "a " * n, "completion": "b"} for n in (1, 5, 40, 60)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, given)).encode())
    records, report = read_records(path, tokenizer, max_length=20)
    encoded = [encode(record, tokenizer) for record in records]
    assert records == given
    assert report.lengths == [len(e) for e in encoded] and report.supervised == [
        e.n_supervised for e in encoded
    ]
    assert report.n_too_long == report.counts["too long"] == 2
    assert [(one.kind, one.line) for one in report.warnings] == [("too long", 3), ("too long", 4)]
    assert report.quantile(0.5) == sorted(report.lengths)[2] and report.quantile(1) == max(report.lengths)
    bars = report.histogram(bins=4).split("\n")
    assert [int(bar.split()[-1 if "max_length" not in bar else -3]) for bar in bars] == [2, 0, 1, 1]
    assert bars[1].endswith("← max_length") is (max(report.lengths) / 4 < 20)
    tokenizer.model_max_length = 50
    assert read_records(path, tokenizer)[1].max_length == 50
    tokenizer.model_max_length = int(1e30)
    assert read_records(path, tokenizer)[1].max_length is None
    without = read_records(path)[1]
    assert without.lengths == [] and without.histogram() == "" and without.n_too_long == 0
    with pytest.raises(ValueError, match="give read_records a tokenizer"):
        without.quantile(0.5)


TURNS = "{% for m in messages %}{{ m.role }}: CONTENT\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("template", "n_sound", "reason"),
    [
        (TURNS.replace("CONTENT", "{{ m.content[:9] }}"), 1, "loses the content 'a long answer'"),
        (TURNS.replace("CONTENT", "{{ m.content | upper }}"), 1, "loses the content 'a long answer'"),
        ("{{ raise_exception('no digits, please') }}", 0, "no digits, please"),
        (None, 0, "no chat template"),
    ],
    ids=["cuts", "alters", "refuses", "none"],
)
def test_an_answer_that_the_template_does_not_write_in_full_is_a_fault(tmp_path, template, n_sound, reason):
    tokenizer = tiny_llama()
    tokenizer.chat_template = template
    chats = [
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": answer}]}
        for answer in ("42", "a long answer")
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, chats)).encode())
    records, report = read_records(path, tokenizer, faulty="leave out")
    assert records == chats[:n_sound] and len(report.lengths) == n_sound
    assert [(one.kind, one.line) for one in report.faults] == [
        ("cannot be encoded", line) for line in (1, 2)
    ][n_sound:]
    assert reason in report.faults[-1].found
    assert len(read_records(path)[0]) == 2, "without a tokenizer, nobody can know"


def test_a_test_file_is_looked_at_in_the_same_way(tmp_path):
    train = write(tmp_path / "train.jsonl", b'{"prompt": "a", "completion": "b"}')
    test = write(tmp_path / "test.jsonl", b'{"prompt": "c", "completion": "d"}\n{"prompt": "BROKEN"}\n')
    with pytest.raises(FaultyData, match=r"test.jsonl has 1 fault\nmissing field"):
        read_records(train, test=test)
    _, report = read_records(train, test=test, faulty="leave out")
    assert report.test_records == [{"prompt": "c", "completion": "d"}] and report.n_faults == 0
    assert [(one.kind, one.line) for one in report.test.faults] == [("missing field", 2)]
    assert "missing field (1)" in str(report)
    same = read_records(train, test=report.test_records)[1]
    assert same.test is None and same.test_records == report.test_records
    with pytest.raises(ValueError, match="record 0 of test: 'x' is a str"):
        read_records(train, test=["x"])


def test_the_report_stays_in_its_frame_in_a_notebook(tmp_path):
    path = write(
        tmp_path / "a.jsonl", b'{"prompt": "a", "completion": "b"}\n```` <script>alert(1)</script>\n'
    )
    shown = read_records(path, faulty="leave out")[1]._repr_markdown_().split("\n")
    assert shown[0] == "`````text" and shown[-1] == "`````" and "`````" not in "".join(shown[1:-1])


def test_a_warning_raises_where_it_is_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 2)
    _, report = read_records(path)
    report.check()
    with pytest.raises(FaultyData, match=r"duplicate \(1\):\n  line 2 of .* the same as line 1"):
        report.check(also=("duplicate",))
    with pytest.raises(ValueError, match="also='duplicates' is not known.*did you mean 'duplicate'"):
        report.check(also=("duplicates",))


def test_a_path_or_setting_that_cannot_be_is_refused_with_what_to_do(tmp_path):
    good = write(tmp_path / "a.jsonl", b'{"prompt": "a", "completion": "b"}')
    for change, message in (
        ({"path": tmp_path}, r"is a folder; name the file in it, one of \['a.jsonl'\]"),
        ({"path": good.with_suffix(".txt")}, "is missing; check the path"),
        ({"path": 3}, "path=3 must be the path of a file"),
        ({"path": ""}, "path='' must be the path of a file"),
        ({"columns": "prompt"}, "columns='prompt' must be the names of two columns"),
        ({"columns": ("a", "a")}, "must be the names of two columns"),
        ({"columns": ("a", 1)}, "must be the names of two columns"),
        ({"max_length": 0}, "max_length=0 must be a whole number"),
        ({"faulty": "skip"}, "faulty='skip' is not known"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_records(**{"path": good} | change)
    with pytest.raises(ValueError, match="ends in '.txt'; name the file .jsonl"):
        read_records(write(tmp_path / "b.txt", b"x"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="not a regular file"):
        read_records(tmp_path / "pipe.jsonl")
    with open(tmp_path / "large.jsonl", "wb") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(ValueError, match="at most 268,435,456 are read"):
        read_records(tmp_path / "large.jsonl")
    assert read_records(str(good))[0] == read_records(good)[0] == [{"prompt": "a", "completion": "b"}]


def test_the_csv_module_keeps_its_limit_and_a_long_value_is_read(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", b"prompt,completion\na," + b"b" * (before + 1) + b"\n")
    assert len(read_records(path)[0][0]["completion"]) == before + 1 and csv.field_size_limit() == before
