"""Files for managed fine-tuning services: the format that they document, checked before anything is written."""

import json

import pytest

from labkit.data.own.reading import read_records
from labkit.data.splits import read_jsonl
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.files.writing import CannotWrite
from labkit.formats import services
from labkit.formats.services import SERVICES, read_preferences, write_for_service

CALL = {"id": "c1", "type": "function", "function": {"name": "stock", "arguments": '{"size": 7}'}}
TOOLS = [
    {"type": "function", "function": {"name": "stock", "parameters": {"type": "object", "properties": {}}}}
]


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def chats(n=10):
    return [
        chat(("system", "Be brief."), ("user", f"Is {i} even?"), ("assistant", f"{i % 2 == 0}"))
        for i in range(n)
    ]


def pairs(n=10):
    return [{"prompt": f"Is {i} even? ", "completion": f" {i % 2 == 0}"} for i in range(n)]


def preferences(n=10):
    return [
        {"prompt": f"Is {i} even?", "chosen": f"{i % 2 == 0}", "rejected": "Who knows?"} for i in range(n)
    ]


def with_calls():
    asked = {"role": "user", "content": "Is there a boot in size 7?"}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    told = {"role": "tool", "tool_call_id": "c1", "content": "3 left"}
    return {
        "messages": [asked, called, told, {"role": "assistant", "content": "Yes, three."}],
        "tools": TOOLS,
    }


@pytest.fixture(scope="module")
def message_type():
    """The official client's type of messages, which rejects unknown roles and misplaced contents."""
    pytest.importorskip("openai")
    from openai.types.chat import ChatCompletionMessageParam
    from pydantic import TypeAdapter

    return TypeAdapter(list[ChatCompletionMessageParam])


@pytest.mark.parametrize("service", SERVICES)
def test_chats_are_read_back_as_the_same_records(tmp_path, service):
    records = [*chats(), with_calls()]
    path = write_for_service(records, tmp_path / "train.jsonl", service)
    assert read_records(path)[0] == records
    assert path.read_bytes().count(b"\n") == len(records)


def test_pairs_are_read_back_as_the_same_records(tmp_path):
    path = write_for_service(pairs(), tmp_path / "train.jsonl", "together")
    assert read_records(path)[0] == pairs()
    assert all(set(line) == {"prompt", "completion"} for line in read_jsonl(path))


@pytest.mark.parametrize("service", SERVICES)
def test_preferences_are_read_back_as_the_same_records(tmp_path, service):
    long = chats(1)[0]["messages"][:2]
    records = [*preferences(), {"messages": long, "chosen": "Yes.", "rejected": "No.", "tools": TOOLS}]
    path = write_for_service(records, tmp_path / "train.jsonl", service)
    assert read_preferences(path) == records
    assert read_jsonl(path)[0] == {
        "input": {"messages": [{"role": "user", "content": "Is 0 even?"}]},
        "preferred_output": [{"role": "assistant", "content": "True"}],
        "non_preferred_output": [{"role": "assistant", "content": "Who knows?"}],
    }


def test_the_tickets_of_the_course_are_written_as_chats(tmp_path, message_type):
    records = [ticket_chat(ticket) for ticket in load_tickets("train")]
    path = write_for_service(records, tmp_path / "tickets.jsonl")
    assert read_records(path)[0] == [{"messages": record["messages"]} for record in records]
    for line in read_jsonl(path):
        message_type.validate_python(line["messages"])


def test_messages_and_preferences_are_of_the_types_of_the_official_client(tmp_path, message_type):
    for line in read_jsonl(write_for_service([*chats(), with_calls()], tmp_path / "a.jsonl")):
        message_type.validate_python(line["messages"], strict=True)
    for line in read_jsonl(write_for_service(preferences(), tmp_path / "b.jsonl")):
        for messages in (line["input"]["messages"], line["preferred_output"], line["non_preferred_output"]):
            message_type.validate_python(messages, strict=True)


def test_what_the_types_of_the_official_client_reject_is_refused_here(tmp_path, message_type):
    from pydantic import ValidationError

    no_id = [{"function": {"name": "stock", "arguments": "{}"}}]
    for bad in (
        {"role": "bot", "content": "Yes."},
        {"role": "assistant", "content": 7},
        {"role": "assistant", "content": None, "tool_calls": no_id},
        {"role": "tool", "content": "3 left"},
    ):
        messages = [{"role": "user", "content": "Well?"}, bad]
        with pytest.raises(ValidationError):
            checked = message_type.validate_python(messages)
            list(checked[1]["tool_calls"])  # their type is an iterable, which is checked as it is read
        with pytest.raises(ValueError, match="line 11 of the records"):
            write_for_service([*chats(), {"messages": messages}], tmp_path / "train.jsonl")


def test_fields_that_a_format_does_not_have_are_left_out(tmp_path):
    records = [record | {"id": f"train-{i}"} for i, record in enumerate(chats())]
    assert read_jsonl(write_for_service(records, tmp_path / "train.jsonl")) == chats()


UNSOUND = {
    "a role that nobody knows": (chat(("user", "Well?"), ("bot", "Yes.")), "rename it to 'assistant'"),
    "no answer": (chat(("user", "Well?")), "no answer is there to learn"),
    "an empty answer": (chat(("user", "Well?"), ("assistant", " ")), "ends with the answer ' '"),
    "an empty question": (chat(("user", ""), ("assistant", "Yes.")), r"empty message 0 \(user\)"),
    "an empty system message": (
        chat(("system", ""), ("user", "Well?"), ("assistant", "Yes.")),
        r"empty message 0 \(system\)",
    ),
    "the same role twice": (chat(("user", "Well?"), ("user", "So?"), ("assistant", "Yes.")), "in turn"),
    "a call without an identifier": (
        {
            "messages": [
                *with_calls()["messages"][:1],
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            ]
        },
        "JSON as a text",
    ),
    "an answer to no call": (
        {
            "messages": [m for m in with_calls()["messages"] if m["role"] != "assistant"]
            + chats(1)[0]["messages"][2:]
        },
        "'tool' that no 'assistant' called",
    ),
    "half a surrogate pair": (chat(("user", "Well? \ud83d"), ("assistant", "Yes.")), r"U\+D83D"),
    "another form": ({"prompt": "Well?", "completion": "Yes."}, "one form per file"),
    "two forms at once": (chats(1)[0] | pairs(1)[0], "one form per record"),
    "a preference": (preferences(1)[0], "line 11 of the records is a preference, and line 1 is none"),
    "something that JSON cannot hold": (with_calls() | {"tools": [TOOLS[0] | {"since": {1, 2}}]}, "as JSON"),
}


@pytest.mark.parametrize(("bad", "message"), UNSOUND.values(), ids=UNSOUND)
def test_an_unsound_record_is_named_and_the_old_file_stays(tmp_path, bad, message):
    path = tmp_path / "train.jsonl"
    path.write_text("old")
    with pytest.raises(ValueError, match=message) as raised:
        write_for_service([*chats(), bad], path)
    assert "line 11 of the records" in str(raised.value)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


BAD_PREFERENCES = {
    "an answer that is a list": (
        {"prompt": "Well?", "chosen": ["Yes."], "rejected": "No."},
        "give its text alone",
    ),
    "one answer": ({"prompt": "Well?", "chosen": "Yes."}, "'rejected': None"),
    "an empty answer": ({"prompt": "Well?", "chosen": "Yes.", "rejected": ""}, "'rejected': ''"),
    "an answer preferred to itself": ({"prompt": "Well?", "chosen": "Yes.", "rejected": "Yes."}, "to itself"),
    "no question": ({"chosen": "Yes.", "rejected": "No."}, "'prompt' or 'messages'"),
    "an answer before the answer": (
        {"messages": chats(1)[0]["messages"], "chosen": "Yes.", "rejected": "No."},
        "'user' and 'assistant' in turn",
    ),
    "messages that are a text": (
        {"messages": "Well?", "chosen": "Yes.", "rejected": "No."},
        "repair the list",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD_PREFERENCES.values(), ids=BAD_PREFERENCES)
def test_an_unsound_preference_is_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=f"line 11 of the records.*{message}"):
        write_for_service([*preferences(), bad], tmp_path / "train.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("service", ["openai", "fireworks"])
def test_a_service_of_chats_says_how_to_make_chats_of_pairs(tmp_path, service):
    with pytest.raises(ValueError, match=f"{service} takes.*these records are 'completion'.*'role': 'user'"):
        write_for_service(pairs(), tmp_path / "train.jsonl", service)


def test_the_documented_limits_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    with pytest.raises(ValueError, match="9 records, and openai takes files of at least 10"):
        write_for_service(chats(9), path)
    with pytest.raises(ValueError, match="2 records, and fireworks takes files of at least 3"):
        write_for_service(chats(2), path, "fireworks")
    n_bytes = write_for_service(chats(), path).stat().st_size
    small = SERVICES["openai"]._replace(max_bytes=n_bytes - 1, max_records=10)
    monkeypatch.setitem(services.SERVICES, "openai", small)
    with pytest.raises(ValueError, match=rf"more than {n_bytes - 1:,} bytes.*the first 9 records fit"):
        write_for_service(chats(), path)
    with pytest.raises(ValueError, match="11 records, and openai takes files of at most 10"):
        write_for_service(chats(11), path)
    assert read_jsonl(path) == chats()
    monkeypatch.setitem(services.SERVICES, "openai", small._replace(max_bytes=n_bytes))
    assert read_jsonl(write_for_service(chats(), path)) == chats()


def test_what_is_not_a_list_of_records_or_a_known_service_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'together'"):
        write_for_service(chats(), tmp_path / "train.jsonl", "togther")
    with pytest.raises(ValueError, match="must be a list of records"):
        write_for_service("train.jsonl", tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match="must end in .jsonl"):
        write_for_service(chats(), tmp_path / "train.json")
    with pytest.raises(ValueError, match="plain texts"):
        write_for_service([{"text": "Once upon a time"}] * 10, tmp_path / "train.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="a file of that name is in the way"):
        write_for_service(chats(), tmp_path / "file" / "train.jsonl")


def test_a_line_that_is_no_preference_is_named(tmp_path):
    path = write_for_service(preferences(), tmp_path / "train.jsonl")
    with path.open("a") as file:
        file.write(json.dumps({"input": {"messages": []}, "preferred_output": []}) + "\n")
    with pytest.raises(ValueError, match="record 11 of .*'non_preferred_output' with one answer each"):
        read_preferences(path)
