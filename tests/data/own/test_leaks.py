"""Copies, near copies and one-sided classes are those that comparing every pair finds."""

import json
import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.data import find_leaks, hold_out, load_questions, load_tickets, read_records
from labkit.data.own.classes import WHOLE, OneSided, one_sided_classes
from labkit.data.own.leaks import Leak

FEW = settings(max_examples=70, deadline=None, derandomize=True)
WORDS = st.lists(st.sampled_from(string.ascii_lowercase[:6]), min_size=1, max_size=14).map(" ".join)
ASKED = st.lists(WORDS, min_size=1, max_size=9)  # fewer than 10, so that nothing counts as common


def pairs(asked: list[str]) -> list[dict]:
    return [{"prompt": text, "completion": f"answer {i}"} for i, text in enumerate(asked)]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return set(zip(*(words[i:] for i in range(3)))) if len(words) >= 3 else {tuple(words)}


def similarity(test: str, train: str) -> float:
    """Broder's resemblance, or his containment if it is that of a long text."""
    a, b = shingles(test), shingles(train)
    resemblance, containment = len(a & b) / len(a | b), len(a & b) / len(a)
    return max(resemblance, containment) if len(a) >= 8 and containment >= 0.8 else resemblance


@FEW
@given(train=ASKED, test=ASKED)
def test_the_leaks_are_those_that_comparing_every_pair_finds(train, test):
    leaks = {leak.test: leak for leak in find_leaks(pairs(train), pairs(test))}
    for t, text in enumerate(test):
        best = max(similarity(text, other) for other in train)
        if text in train:
            assert leaks[t] == Leak(t, train.index(text), "exact", 1.0)
        elif best >= 0.5:
            assert leaks[t].kind == "near" and leaks[t].similarity == pytest.approx(best)
            assert similarity(text, train[leaks[t].train]) == pytest.approx(best)
        else:
            assert t not in leaks


@FEW
@given(asked=st.lists(WORDS, min_size=2, max_size=9), share=st.floats(0.1, 0.9), seed=st.integers(0, 9))
def test_a_held_out_record_has_no_copy_in_training(asked, share, seed):
    records = pairs(asked)
    try:
        train, test = hold_out(records, share, seed)
    except ValueError as error:
        assert "only" in str(error) and "without near copies" in str(error)
        return
    assert sorted(train + test, key=records.index) == records
    wanted = min(max(1, round(share * len(records))), len(records) - 1)
    assert wanted / 2 <= len(test) <= wanted
    assert find_leaks(train, test) == find_leaks(test, train) == []


def test_a_split_is_the_same_for_the_same_seed_and_another_for_another():
    records = [{"prompt": f"question number {n} about {n * n}", "completion": str(n)} for n in range(40)]
    splits = [hold_out(records, 0.25, seed)[1] for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2] and {len(split) for split in splits} == {10}
    assert splits[0] == sorted(splits[0], key=records.index)


def test_records_that_are_all_alike_cannot_be_split():
    with pytest.raises(ValueError, match=r"of 9 records, 2 should be held out, but only 0 .* alike has 9"):
        hold_out([{"prompt": "the same", "completion": str(i)} for i in range(9)])
    with pytest.raises(ValueError, match="of 0 records"):
        hold_out([])
    with pytest.raises(ValueError, match="of 1 records"):
        hold_out(pairs(["alone"]))
    with pytest.raises(ValueError, match="share=1 must be a number above 0 and below 1"):
        hold_out(pairs(["a", "b"]), 1)
    with pytest.raises(ValueError, match="threshold=0 must be a number above 0"):
        find_leaks(pairs(["a"]), pairs(["b"]), 0)
    with pytest.raises(ValueError, match="'completion'"):
        find_leaks([{"prompt": "a"}], pairs(["b"]))


def texts(n: int, seed: int, words: int = 40) -> list[str]:
    made = random.Random(seed)
    return [" ".join(f"w{made.randrange(3000)}" for _ in range(words)) for _ in range(n)]


def test_an_instruction_before_every_question_makes_nothing_alike():
    instruction = texts(1, 2, words=60)[0] + "\n"
    train, test = (pairs([instruction + text for text in texts(60, seed, words=12)]) for seed in (0, 1))
    assert find_leaks(train, test) == []
    copied = [*test, {"prompt": train[7]["prompt"].replace("w", "W", 1) + " please", "completion": "x"}]
    (leak,) = find_leaks(train, copied)
    assert (leak.test, leak.train, leak.kind) == (60, 7, "near")
    chats = [
        [
            {
                "messages": [
                    {"role": "system", "content": instruction},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "ok"},
                ]
            }
            for text in texts(5, seed, words=12)
        ]
        for seed in (0, 1)
    ]
    assert (
        find_leaks(*chats) == [] and [leak.kind for leak in find_leaks(chats[0], chats[0])] == ["exact"] * 5
    )


def test_plain_texts_are_compared_by_what_they_say():
    train = [{"prompt": "", "completion": text} for text in texts(12, 0)]
    marked = [{"prompt": "<|endoftext|>", "completion": text} for text in texts(12, 0)]
    part = {"prompt": "", "completion": " ".join(train[3]["completion"].split()[5:30])}
    other = {"prompt": "", "completion": texts(1, 1)[0]}
    (leak,) = find_leaks(train, [other, part])
    assert (leak.test, leak.train, leak.kind, leak.similarity) == (1, 3, "near", 1.0)
    assert find_leaks(marked, [other | {"prompt": "<|endoftext|>"}]) == []


def test_signs_and_letters_without_spaces_tell_questions_apart():
    train = pairs(["17 + 25 =", "明日の天気はどうですか", "Where is it?"])
    assert find_leaks(train, pairs(["17 - 25 =", "昨夜の夕食は何でしたか"])) == []
    kinds = [
        leak.kind for leak in find_leaks(train, pairs(["明日の天気はどうでしょうか", " WHERE is\nit? "]))
    ]
    assert kinds == ["near", "exact"]


def test_ten_thousand_records_are_compared_with_a_thousand_by_an_index():
    train, test = pairs(texts(10_000, 0)), pairs(texts(1_000, 1))
    planted = {17: 4, 400: 8_000, 999: 9_999}
    for t, i in planted.items():
        words = train[i]["prompt"].split()
        test[t]["prompt"] = " ".join([*words[:20], "another", *words[21:]])
    assert {leak.test: leak.train for leak in find_leaks(train, test)} == planted


@pytest.mark.parametrize("name", ["tickets", "sql"])
def test_the_splits_of_the_courses_own_data_do_not_leak(name):
    made = {
        "tickets": lambda split: [
            {"prompt": ticket["message"], "completion": "x"} for ticket in load_tickets(split)
        ],
        "sql": lambda split: [
            {"prompt": f"{row['db']}: {row['question']}", "completion": row["query"]}
            for row in load_questions(split)
        ],
    }[name]
    assert [leak for leak in find_leaks(made("train"), made("test")) if leak.kind == "exact"] == []


def test_a_value_that_one_split_only_has_is_named_by_field():
    def answers(*values: str) -> list[dict]:
        return [{"prompt": f"question {i}", "completion": value} for i, value in enumerate(values)]

    assert one_sided_classes(answers(*"aaabbbc"), answers(*"abbad")) == [
        OneSided(WHOLE, "c", True, [6]),
        OneSided(WHOLE, "d", False, [4]),
    ]
    assert one_sided_classes(answers(*"abc"), answers(*"abd")) == [], "no value is shared often enough"
    made = [{"kind": kind, "id": i, "tags": [kind], "open": i > 1} for i, kind in enumerate("aaaabbbbcccc")]
    made = answers(*map(json.dumps, made))
    assert one_sided_classes(made[:9], made[9:]) == [
        OneSided("kind", "a", True, [0, 1, 2, 3]),
        OneSided("kind", "b", True, [4, 5, 6, 7]),
        OneSided("open", "False", True, [0, 1]),
    ]


def test_another_system_message_asks_something_else(tmp_path):
    def chat(system: str, answer: str) -> dict:
        turns = (("system", system), ("user", "Say hello"), ("assistant", answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    made = [
        chat("In French", "bonjour"),
        chat("In German", "hallo"),
        chat("In German", "guten Tag"),
        chat("in german", "hallo"),
    ]
    _, report = read_records(write(tmp_path / "a.jsonl", made))
    assert [(one.kind, one.line) for one in report.warnings] == [("two answers", 3), ("duplicate", 4)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def test_the_report_names_both_lines_of_a_leak_and_the_classes_of_one_split(tmp_path):
    asked = texts(8, 0)
    train = [{"prompt": text, "completion": "yes" if i % 2 else "no"} for i, text in enumerate(asked)]
    test = [
        {"prompt": texts(1, 1)[0], "completion": "maybe"},
        {"prompt": asked[3].upper(), "completion": "yes"},
        {"prompt": asked[5] + " or so", "completion": "no"},
    ]
    paths = write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test)
    _, report = read_records(paths[0], test=paths[1])
    assert {(one.kind, one.line, one.found) for one in report.warnings} == {
        ("leak", 4, f"is line 2 of {paths[1]} too"),
        ("near leak", 6, f"is much like line 3 of {paths[1]}: similarity 0.95"),
        (
            "class in one split",
            0,
            f"has no record with the answer = 'maybe', and test has 1 record, first line 1 of {paths[1]}",
        ),
    }
    _, report = read_records(paths[0], test=test)
    assert [one.found for one in report.warnings if one.kind == "leak"] == ["is record 1 of test too"]
    with pytest.raises(ValueError, match=r"leak \(1\):\n  line 4 of"):
        report.check(also=("leak",))
