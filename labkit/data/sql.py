"""A question about a small database → the SQL query that answers it, judged by running it.

A query is right when it *returns* what the reference query returns: "execution accuracy" (Zhong et al. 2017,
arXiv:1709.00103; Yu et al. 2018, arXiv:1809.08887). Exact match of the text would call `WHERE a = 1 AND b =
2` wrong where the reference says `b = 2 AND a = 1`; execution calls a wrong query right when it returns the
same by accident. The rows under data/sql were chosen to make such accidents rare, and data/sql/README.md says
how rare.

What a model writes is run as given, so it runs where it can do no harm: in a database in memory, behind an
authorizer that permits only reading its tables and a dozen harmless functions, and with bounds on steps, rows
and the size of a value.
"""

import json
import math
import re
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from labkit.checks import check_choice
from labkit.data.passages import DOCUMENT_START
from labkit.data.splits import SPLITS, read_jsonl, read_text
from labkit.paths import data_folder

SQL_INSTRUCTION = "Question to SQL."
MAX_STEPS = 1_000_000  # of SQLite's virtual machine, some 0.1 s; a reference query takes less than 2,000
MAX_ROWS = 1_000
MAX_BYTES = 100_000  # of one value, and of a query
FUNCTIONS = frozenset([
    "abs", "avg", "coalesce", "count", "ifnull", "length", "like", "lower", "max", "min", "nullif", "round", "substr",
    "substring", "sum", "total", "trim", "upper",
])  # fmt: skip
SQL_SPLITS = (*SPLITS, "more")
TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|\w+(?:\.\w+)*|<=|>=|<>|!=|\S")


def load_questions(split: str) -> list[dict]:
    """Questions with the query to write: `{"db", "question", "query", "kind", "pattern"}`.

    See data/sql/README.md.

    Args:
        split: "train", "validation" or "test": no database and no phrasing is in two of them. Or "more":
            further questions to train on, about databases of their own, in the phrasings of "train" and
            others.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: the data folder is missing.
    """
    check_choice("split", split, SQL_SPLITS)
    return read_jsonl(data_folder() / "sql" / f"{split}.jsonl")


def tables(db: str) -> dict[str, dict]:
    """The tables of a database: `{table: {"columns": {name: type}, "rows": [[…], …]}}`.

    Raises:
        ValueError: there is no such database.
    """
    known = parsed_databases(data_folder())
    check_choice("db", db, known)
    return known[db]


@lru_cache(maxsize=2)
def parsed_databases(folder: Path) -> dict[str, dict]:
    """The databases in a data folder, read once."""
    return json.loads(read_text(folder / "sql" / "databases.json"))


def schema_text(db: str) -> str:
    """The schema as in the prompt, one line per table: `books(title, genre, pages)`.

    Without types: they would cost tokens.
    """
    return "\n".join(f"{name}({', '.join(table['columns'])})" for name, table in tables(db).items())


def sql_record(item: dict, form: str = "chat") -> dict:
    """A question as a record for `labkit.train`: schema and question, and the query as the answer.

    Args:
        item: of `load_questions`.
        form: "chat" for a model with a chat template; "plain" for one without, such as tiny-llama: it begins
            with the end-of-text token, as every document of its pretraining did.

    Raises:
        ValueError: unknown form.
    """
    check_choice("form", form, ("chat", "plain"))
    asked = f"{schema_text(item['db'])}\n{item['question']}"
    if form == "chat":
        return {
            "messages": [
                {"role": "system", "content": SQL_INSTRUCTION},
                {"role": "user", "content": asked},
                {"role": "assistant", "content": item["query"]},
            ]
        }
    return {"prompt": f"{DOCUMENT_START}{asked}\n", "completion": item["query"]}


def connect(content: dict[str, dict]) -> sqlite3.Connection:
    """A database in memory with the given `tables`, filled and then locked: it can only be read."""
    connection = sqlite3.connect(":memory:")
    for name, table in content.items():
        columns = ", ".join(f"{column} {kind}" for column, kind in table["columns"].items())
        connection.execute(f"CREATE TABLE {name} ({columns})")
        marks = ", ".join("?" * len(table["columns"]))
        connection.executemany(f"INSERT INTO {name} VALUES ({marks})", table["rows"])
    connection.commit()
    readable = frozenset(content)

    def authorize(action, first, second, database, trigger):
        allowed = (
            action == sqlite3.SQLITE_SELECT
            or (action == sqlite3.SQLITE_READ and first in readable)
            or (action == sqlite3.SQLITE_FUNCTION and second.lower() in FUNCTIONS)
        )
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
    connection.set_authorizer(authorize)
    return connection


def database(db: str) -> sqlite3.Connection:
    """A database of the data set, in memory and read-only.

    Raises:
        ValueError: there is no such database.
    """
    return connect(tables(db))


@dataclass(frozen=True)
class Result:
    """What a query returned: its rows, or why there are none."""

    rows: list[tuple]
    error: str = ""


def execute(db: str | sqlite3.Connection, query: str) -> Result:
    """Run a query that nobody has read. Whatever is wrong with it comes back as `Result.error`, never as an
    exception.

    Args:
        db: a name, or a connection from `database`, which saves filling it again.
        query: one SELECT statement.
    """
    if not isinstance(query, str) or not re.match(r"\s*(select|with)\b", query, re.IGNORECASE):
        return Result([], "not a SELECT statement")
    connection = database(db) if isinstance(db, str) else db
    calls = 0

    def over_budget() -> bool:
        nonlocal calls
        calls += 1
        return calls > MAX_STEPS // 1000

    connection.set_progress_handler(over_budget, 1000)
    try:
        rows = connection.execute(query).fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        stopped = calls > MAX_STEPS // 1000
        return Result([], f"stopped after {MAX_STEPS:,} steps" if stopped else f"{error}")
    finally:
        connection.set_progress_handler(None, 0)
    return Result([], f"more than {MAX_ROWS:,} rows") if len(rows) > MAX_ROWS else Result(rows)


def same_rows(rows: Sequence[tuple], gold: Sequence[tuple], ordered: bool) -> bool:
    """Are these the same rows? As multisets unless `ordered`; columns in order; floats within a millionth."""
    if len(rows) != len(gold):
        return False
    if not ordered:
        rows, gold = sorted(rows, key=sort_key), sorted(gold, key=sort_key)
    return all(len(a) == len(b) and all(map(same_value, a, b)) for a, b in zip(rows, gold))


def sort_key(row: tuple) -> list[tuple]:
    """Numbers before texts before the rest; floats to six digits, so rounding does not reorder rows."""
    return [
        (0, float(f"{v:.6g}"), "")
        if isinstance(v, int | float)
        else (1, 0.0, v)
        if isinstance(v, str)
        else (2, 0.0, repr(v))
        for v in row
    ]


def same_value(a: object, b: object) -> bool:
    """Are these equal, floats within a millionth? An int equals its float; a text never equals a number."""
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return type(a) is type(b) and a == b


def is_ordered(query: str) -> bool:
    """Does the order of the rows matter for this query?"""
    return "order by" in normal_form(query)


def normal_form(query: str) -> str:
    """A query's text without differences of spacing, of case outside quotes, and of a final semicolon."""
    parts = TOKEN.findall(query.strip().rstrip(";"))
    return " ".join(part if part[0] in "'\"" else part.lower() for part in parts)


@dataclass(frozen=True)
class SQLScore:
    """Of `n` queries: how many return the reference's result, equal its text, and run without an error."""

    n: int
    executed: int
    exact: int
    valid: int
    per_kind: dict[str, float]
    wrong: list[int]  # indices of answers that do not return the reference's result

    @property
    def execution_accuracy(self) -> float:
        return self.executed / self.n

    @property
    def exact_match(self) -> float:
        return self.exact / self.n

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in self.per_kind.items())
        return (
            f"execution accuracy {self.executed}/{self.n} = {self.execution_accuracy:.0%} "
            f"(exact match {self.exact}/{self.n}, runs {self.valid}/{self.n}; {kinds})"
        )


def score_sql(answers: Sequence[str], items: Sequence[dict]) -> SQLScore:
    """Run answers and compare what they return with what the reference queries return.

    Args:
        answers: a query for each item, as the model wrote it; nothing is repaired.
        items: of `load_questions`.

    Raises:
        ValueError: no answers, not as many as items, or a reference query that does not run.
    """
    if not answers or len(answers) != len(items):
        raise ValueError(
            f"{len(answers)} answers for {len(items)} questions; give one answer for each, at least one"
        )
    connections = {db: database(db) for db in {item["db"] for item in items}}
    right, exact, valid = [], 0, 0
    by_kind = defaultdict(list)
    for answer, item in zip(answers, items):
        gold = execute(connections[item["db"]], item["query"])
        if gold.error:
            raise ValueError(f"the reference query {item['query']!r} does not run: {gold.error}")
        result = execute(connections[item["db"]], answer)
        right.append(not result.error and same_rows(result.rows, gold.rows, is_ordered(item["query"])))
        valid += not result.error
        exact += isinstance(answer, str) and normal_form(answer) == normal_form(item["query"])
        by_kind[item["kind"]].append(right[-1])
    per_kind = {kind: sum(marks) / len(marks) for kind, marks in sorted(by_kind.items())}
    wrong = [i for i, ok in enumerate(right) if not ok]
    return SQLScore(len(items), sum(right), exact, valid, per_kind, wrong)
