"""The recipe of the questions: the same files again, and rows that distinguish right from wrong."""

import itertools
import re

import pytest

from labkit.data import sql
from labkit.paths import data_folder
from recipes.sql_questions.__main__ import main as write_data
from recipes.sql_questions.generate import distinguished, is_trivial
from recipes.sql_questions.near_misses import core, spare
from recipes.sql_questions.tables import read_schemas


@pytest.fixture(scope="module")
def splits():
    return {split: sql.load_questions(split) for split in sql.SQL_SPLITS}


@pytest.fixture(scope="module")
def connections(splits):
    return {db: sql.database(db) for rows in splits.values() for db in {item["db"] for item in rows}}


def sheet() -> str:
    return (data_folder() / "sql" / "README.md").read_text(encoding="utf-8")


def test_the_recipe_writes_the_committed_files_byte_for_byte(tmp_path):
    write_data(tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(made) == {"databases.json", "train.jsonl", "validation.jsonl", "test.jsonl", "more.jsonl"}
    for name, content in made.items():
        assert content == (data_folder() / "sql" / name).read_bytes(), name
    assert sum(map(len, made.values())) < 2_000_000


def test_every_reference_query_returns_something_and_is_right(splits, connections):
    for rows in splits.values():
        for item in rows:
            result = sql.execute(connections[item["db"]], item["query"])
            assert not result.error and result.rows, item
            assert not is_trivial(connections[item["db"]], item["query"], sql.tables(item["db"])), item
        score = sql.score_sql([item["query"] for item in rows], rows)
        assert score.execution_accuracy == score.exact_match == 1 and not score.wrong
        assert set(score.per_kind.values()) == {1.0}


def test_core_near_misses_are_all_distinguished_and_others_nearly_all(splits, connections):
    passed = {"spare": 0, "other": 0}
    tried = {"spare": 0, "other": 0}
    for rows in splits.values():
        for item in rows:
            connection, content = connections[item["db"]], sql.tables(item["db"])
            misses = core(item["query"], content)
            assert misses and item["query"] not in misses
            assert all(distinguished(connection, item["query"], misses)), item
            apart = distinguished(connection, item["query"], spare(item["query"], content))
            tried["spare"] += len(apart)
            passed["spare"] += apart.count(False)
    of_test = {}
    for item in splits["test"]:
        of_test.setdefault(item["db"], set()).add(item["query"])
    for db, queries in of_test.items():
        for right, wrong in itertools.permutations(sorted(queries), 2):
            tried["other"] += 1
            passed["other"] += not distinguished(connections[db], right, [wrong])[0]
    assert tried["spare"] > 2000 and tried["other"] > 4000
    assert passed["spare"] / tried["spare"] < 0.05 and passed["other"] / tried["other"] < 0.005
    for name in tried:
        assert f"{passed[name]:,} of {tried[name]:,}" in sheet(), (name, passed[name], tried[name])


def skeletons(splits, split):
    """Questions without the words of their database: names of columns and of rows, values and numbers."""
    words = {name: [] for name, _, _ in read_schemas()}
    for name, _, tables in read_schemas():
        for table in tables:
            words[name] += [table.singular, table.plural]
            for column in table.columns:
                words[name] += [*column.words, *column.values.split("; "), *column.said.split("/")]
    made = set()
    for item in splits[split]:
        text = item["question"].lower()
        quoted = re.findall(r"'%?([^'%]*)%?'", item["query"])
        for word in sorted({w.lower() for w in [*words[item["db"]], *quoted] if w}, key=len, reverse=True):
            text = re.sub(rf"\b{re.escape(word)}\b", "_", text)
        made.add(re.sub(r"\d+(\.\d+)?|\b(two|three|four|five)\b", "0", text))
    return made


def test_no_question_of_test_is_in_train_or_more_once_its_own_words_are_taken_out(splits):
    held_out = skeletons(splits, "test") | skeletons(splits, "validation")
    for split in ("train", "more"):
        seen = skeletons(splits, split)
        assert len(seen) > 300 and not seen & held_out
