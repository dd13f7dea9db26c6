"""Near misses: the wrong queries that a model writes when it almost understood, made from the right one.

`core` are those that every question's rows must distinguish from the right query: another column of the same
type, another operator, a condition left out, AND for OR, another aggregate, the other order, another LIMIT,
DISTINCT or GROUP BY left out. `spare` take another value instead. No question was chosen by them: they
measure how often a wrong query passes.
"""

import re

CLAUSE = re.compile(r" WHERE (.*?)(?= GROUP BY | ORDER BY |$)")
WORD = re.compile(r"('[^']*')|(\w+)")
OPERATORS = {" > ": (" < ", " >= ", " = "), " < ": (" > ", " <= ", " = "), " != ": (" = ",), " = ": (" != ",)}
AGGREGATES = ("AVG", "SUM", "MIN", "MAX")


def other_columns(query: str, content: dict[str, dict]) -> list[str]:
    """`query` with one mention of a column replaced by another column of the same table and kind of type."""
    made = []
    head = query.find(" ON ")
    for found in WORD.finditer(query):
        word = found.group(2)
        qualified = "." in query[max(0, found.start() - 1) : found.end() + 1]
        if not word or (head >= 0 and qualified):
            continue
        for table in content.values():
            kinds = table["columns"]
            for other in kinds if word in kinds else ():
                is_key = other == "id" or other.endswith("_id")
                if other != word and not is_key and (kinds[other] == "TEXT") == (kinds[word] == "TEXT"):
                    made.append(query[: found.start()] + other + query[found.end() :])
    return made


def other_conditions(query: str) -> list[str]:
    """`query` with its condition left out, or with another operator, joint or pattern in it."""
    clause = CLAUSE.search(query)
    if not clause:
        return []
    start, end, text = *clause.span(1), clause.group(1)
    made = [query[: clause.start()] + query[end:]]
    for operator, others in OPERATORS.items():
        for at in re.finditer(re.escape(operator), text):
            made += [query[: start + at.start()] + other + query[start + at.end() :] for other in others]
    for joint, other in ((" AND ", " OR "), (" OR ", " AND ")):
        if joint in text:
            made += [
                query[:start] + part + query[end:]
                for part in (*text.split(joint), text.replace(joint, other))
            ]
    if pattern := re.search(r"LIKE '(%?)([^'%]*)(%?)'", text):
        before, word, after = pattern.groups()
        for b, a in ((b, a) for b in ("", "%") for a in ("", "%") if (b, a) != (before, after)):
            made.append(query.replace(pattern.group(0), f"LIKE '{b}{word}{a}'"))
    return made


def other_shapes(query: str) -> list[str]:
    """`query` with another aggregate, order or limit, or without DISTINCT or GROUP BY."""
    made = []
    for name in AGGREGATES:
        if f"{name}(" in query:
            made += [query.replace(f"{name}(", f"{other}(") for other in AGGREGATES if other != name]
    if order := re.search(r" ORDER BY (\w+)( DESC)?( LIMIT (\d+))?$", query):
        column, down, _, limit = order.groups()
        head, tail = query[: order.start()], f" LIMIT {limit}" if limit else ""
        made += [f"{head} ORDER BY {column}{'' if down else ' DESC'}{tail}", f"{head}{tail}"]
        if limit:
            made += [
                f"{head} ORDER BY {column}{down or ''}{more}" for more in ("", f" LIMIT {int(limit) + 1}")
            ]
    made += [query.replace("DISTINCT ", "")] if "DISTINCT " in query else []
    made += [query[: query.index(" GROUP BY ")]] if " GROUP BY " in query else []
    return made


def core(query: str, content: dict[str, dict]) -> list[str]:
    """The near misses that must return something else; `content` as of `labkit.data.sql.tables`."""
    return other_columns(query, content) + other_conditions(query) + other_shapes(query)


def spare(query: str, content: dict[str, dict]) -> list[str]:
    """`query` with another value of the same column: each other text, or the next number up or down."""
    made = []
    for found in re.finditer(r"(\w+) (?:=|!=|<|>) ('[^']*'|[\d.]+)", query):
        column, value = found.groups()
        owner = next(table for table in content.values() if column in table["columns"])
        at = list(owner["columns"]).index(column)
        values = sorted({row[at] for row in owner["rows"]})
        if value.startswith("'"):
            others = [f"'{v}'" for v in values if f"'{v}'" != value]
        else:
            place = values.index(float(value))
            others = [f"{v}" for v in values[max(0, place - 1) : place] + values[place + 1 : place + 2]]
        made += [query[: found.start(2)] + other + query[found.end(2) :] for other in others]
    return made
