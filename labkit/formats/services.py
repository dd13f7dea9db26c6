"""Records as a file that a managed fine-tuning service takes: JSON lines, all of one format.

    messages      {"messages": [{"role": …, "content": …}, …]}, with "tools" if there are any
    completion    {"prompt": …, "completion": …}
    preference    {"input": {"messages": […]}, "preferred_output": [answer], "non_preferred_output": [answer]}

A service says what is wrong only after the upload, and not all of it. So every record is checked before anything is
written: what `labkit.data.read_records` calls a fault, and what the services ask for besides. Fields that a format
does not have are left out, as the services want it.

The limits are the documented ones of November 2026: OpenAI "Files" and "Supervised fine-tuning", Together "Data
preparation", Fireworks "Supervised fine tuning".
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from labkit.checks import check_choice
from labkit.data.own.findings import Findings, counted
from labkit.data.own.forms import COLUMNS, PAIR, TEXT, own_form, own_records
from labkit.data.own.lines import Row
from labkit.data.records import records_of, shortened
from labkit.data.splits import read_jsonl
from labkit.files.writing import new_file

MESSAGES, COMPLETION, PREFERENCE = "messages", "completion", "preference"
CHOSEN, REJECTED = "chosen", "rejected"
OUTPUTS = {CHOSEN: "preferred_output", REJECTED: "non_preferred_output"}
REFUSED = ("same role twice", "empty prompt", "two answers")  # warnings to labkit, and refused by services
SHOWN = 3  # findings in an error
AS_CHAT = (
    "write a prompt and its completion as {'messages': [{'role': 'user', 'content': prompt}, "
    "{'role': 'assistant', 'content': completion}]}"
)


class Service(NamedTuple):
    """What a service takes: formats, numbers of records, bytes of a file. None: no documented limit."""

    formats: tuple[str, ...]
    min_records: int
    max_records: int | None
    max_bytes: int | None


SERVICES = {
    "openai": Service((MESSAGES, PREFERENCE), 10, None, 512 * 10**6),
    "together": Service((MESSAGES, COMPLETION, PREFERENCE), 1, None, 100 * 10**9),
    "fireworks": Service((MESSAGES, PREFERENCE), 3, 3 * 10**6, None),
}


def write_for_service(records: Iterable[Mapping], path: str | Path, service: str = "openai") -> Path:
    """Write records as a training file of a managed service. An old file is replaced whole or not at all.

    Args:
        records: all of one form: chats (`messages`); `prompt` and `completion`; or preferences, which are `chosen` and
            `rejected`, two texts, with `prompt`, a text, or with `messages` that end with what is to be answered.
        path: of the file; its name ends in `.jsonl`.
        service: one of `SERVICES`.

    Returns:
        `path`.

    Raises:
        ValueError: the service does not take this form, so few or so many records, or a file so large; a record is not
            sound; or the records have several forms. Nothing is written then.
        labkit.files.CannotWrite: no space, no permission; the old file is intact.
    """
    check_choice("service", service, SERVICES)
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"path={str(path)!r} must end in .jsonl: services go by the name of a file")
    rows = [Row(i, dict(record)) for i, record in enumerate(records_of(records, "records"), 1)]
    takes = SERVICES[service]
    check_number(len(rows), service, takes)
    form, made = in_format(rows)
    if form not in takes.formats:
        advice = AS_CHAT if form == COMPLETION else "choose another service"
        raise ValueError(
            f"{service} takes the formats {takes.formats}, and these records are {form!r}; {advice}"
        )
    n_bytes = 0
    with new_file(path) as part, open(part, "wb") as file:
        for row, line in zip(rows, made):
            encoded = as_json(row.line, line)
            n_bytes += len(encoded)
            if takes.max_bytes is not None and n_bytes > takes.max_bytes:
                raise ValueError(
                    f"the file would have more than {takes.max_bytes:,} bytes, the most that {service} takes; the "
                    f"first {counted(row.line - 1, 'record')} fit. Write the records into several files"
                )
            file.write(encoded)
    return path


def read_preferences(path: str | Path) -> list[dict]:
    """The records of a preference file, as `write_for_service` takes them.

    An input of one user message comes back as `prompt`, a longer one as `messages`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is not JSON, or not a preference.
    """
    records = []
    for i, values in enumerate(read_jsonl(path), 1):
        try:
            asked = dict(values["input"])
            messages = asked.pop("messages")
            answers = {ours: answer_in(values[theirs]) for ours, theirs in OUTPUTS.items()}
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"record {i} of {path} is {shortened(values)}; a preference has an 'input' with 'messages', and "
                f"{' and '.join(map(repr, OUTPUTS.values()))} with one answer each"
            ) from None
        alone = len(messages) == 1 and set(messages[0]) == {"role", "content"}
        records.append(
            ({"prompt": messages[0]["content"]} if alone else {"messages": messages}) | answers | asked
        )
    return records


def answer_in(messages: list[Mapping]) -> str:
    """The text of the one message in an output."""
    [message] = messages
    return message["content"]


def check_number(n: int, service: str, takes: Service) -> None:
    """Raise a `ValueError` unless a service takes a file of `n` records."""
    if n < takes.min_records:
        raise ValueError(
            f"there are {counted(n, 'record')}, and {service} takes files of at least {takes.min_records}; add some"
        )
    if takes.max_records is not None and n > takes.max_records:
        raise ValueError(
            f"there are {counted(n, 'record')}, and {service} takes files of at most {takes.max_records:,}; write them "
            "into several files"
        )


def in_format(rows: list[Row]) -> tuple[str, list[dict]]:
    """The format of the records, and the line of each as a service takes it.

    Raises:
        ValueError: the records have several forms, or are not sound; names the first few that are not.
    """
    findings = Findings("the records")
    is_preference = [bool({CHOSEN, REJECTED} & set(row.values)) for row in rows]
    if any(is_preference) and not all(is_preference):
        one, other = (rows[is_preference.index(which)].line for which in (True, False))
        raise ValueError(
            f"line {one} of the records is a preference, and line {other} is none; allowed: one form per file; to do: "
            "write a file for each form"
        )
    if all(is_preference):
        form, made = PREFERENCE, [preference_line(row, findings) for row in rows]
    else:
        made, _, own = own_records(rows, None, findings)
        if own == TEXT:
            raise ValueError(
                "the records are plain texts, in which a service would find no answer to learn; give chats, or prompt "
                "and completion"
            )
        form = COMPLETION if own == PAIR else MESSAGES
        for row in rows:
            look_at_messages(row.values.get("messages"), row.line, findings)
    wrong = [finding for finding in findings.kept if finding.is_fault or finding.kind in REFUSED]
    if wrong:
        wrong.sort(key=lambda finding: finding.line)
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError("; ".join(map(str, wrong[:SHOWN])) + more)
    return form, made


def preference_line(row: Row, findings: Findings) -> dict:
    """The line of a preference. It is one only if nothing was noted against it."""
    values, line = row.values, row.line
    if ("prompt" in values) == ("messages" in values):
        found = f"has the fields {shortened(sorted(values))}"
        findings.add("missing field", line, found, "'prompt' or 'messages' beside 'chosen' and 'rejected'")
        return {}
    asked = values["messages"] if "messages" in values else [{"role": "user", "content": values["prompt"]}]
    for name in OUTPUTS:
        answer = values.get(name)
        if not isinstance(answer, str):
            found = f"has {name!r}: {shortened(answer)}"
            findings.add("wrong type", line, found, "the text of the answer", "give its text alone")
            return {}
        if not answer.strip():
            findings.add("empty completion", line, f"has {name!r}: {answer[:20]!r}")
    if values[CHOSEN] == values[REJECTED]:
        findings.add(
            "two answers", line, "prefers an answer to itself", "two different answers", "remove the record"
        )
    with_answer = (
        [*asked, {"role": "assistant", "content": values[CHOSEN]}] if isinstance(asked, list) else asked
    )
    tools = {"tools": values["tools"]} if "tools" in values else {}
    own_form(Row(line, {"messages": with_answer, **tools}), "messages", COLUMNS, findings)
    look_at_messages(asked, line, findings)
    outputs = {theirs: [{"role": "assistant", "content": values[ours]}] for ours, theirs in OUTPUTS.items()}
    return {"input": {"messages": asked, **tools}, **outputs}


def look_at_messages(messages: object, line: int, findings: Findings) -> None:
    """Note what services refuse in messages that labkit trains on: empty ones, and calls without an identifier."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, Mapping):
            return  # noted by `check_messages`
        role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
        if (
            role in ("system", "assistant", "tool")
            and not calls
            and isinstance(content, str)
            and not content.strip()
        ):
            found = f"has an empty message {i} ({role})"
            findings.add(
                "wrong messages", line, found, "messages that say something", "fill it in, or leave it out"
            )
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            findings.add(
                "wrong calls",
                line,
                f"has no 'tool_call_id' in message {i}",
                "the 'id' of the call that it answers",
            )
        if isinstance(calls, list) and not all(map(is_whole_call, calls)):
            allowed = 'calls {"id": "…", "type": "function", "function": {"name": "…", "arguments": "JSON as a text"}}'
            findings.add(
                "wrong calls", line, f"has, in message {i}, 'tool_calls': {shortened(calls)}", allowed
            )


def is_whole_call(call: object) -> bool:
    """Is it a call of a function with all that the services' API asks for?"""
    if not isinstance(call, Mapping) or call.get("type") != "function" or not isinstance(call.get("id"), str):
        return False
    function = call.get("function")
    return isinstance(function, Mapping) and all(
        isinstance(function.get(k), str) for k in ("name", "arguments")
    )


def as_json(number: int, line: dict) -> bytes:
    """A line of the file."""
    try:
        return (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"line {number} of the records cannot be written as JSON ({error}); convert that value to a text or a number"
        ) from None
