"""Whatever is in a file, only sound records come back, and of a good one all of them, as they were written."""

import csv
import io
import json

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit.data import encode, read_records
from labkit.data.own.report import FaultyData
from tests.data.tokenizers import tiny_llama

BOM = b"\xef\xbb\xbf"
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
ANSWERS = TEXTS.filter(str.strip)
PAIRS = st.lists(st.fixed_dictionaries({"prompt": TEXTS, "completion": ANSWERS}), min_size=1, max_size=5)
CHATS = st.lists(
    st.builds(
        lambda system, turns: {
            "messages": [
                *([{"role": "system", "content": system}] if system is not None else []),
                *(
                    {"role": role, "content": text}
                    for turn in turns
                    for role, text in zip(("user", "assistant"), turn)
                ),
            ]
        },
        st.none() | TEXTS,
        st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=4,
)
FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def write(path, raw: bytes):
    path.write_bytes(raw)
    return path


@FEW
@given(records=PAIRS | CHATS, bom=st.booleans(), end=st.sampled_from(["\n", "\r\n"]), plain=st.booleans())
def test_json_lines_give_back_what_json_wrote(tmp_path, records, bom, end, plain):
    text = "".join(json.dumps(record, ensure_ascii=plain) + end for record in records)
    found, report = read_records(write(tmp_path / "a.jsonl", BOM * bom + text.encode()))
    assert found == records and report.lines == list(range(1, len(records) + 1))
    assert report.has_bom is bom and report.newlines == {"\n": "LF", "\r\n": "CRLF"}[end]
    assert report.form == ("messages" if "messages" in records[0] else "prompt/completion")


@FEW
@given(records=PAIRS | CHATS, indent=st.sampled_from([None, 0, 2]), bom=st.booleans())
def test_a_json_list_gives_back_what_json_wrote_with_the_line_of_each_record(tmp_path, records, indent, bom):
    raw = json.dumps(records, indent=indent).encode()
    found, report = read_records(write(tmp_path / "a.json", BOM * bom + raw))
    assert found == records
    lines = raw.decode().split("\n")
    for line in report.lines:
        assert lines[line - 1].lstrip("[ ").startswith("{")
    assert sorted(set(report.lines)) == report.lines or indent is None


@FEW
@given(records=PAIRS, bom=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_gives_what_pandas_reads_in_it(tmp_path, records, bom, end):
    made = io.StringIO()
    writer = csv.DictWriter(made, ["completion", "id", "prompt"], lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(record | {"id": i} for i, record in enumerate(records))
    path = write(tmp_path / "a.csv", BOM * bom + made.getvalue().encode())
    found, report = read_records(path)
    assert found == records and report.other_fields == {"id": len(records)}
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not any(
        "\r" in text for record in records for text in record.values()
    ):  # which pandas may turn into LF
        assert found == table[["prompt", "completion"]].to_dict("records")


@FEW
@given(raw=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv"]))
def test_of_any_bytes_whatever_only_sound_records_come_back(tmp_path, raw, suffix):
    check_sound(write(tmp_path / f"a{suffix}", raw))


@settings(FEW, max_examples=200)
@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".json", ".csv"]))
def test_of_a_file_damaged_anywhere_only_sound_records_come_back(tmp_path, data, suffix):
    records = data.draw(PAIRS if suffix == ".csv" else PAIRS | CHATS)
    if suffix == ".csv":
        made = io.StringIO()
        csv.writer(made).writerows(
            [["prompt", "completion"], *([r["prompt"], r["completion"]] for r in records)]
        )
        raw = made.getvalue().encode()
    elif suffix == ".json":
        raw = json.dumps(records, indent=data.draw(st.sampled_from([None, 1]))).encode()
    else:
        raw = "\n".join(map(json.dumps, records)).encode()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw)))
        piece = data.draw(
            st.sampled_from([b"", b'"', b",", b"{", b"]", b"\n", b"\r", b"\0", b"\xff", b"\\ud800", BOM])
        )
        raw = raw[:place] + piece + raw[place + data.draw(st.integers(0, 3)) :]
    check_sound(write(tmp_path / f"a{suffix}", raw))


LEAVES = st.none() | st.booleans() | st.integers(-2, 2) | st.just(0.5) | st.sampled_from(["", "a b", "user"])
KEYS = st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "text", "type"])
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=6
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.just("a b") | VALUES},
    optional={"tool_calls": VALUES, "reasoning": VALUES},
)
TURNS = (
    "{% for t in tools or [] %}{{ t }}{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ m.tool_calls or '' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_llama()
    made.chat_template = TURNS
    return made


@settings(FEW, max_examples=100)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"messages": st.lists(MESSAGES, min_size=1, max_size=3)}, optional={"tools": VALUES}
        )
        | st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "text"]), VALUES),
        min_size=1,
        max_size=3,
    )
)
def test_of_any_json_whatever_each_record_that_comes_back_can_be_encoded(tmp_path, tokenizer, rows):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    records, report = read_records(path, tokenizer, faulty="leave out")
    assert report.lengths == [len(encode(record, tokenizer)) for record in records]
    faulty = {one.line for one in report.faults}
    assert faulty.isdisjoint(report.lines) and faulty | set(report.lines) == set(range(1, len(rows) + 1))


def check_sound(path) -> None:
    """Nothing but records to train on, each with its line; and an error if anything else is in the file."""
    records, report = read_records(path, faulty="leave out")
    assert len(records) == len(report.lines) and all(1 <= line <= report.n_lines for line in report.lines)
    for record in records:
        if "messages" in record:
            assert [m["role"] for m in record["messages"]][-1] == "assistant"
            texts = [m["content"] for m in record["messages"]]
        else:
            assert list(record) == ["prompt", "completion"]
            texts = list(record.values())
        assert texts[-1].strip() and "\0" not in "".join(texts)
        "".join(texts).encode()  # no half of a surrogate pair
    assert records or report.faults
    if report.faults:
        with pytest.raises(FaultyData):
            read_records(path)
    else:
        assert read_records(path)[0] == records
    assert str(report) and report._repr_markdown_()


@FEW
@given(records=PAIRS.filter(lambda r: len(r) > 1), data=st.data())
def test_a_damaged_line_takes_no_other_line_with_it(tmp_path, records, data):
    lines = [json.dumps(record).encode() for record in records]
    bad = data.draw(st.integers(0, len(lines) - 1))
    place = data.draw(st.integers(0, len(lines[bad]) - 1))
    lines[bad] = lines[bad][:place] + b"\xff" + lines[bad][place + 1 :]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    found, report = read_records(path, faulty="leave out")
    assert found == records[:bad] + records[bad + 1 :]
    assert [(one.kind, one.line) for one in report.faults] == [("not UTF-8", bad + 1)]
