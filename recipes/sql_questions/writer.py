"""One question and its query, from a table, a phrasing and chance, whether or not it is a good one."""

import random

from recipes.sql_questions import phrasings as say
from recipes.sql_questions.tables import Column, Table

WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}


class Writer:
    """Writes questions to one database: `write(kind)` gives (question, query, pattern), good or not."""

    def __init__(self, rng: random.Random, split: str, tables: list[Table]):
        self.rng, self.split, self.tables = rng, split, tables

    def write(self, kind: str) -> tuple[str, str, str]:
        usable = [t for t in self.tables if t.of("name") and t.of("cat") and t.of("int", "real")]
        table = self.tables[0] if kind == "join" or self.rng.random() < 0.75 else self.rng.choice(usable)
        frame, slots, query = getattr(self, kind)(table)
        conditions = {k: v for k, v in slots.items() if k in ("C", "D")}
        used = [frame]
        for key, (pattern, filled) in conditions.items():
            slots[key] = filled
            used.append(pattern)
        question = frame.format(sg=table.singular, pl=table.plural, **slots)
        return question[0].upper() + question[1:], query, " | ".join(used)

    def pick(self, phrasings: dict[str, list[str]]) -> str:
        return self.rng.choice(phrasings[self.split])

    def called(self, column: Column) -> str:
        """A word for a column, but not "the film of the film" if there is another."""
        return self.rng.choice(
            [w for w in column.words if w != self.table_of(column).singular] or column.words
        )

    def quoted(self, value, always: bool = False) -> str:
        return f'"{value}"' if isinstance(value, str) and (always or self.rng.random() < 0.3) else str(value)

    def value(self, column: Column):
        """A value in the column; of numbers none near either end."""
        at = self.table_of(column).columns.index(column)
        values = sorted({row[at] for row in self.table_of(column).rows})
        cut = len(values) // 6 if column.is_number else 0
        return self.rng.choice(values[cut : len(values) - cut])

    def table_of(self, column: Column) -> Table:
        return next(t for t in self.tables if column in t.columns)

    def asked(self, table: Table, *without: Column) -> tuple[str, str]:
        """One or two columns to select: the words, and the SQL."""
        choices = [c for c in table.columns if c.kind not in ("id", "ref") and c not in without]
        first = table.of("name")[:1]
        if first and first[0] in choices and self.rng.random() < 0.5:
            picked = first
        else:
            picked = [self.rng.choice(choices)]
        rest = [c for c in choices if c not in picked]
        if rest and self.rng.random() < 0.3:
            picked = [*picked, self.rng.choice(rest)]
        return " and ".join(self.called(c) for c in picked), ", ".join(c.name for c in picked)

    def condition(
        self, table: Table, *without: Column, skip=("id", "ref", "name")
    ) -> tuple[tuple[str, str], str, Column]:
        """((pattern, phrase), SQL, column) of a condition on one column."""
        column = self.rng.choice([c for c in table.columns if c.kind not in skip and c not in without])
        value, year = self.value(column), " year" if column.kind == "year" else ""
        if column.is_number:
            which = self.rng.choices(["gt", "lt", "eq number"], [5, 5, 1 if column.kind != "real" else 0])[0]
            pattern = self.pick(say.CONDITIONS[which if which == "eq number" else which + year])
            sql = f"{column.name} {dict(gt='>', lt='<').get(which, '=')} {value}"
        else:
            which = self.rng.choices(["eq", "ne"], [7, 3])[0]
            pattern = self.pick(say.CONDITIONS[which])
            if column.said and self.rng.random() < 0.35:
                plain = column.said.startswith("that are ")
                pattern = (
                    column.said
                    if which == "eq"
                    else column.said.replace("that are", "that are not")
                    if plain
                    else "not " + column.said
                )
            sql = f"{column.name} {'=' if which == 'eq' else '!='} '{value}'"
        return (pattern, pattern.format(n=self.called(column), v=self.quoted(value))), sql, column

    def like_condition(self, table: Table) -> tuple[tuple[str, str], str]:
        column = table.of("name")[0]
        value = self.value(column)
        which = self.rng.choice(["starts", "ends", "contains"])
        words = value.split()
        if which == "starts":
            part = self.rng.choice([words[0], value[: self.rng.randint(1, 3)]])
        elif which == "ends":
            part = self.rng.choice([words[-1], value[-self.rng.randint(1, 3) :]])
        else:
            part = self.rng.choice([*words, value[1 : self.rng.randint(3, 5)]])
        part = part.strip()
        like = {"starts": f"{part}%", "ends": f"%{part}", "contains": f"%{part}%"}[which]
        pattern = self.pick(say.CONDITIONS[which])
        phrase = pattern.format(n=self.called(column), v=self.quoted(part, always=self.rng.random() < 0.5))
        return (pattern, phrase), f"{column.name} LIKE '{like}'"

    def where(self, table: Table):
        names = table.of("name")
        if names and self.rng.random() < 0.15:
            value = self.value(names[0])
            words, sql = self.asked(table, names[0])
            frame = self.pick(say.LOOKUP)
            return (
                frame,
                {"A": words, "v": self.quoted(value)},
                f"SELECT {sql} FROM {table.name} WHERE {names[0].name} = '{value}'",
            )
        condition, where, column = self.condition(table)
        return self.select(table, condition, where, column if "=" in where and "!" not in where else None)

    def select(self, table: Table, condition, where: str, known: Column | None = None):
        if table.of("name") and self.rng.random() < 0.25:
            return (
                self.pick(say.NAMES),
                {"C": condition},
                f"SELECT {table.of('name')[0].name} FROM {table.name} WHERE {where}",
            )
        words, sql = self.asked(table, *([known] if known else []))
        return (
            self.pick(say.SELECT),
            {"A": words, "C": condition},
            f"SELECT {sql} FROM {table.name} WHERE {where}",
        )

    def like(self, table: Table):
        condition, where = self.like_condition(table)
        if self.rng.random() < 0.2:
            return self.pick(say.COUNT), {"C": condition}, f"SELECT COUNT(*) FROM {table.name} WHERE {where}"
        return self.select(table, condition, where)

    def two_conditions(self, table: Table):
        draw = self.rng.random()
        if draw < 0.2:
            column = self.rng.choice(table.of("cat"))
            v, w = self.rng.sample(column.values.split("; "), 2)
            pattern = self.pick(say.CONDITIONS["either"])
            phrase = pattern.format(n=self.called(column), v=v, w=w)
            return (pattern, phrase), f"{column.name} = '{v}' OR {column.name} = '{w}'"
        if draw < 0.4:
            column = self.rng.choice([c for c in table.columns if c.is_number and c.kind != "year"])
            v, w = sorted([self.value(column), self.value(column)])
            pattern = self.pick(say.CONDITIONS["range"])
            return (
                pattern,
                pattern.format(n=self.called(column), v=v, w=w),
            ), f"{column.name} > {v} AND {column.name} < {w}"
        (p, one), first, column = self.condition(table)
        (q, other), second, _ = self.condition(table, column)
        joint = self.rng.choices(["AND", "OR"], [2, 1])[0]
        pattern = self.pick(say.TWO[joint])
        return (f"{pattern} | {p} | {q}", pattern.format(C=one, D=other)), f"{first} {joint} {second}"

    def two(self, table: Table):
        condition, where = self.two_conditions(table)
        if self.rng.random() < 0.25:
            return self.pick(say.COUNT), {"C": condition}, f"SELECT COUNT(*) FROM {table.name} WHERE {where}"
        return self.select(table, condition, where)

    def count(self, table: Table):
        condition, where, _ = self.condition(table)
        return self.pick(say.COUNT), {"C": condition}, f"SELECT COUNT(*) FROM {table.name} WHERE {where}"

    def function(self, column: Column) -> str:
        return self.rng.choice(
            ["MIN", "MAX"]
            if column.kind in ("year", "int-")
            else ["AVG", "AVG", "MIN", "MAX", *["SUM"] * 2 * column.kind.endswith("+")]
        )

    def aggregate(self, table: Table):
        column = self.rng.choice(table.of("int", "real", "year"))
        name = self.function(column)
        frame = self.pick(say.AGGREGATE[name + (" year" if column.kind == "year" else "")])
        query = f"SELECT {name}({column.name}) FROM {table.name}"
        if self.rng.random() < 0.35:
            return frame, {"n": self.called(column), "C": ("", "")}, query
        (pattern, phrase), where, _ = self.condition(table, column)
        return frame, {"n": self.called(column), "C": (pattern, " " + phrase)}, f"{query} WHERE {where}"

    def order(self, table: Table):
        column = self.rng.choice(table.of("int", "real", "year"))
        down, year, name = self.rng.random() < 0.6, column.kind == "year", table.of("name")[0]
        slots = {
            "n": self.called(column),
            "high": self.rng.choice((say.HIGH_YEAR if year else say.HIGH)[down]),
        }
        words, sql = self.asked(table, column)
        tail = f" ORDER BY {column.name}{' DESC' if down else ''}"
        shape = self.rng.choice(["one", "one of", "one where", "sup", "sup of", "top", "top of", "sorted"])
        by_name = f"SELECT {name.name} FROM {table.name}"
        by_words = f"SELECT {sql} FROM {table.name}"
        if shape in ("sup", "sup of") and column.said:
            slots = {"sup": column.said.split("/")[0 if down else 1]}
            if shape == "sup":
                return self.pick(say.SUPERLATIVE), slots, f"{by_name}{tail} LIMIT 1"
            return self.pick(say.SUPERLATIVE_OF), slots | {"A": words}, f"{by_words}{tail} LIMIT 1"
        if shape == "one":
            return self.pick(say.EXTREME), slots, f"{by_name}{tail} LIMIT 1"
        if shape == "one where":
            condition, where, _ = self.condition(table, column)
            return (
                self.pick(say.EXTREME_C),
                slots | {"C": condition},
                f"{by_name} WHERE {where}{tail} LIMIT 1",
            )
        if shape in ("top", "top of"):
            k = self.rng.randint(2, 5)
            slots["k"] = self.rng.choice([str(k), WORDS[k]])
            if shape == "top":
                return self.pick(say.TOP), slots, f"{by_name}{tail} LIMIT {k}"
            return self.pick(say.TOP_OF), slots | {"A": words}, f"{by_words}{tail} LIMIT {k}"
        if shape == "sorted":
            way = self.pick((say.DOWN_YEAR if year else say.DOWN)[down])
            return self.pick(say.SORTED).replace("{down}", way), slots | {"A": words}, by_words + tail
        return self.pick(say.EXTREME_OF), slots | {"A": words}, f"{by_words}{tail} LIMIT 1"

    def group(self, table: Table):
        by = self.rng.choice(table.of("cat"))
        if self.rng.random() < 0.4:
            return (
                self.pick(say.GROUP_COUNT),
                {"g": self.called(by)},
                f"SELECT {by.name}, COUNT(*) FROM {table.name} GROUP BY {by.name}",
            )
        column = self.rng.choice([c for c in table.columns if c.is_number and c.kind != "year"])
        name = self.function(column)
        slots = {"g": self.called(by), "n": self.called(column), "f": self.rng.choice(say.GROUP_WORDS[name])}
        return (
            self.pick(say.GROUP_AGGREGATE),
            slots,
            f"SELECT {by.name}, {name}({column.name}) FROM {table.name} GROUP BY {by.name}",
        )

    def distinct(self, table: Table):
        column = self.rng.choice(table.of("cat"))
        draw = self.rng.random()
        if draw < 0.3:
            return (
                self.pick(say.DISTINCT),
                {"n": self.called(column)},
                f"SELECT DISTINCT {column.name} FROM {table.name}",
            )
        if draw < 0.45:
            return (
                self.pick(say.DISTINCT_COUNT),
                {"n": self.called(column)},
                f"SELECT COUNT(DISTINCT {column.name}) FROM {table.name}",
            )
        condition, where, _ = self.condition(table, column)
        return (
            self.pick(say.DISTINCT_C),
            {"n": self.called(column), "C": condition},
            f"SELECT DISTINCT {column.name} FROM {table.name} WHERE {where}",
        )

    def join(self, table: Table):
        parent = self.tables[1]
        key = table.of("ref")[0].name
        joined = f"{table.name} JOIN {parent.name} ON {table.name}.{key} = {parent.name}.id"
        slots = {"ps": parent.singular}
        words, sql = self.asked(table)
        draw = self.rng.random()
        if draw < 0.6:
            condition, where, _ = self.condition(parent, skip=("id",))
            if draw < 0.2:
                return (
                    self.pick(say.JOIN_COUNT),
                    slots | {"C": condition},
                    f"SELECT COUNT(*) FROM {joined} WHERE {where}",
                )
            return (
                self.pick(say.JOIN),
                slots | {"A": words, "C": condition},
                f"SELECT {sql} FROM {joined} WHERE {where}",
            )
        own = self.rng.choice(table.of("name", "cat", "int", "real", "year"))
        other = self.rng.choice([c for c in parent.columns if c.kind != "id"])
        slots |= {"A": self.called(own), "B": self.called(other)}
        query = f"SELECT {own.name}, {other.name} FROM {joined}"
        if draw < 0.8:
            return self.pick(say.JOIN_BOTH), slots, query
        condition, where, _ = self.condition(table, own)
        return self.pick(say.JOIN_BOTH_C), slots | {"C": condition}, f"{query} WHERE {where}"
