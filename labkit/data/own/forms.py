"""From a row to a record in labkit's own form, or to what is wrong with it.

    {"messages": […]}                    as it is, with "tools" if there are any
    {"prompt": "…", "completion": "…"}   as it is; so are two named columns or fields
    {"text": "…"}                        {"prompt": "", "completion": "…"}: every token of it is learned

A file has one form. Training on chats and on plain texts at once teaches two ways to answer, and is hardly ever
what was meant; so the form that most rows have is the file's, and the others are faults.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from labkit.checks import nearest
from labkit.data.own.findings import Findings
from labkit.data.own.json_rows import type_of
from labkit.data.own.lines import Row
from labkit.data.own.texts import look_at_texts
from labkit.data.records import shortened

CHAT, PAIR, TEXT = "messages", "prompt/completion", "text"
ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
COLUMNS = ("prompt", "completion")
LIKELY = (  # what others call prompt and completion
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("input", "output"),
    ("query", "response"),
    ("source", "target"),
)


def own_records(
    rows: Iterable[Row], columns: tuple[str, str] | None, findings: Findings
) -> tuple[list[dict], list[int], str]:
    """The records, the line of each, and the form of the file; what is no record is noted as a finding."""
    rows = list(rows)
    forms = [form_of(row, columns, findings) for row in rows]
    usual = next((form for form, _ in Counter(filter(None, forms)).most_common(1)), "")
    records, lines = [], []
    for row, form in zip(rows, forms):
        if form and form != usual:
            findings.add("mixed forms", row.line, f"has the form {form}, and most of the file {usual}")
        elif form:
            before = findings.count(True)
            record = own_form(row, form, columns or COLUMNS, findings)
            if findings.count(True) == before:
                records.append(record)
                lines.append(row.line)
    return records, lines, usual


def form_of(row: Row, columns: tuple[str, str] | None, findings: Findings) -> str:
    """The form of a row; "" if it has none or two, which is noted."""
    has = set(row.values)
    prompt, completion = columns or COLUMNS
    if columns:
        found = [PAIR] if has & set(columns) else []
    else:
        pairs = ((CHAT, {"messages"}), (PAIR, set(COLUMNS)), (TEXT, {"text"}))
        found = [form for form, needed in pairs if needed <= has]
    if len(found) > 1:
        findings.add("two forms", row.line, f"has the forms {' and '.join(found)}")
    elif not found and (prompt in has or completion in has):
        found = [PAIR]  # one of the two is missing, which own_form says
    elif not found:
        add_unknown_fields(row, columns, findings)
    return found[0] if len(found) == 1 else ""


def add_unknown_fields(row: Row, columns: tuple[str, str] | None, findings: Findings) -> None:
    """Note that a row has none of the fields, and what it seems to have instead."""
    likely = next((pair for pair in LIKELY if set(pair) <= set(row.values)), None)
    advice = f"read_records(…, columns={likely!r})" if likely else ""
    if "conversations" in row.values:
        advice = "rename 'conversations' to 'messages', 'from' to 'role', 'value' to 'content'"
    allowed = f"the fields {columns!r}, as named by columns" if columns else ""
    findings.add(
        "unknown fields", row.line, f"has the fields {shortened(sorted(row.values))}", allowed, advice
    )


def own_form(row: Row, form: str, columns: tuple[str, str], findings: Findings) -> dict:
    """The record of a row of this form. It is one only if nothing was noted against it."""
    values, line = row.values, row.line
    if form == CHAT:
        check_messages(values["messages"], line, findings)
        if not are_functions(values.get("tools")):
            findings.add("wrong calls", line, f"has 'tools': {shortened(values['tools'])}")
        record = {key: values[key] for key in ("messages", "tools") if key in values}
    else:
        names = columns if form == PAIR else ("", "text")
        record = {
            own: text_in(name, values, line, findings) if name else "" for own, name in zip(COLUMNS, names)
        }
        if not record["completion"].strip() and isinstance(values.get(names[1]), str):
            findings.add("empty completion", line, f"has {names[1]!r}: {record['completion'][:20]!r}")
        if form == PAIR and not record["prompt"].strip() and isinstance(values.get(names[0]), str):
            findings.add("empty prompt", line, f"has {names[0]!r}: {record['prompt'][:20]!r}")
    look_at_texts(record, line, findings)
    return record


def text_in(name: str, values: Mapping, line: int, findings: Findings) -> str:
    """The text of a field; "" if there is none, which is noted."""
    if name not in values:
        findings.add(
            "missing field",
            line,
            f"has no {name!r}, but {shortened(sorted(values))}{nearest(name, values)}".removesuffix("."),
        )
    elif not isinstance(values[name], str):
        given = values[name]
        chat = isinstance(given, list) and given and isinstance(given[0], Mapping) and "role" in given[0]
        findings.add(
            "wrong type",
            line,
            f"has {name!r}: {shortened(given)}, which is {type_of(given)}",
            advice="make {'messages': prompt + completion} of a chat" if chat else "",
        )
    else:
        return values[name]
    return ""


def check_messages(messages: object, line: int, findings: Findings) -> None:
    """Note what is wrong with the messages of a chat: their type, their roles, their order, an empty answer."""
    if not isinstance(messages, list) or not messages:
        findings.add("wrong messages", line, f"has 'messages': {shortened(messages)}")
        return
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            shares = isinstance(message, Mapping) and {"from", "value"} <= set(message)
            advice = "rename 'from' to 'role', 'value' to 'content'" if shares else ""
            findings.add("wrong messages", line, f"has message {i}: {shortened(message)}", advice=advice)
            return
        role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
        if role not in ROLES:
            advice = f"rename it to {OTHER_ROLES[role]!r}" if role in OTHER_ROLES else ""
            findings.add("wrong role", line, f"has the role {shortened(role)} in message {i}", advice=advice)
            return
        if not are_functions(calls):
            findings.add("wrong calls", line, f"has, in message {i}, 'tool_calls': {shortened(calls)}")
            return
        if not isinstance(content, str) and not (content is None and calls and role == "assistant"):
            findings.add("wrong type", line, f"has, in message {i}, 'content': {shortened(content)}")
            return
    check_order([message["role"] for message in messages], line, findings)
    last = messages[-1]
    if last["role"] == "assistant" and not (last.get("content") or "").strip() and not last.get("tool_calls"):
        findings.add("empty completion", line, f"ends with the answer {last.get('content')!r}")
    for i, message in enumerate(messages[:-1]):
        if message["role"] == "user" and not message["content"].strip():
            findings.add("empty prompt", line, f"has an empty message {i} (user)")


def are_functions(value: object) -> bool:
    """Is it a list of functions with a name, or of calls of them, as chat templates take them? Or nothing?"""
    items = value if isinstance(value, list) else [] if value is None else [value]
    functions = [item.get("function", item) if isinstance(item, Mapping) else item for item in items]
    return all(isinstance(f, Mapping) and isinstance(f.get("name"), str) for f in functions)


def check_order(roles: list[str], line: int, findings: Findings) -> None:
    """Note an order of roles that no chat has; the same role twice running is possible, and suspicious."""
    turns = roles[1:] if roles[0] == "system" else roles
    said = f"has the roles {shortened(roles)}"
    if "system" in turns:
        findings.add("wrong order", line, f"{said}, with 'system' after the beginning")
    elif not turns or turns[0] != "user":
        findings.add("wrong order", line, f"{said}, with no 'user' before the first answer")
    elif any(two == "tool" and one not in ("assistant", "tool") for one, two in pairwise(turns)):
        findings.add("wrong order", line, f"{said}, with a 'tool' that no 'assistant' called")
    elif turns[-1] != "assistant":
        findings.add("wrong order", line, f"{said}, so that no answer is there to learn")
    elif any(one == two and one in ("user", "assistant") for one, two in pairwise(turns)):
        findings.add("same role twice", line, said)
