"""Questions to SQL: the data is as the datasheet says, and the splits are separate; a judge that is safe."""

import itertools
import math
import re
import sqlite3

import pytest

from labkit.data import sql
from labkit.data.encoding import encode_all
from labkit.paths import data_folder

SIZES = {"train": 1680, "validation": 150, "test": 200, "more": 2100}
BOOKS = {
    "books": {
        "columns": {"title": "TEXT", "pages": "INTEGER", "price": "REAL"},
        "rows": [["Ash", 100, 9.5], ["Bay", 300, 4.1], ["Cod", 200, 7.3], ["Dew", 300, 7.3]],
    }
}


@pytest.fixture(scope="module")
def splits():
    return {split: sql.load_questions(split) for split in sql.SQL_SPLITS}


@pytest.fixture(scope="module")
def connections(splits):
    return {db: sql.database(db) for rows in splits.values() for db in {item["db"] for item in rows}}


@pytest.fixture
def books():
    return sql.connect(BOOKS)


def sheet() -> str:
    return (data_folder() / "sql" / "README.md").read_text(encoding="utf-8")


def test_there_are_as_many_as_the_datasheet_says(splits):
    assert {split: len(rows) for split, rows in splits.items()} == SIZES
    for kind in {item["kind"] for item in splits["train"]}:
        counts = [sum(item["kind"] == kind for item in splits[split]) for split in sql.SQL_SPLITS]
        assert min(counts) > 0 and f"| `{kind}` | " in sheet()
        assert f"| {' | '.join(map(str, counts))} |" in next(
            line for line in sheet().splitlines() if line.startswith(f"| `{kind}` |")
        )
    for split, rows in splits.items():
        assert f"| {split} | {len(rows):,} | {len({item['db'] for item in rows})} |" in sheet()


def test_tables_have_12_to_30_rows_and_names_of_columns_are_not_ambiguous(splits):
    for item in itertools.chain(*splits.values()):
        content = sql.tables(item["db"])
        columns = [column for table in content.values() for column in table["columns"]]
        assert len(columns) == len(set(columns)) and 1 <= len(content) <= 2
        assert all(12 <= len(table["rows"]) <= 30 for table in content.values())


def test_databases_tables_and_phrasings_of_a_split_are_in_no_other(splits):
    for one, other in itertools.combinations(sql.SQL_SPLITS, 2):
        dbs = [{item["db"] for item in splits[split]} for split in (one, other)]
        assert not dbs[0] & dbs[1]
        names = [{table for db in some for table in sql.tables(db)} for some in dbs]
        assert not names[0] & names[1]
        frames = [{item["pattern"].split(" | ")[0] for item in splits[split]} for split in (one, other)]
        assert min(map(len, frames)) >= 30
        if (one, other) != ("train", "more"):  # more has the phrasings of train, and others
            assert not frames[0] & frames[1]
        else:
            assert len(frames[1] - frames[0]) > len(frames[1]) / 3


def test_no_frame_or_condition_of_more_is_in_validation_or_test(splits):
    used = {s: {p for item in splits[s] for p in item["pattern"].split(" | ") if p} for s in splits}
    assert not used["more"] & (used["validation"] | used["test"])


def test_no_question_occurs_twice(splits):
    asked = [item["question"].lower() for rows in splits.values() for item in rows]
    assert len(set(asked)) == len(asked)
    for split in ("validation", "test"):
        queries = [(item["db"], item["query"]) for item in splits[split]]
        assert len(set(queries)) == len(queries)


def test_every_value_of_a_query_stands_in_its_question(splits):
    words = {2: "two", 3: "three", 4: "four", 5: "five"}
    for item in itertools.chain(*splits.values()):
        query, limit = re.sub(r" LIMIT (\d+)", "", item["query"]), re.search(r" LIMIT (\d+)", item["query"])
        for value in re.findall(r"'%?([^'%]*)%?'", query) + re.findall(r"[<>=] ([\d.]+)", query):
            assert value in item["question"], item
        if limit and limit.group(1) != "1":
            k = limit.group(1)
            assert re.search(rf"\b({k}|{words[int(k)]})\b", item["question"]), item


def test_records_fit_into_128_tokens_in_both_forms(splits, tokenizer):
    for form in ("chat", "plain"):
        records = [sql.sql_record(item, form) for rows in splits.values() for item in rows]
        encoded, too_long = encode_all(records, tokenizer, max_length=128)
        assert not too_long and len(encoded) == sum(SIZES.values())
    item = splits["test"][0]
    plain = sql.sql_record(item, "plain")
    assert plain["prompt"].startswith("<|endoftext|>") and plain["completion"] == item["query"]
    assert sql.schema_text(item["db"]) in plain["prompt"] and item["question"] in plain["prompt"]
    with pytest.raises(ValueError, match="form='json' is not known"):
        sql.sql_record(item, "json")


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM books",
        "DROP TABLE books",
        "UPDATE books SET pages = 1",
        "INSERT INTO books VALUES ('x', 1, 1)",
        "ATTACH 'x.db' AS x",
        "PRAGMA table_info(books)",
        "EXPLAIN SELECT * FROM books",
        "SELECT * FROM pragma_table_info('books')",
        "SELECT * FROM sqlite_master",
        "WITH gone AS (SELECT 1) DELETE FROM books",
        "SELECT title FROM books; DELETE FROM books",
        "SELECT title FROM books; SELECT title FROM books",
        "SELECT load_extension('x')",
        "SELECT writefile('x', 'y')",
        "SELECT zeroblob(1000000000)",
        "SELECT randomblob(1000000000)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "SELECT COUNT(*) FROM books a, books b, books c, books d, books e, books f, books g, books h, books i, books j, books k",
        "SELECT a.title FROM books a, books b, books c, books d, books e, books f",
        "SELECT nothing FROM books",
        "SELECT",
        "no query at all",
        "",
        " ",
        "SELECT title\0 FROM books",
        "SELECT '\ud800'",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT '" + "x" * 200_000 + "'",
        None,
        math.nan,
        7,
    ],
)
def test_harm_nonsense_and_endless_work_come_back_as_an_error(books, query):
    result = sql.execute(books, query)
    assert result.error and result.rows == []
    assert sql.execute(books, "SELECT COUNT(*) FROM books").rows == [(4,)]


def test_the_steps_allowed_are_far_from_what_reference_queries_take(monkeypatch, splits, connections):
    monkeypatch.setattr(sql, "MAX_STEPS", sql.MAX_STEPS // 100)
    assert all(
        not sql.execute(connections[i["db"]], i["query"]).error for i in splits["train"] + splits["more"]
    )


def test_a_database_can_only_be_read(books):
    for statement in ("DELETE FROM books", "CREATE TABLE more (x)", "PRAGMA query_only = 0"):
        with pytest.raises(sqlite3.DatabaseError):
            books.execute(statement)


def test_plain_selects_of_many_shapes_run(books):
    for query in (
        "select title from books where pages > (select avg(pages) from books)",
        "WITH long AS (SELECT * FROM books WHERE pages > 150) SELECT COUNT(*) FROM long",
        "SELECT a.title, b.title FROM books AS a JOIN books AS b ON a.pages = b.pages",
        "SELECT ROUND(AVG(price), 1), UPPER(MIN(title)) FROM books;",
        "SELECT pages, COUNT(*) FROM books GROUP BY pages HAVING COUNT(*) > 1",
    ):
        result = sql.execute(books, query)
        assert not result.error and result.rows, (query, result)


def agree(connection, query, gold):
    a, b = sql.execute(connection, query), sql.execute(connection, gold)
    assert not a.error and not b.error
    return sql.same_rows(a.rows, b.rows, sql.is_ordered(gold))


def test_rows_are_a_multiset_unless_the_reference_orders_them(books):
    assert agree(books, "SELECT title FROM books ORDER BY title DESC", "SELECT title FROM books")
    up, down = (
        "SELECT title FROM books ORDER BY price, title",
        "SELECT title FROM books ORDER BY price DESC, title",
    )
    assert not agree(books, down, up) and not agree(books, "SELECT title FROM books", up)
    assert not agree(books, "SELECT DISTINCT pages FROM books", "SELECT pages FROM books")


def test_columns_keep_their_order_and_values_their_type(books):
    assert not agree(books, "SELECT pages, title FROM books", "SELECT title, pages FROM books")
    assert not agree(books, "SELECT title, pages FROM books", "SELECT title FROM books")
    assert not agree(books, "SELECT '100'", "SELECT 100")
    assert not agree(books, "SELECT NULL", "SELECT 0") and agree(books, "SELECT NULL", "SELECT NULL")


def test_floats_agree_within_a_millionth_and_an_int_with_its_float(books):
    assert agree(books, "SELECT SUM(pages) * 1.0 / COUNT(*) FROM books", "SELECT AVG(pages) FROM books")
    assert agree(books, "SELECT 0.1 + 0.2", "SELECT 0.3") and agree(books, "SELECT 225.0", "SELECT 225")
    assert not agree(books, "SELECT 7.0501", "SELECT AVG(price) FROM books")


def test_exact_match_ignores_spacing_case_and_semicolon_but_not_case_in_quotes():
    same = "select  Title from books\nwhere title='Ash' ;"
    assert sql.normal_form(same) == sql.normal_form("SELECT title FROM books WHERE title = 'Ash'")
    assert sql.normal_form("SELECT COUNT( * ) FROM t") == sql.normal_form("select count(*) from t")
    assert sql.normal_form("SELECT 'Ash'") != sql.normal_form("SELECT 'ash'")
    assert not sql.is_ordered("SELECT title FROM books WHERE title = 'no order  by'")


def test_a_score_counts_what_is_right_exact_and_valid(splits):
    items = splits["test"][:6]
    answers = [item["query"] for item in items]
    first = next(iter(sql.tables(items[1]["db"])))
    answers[0] = (
        f"SELECT * FROM ({answers[0].rstrip(';')})" if "ORDER" not in answers[0] else answers[0] + " "
    )
    answers[1:5] = [f"SELECT * FROM {first}", "", None, "DROP TABLE x"]
    score = sql.score_sql(answers, items)
    assert (score.n, score.executed, score.valid, score.wrong) == (6, 2, 3, [1, 2, 3, 4])
    assert score.exact <= 2 and score.execution_accuracy == 2 / 6
    assert "execution accuracy 2/6 = 33%" in str(score)


def test_scoring_refuses_what_cannot_be_scored(splits):
    items = splits["test"][:2]
    for answers, some in (([], []), (["SELECT 1"], items)):
        with pytest.raises(ValueError, match="give one answer for each"):
            sql.score_sql(answers, some)
    with pytest.raises(ValueError, match="does not run"):
        sql.score_sql(["SELECT 1"], [items[0] | {"query": "SELECT nothing FROM nowhere"}])


def test_unknown_split_database_and_missing_folder(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="split='dev' is not known"):
        sql.load_questions("dev")
    with pytest.raises(ValueError, match="db='nowhere' is not known"):
        sql.database("nowhere")
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set LABKIT_DATA"):
        sql.load_questions("train")
