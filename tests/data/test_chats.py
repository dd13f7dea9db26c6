"""Chat templates: the ids of `apply_chat_template`, the mask that its generation markers give, and nothing lost."""

import json

import pytest

from labkit.data.chats import chat_prompt, end_mark, split_chat
from labkit.data.encoding import encode, encode_all
from labkit.data.tokens import prompt_ids
from tests.data.tokenizers import CHATML, CHATS, GEMMA, R1_DISTILL, TAGS, chat, chatting, tiny_llama

MARKS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "r1_distill": "<｜end▁of▁sentence｜>",
    "tags": "</assistant>",
    "unmarked": "",
}


@pytest.fixture(scope="module", params=CHATS)
def named(request):
    return request.param, CHATS[request.param]()


@pytest.mark.parametrize(
    "contents", [("2+2?", "4"), ("one", "1", "and two?", "It is\n\n2."), ("a", " spaced ")]
)
def test_ids_are_those_of_transformers_and_the_prompt_is_what_it_is_asked_to_go_on_from(named, contents):
    _, tokenizer = named
    record = chat(*contents)
    one = encode(record, tokenizer)
    whole = tokenizer.apply_chat_template(record["messages"], tokenize=False).rstrip()
    asked = tokenizer.apply_chat_template(record["messages"][:-1], add_generation_prompt=True)["input_ids"]
    assert one.prompt == asked == prompt_ids(chat_prompt(record, tokenizer), tokenizer)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if tokenizer.convert_ids_to_tokens(ids[: len(asked)]) == tokenizer.convert_ids_to_tokens(asked):
        assert (one.prompt + one.completion)[: len(ids)] == ids
    assert tokenizer.decode(one.prompt + one.completion).removesuffix(
        tokenizer.eos_token
    ) == whole.removesuffix(tokenizer.eos_token)
    assert contents[-1].strip() in tokenizer.decode(one.without_end().completion)


def test_what_is_learned_is_the_last_run_in_the_mask_of_the_generation_markers():
    tokenizer = CHATS["chatml"]()
    record = chat("one", "1", "and two?", "It is\n\n2.")
    theirs = tokenizer.apply_chat_template(
        record["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    one, mask = encode(record, tokenizer), theirs["assistant_masks"]
    start, end = len(one.prompt), len(one)
    assert theirs["input_ids"][:end] == one.prompt + one.completion
    assert mask[start - 1 :] == [0] + [1] * (end - start) + [0] * (len(mask) - end)


def test_every_answer_is_learned_with_the_mark_that_ends_it(named):
    name, tokenizer = named
    assert end_mark(tokenizer) == MARKS[name]
    one = encode(chat("2+2?", "4"), tokenizer)
    ended = MARKS[name] or tokenizer.eos_token  # where the template writes none, the tokenizer's
    assert tokenizer.decode(one.completion[-one.end :]) == ended
    assert tokenizer.decode(one.without_end().completion).strip() == "4"


def test_a_prompt_is_the_same_with_and_without_its_answer_and_keeps_a_last_question(named):
    _, tokenizer = named
    full = chat("2+2?", "4")
    assert chat_prompt(full, tokenizer) == chat_prompt({"messages": full["messages"][:1]}, tokenizer)
    assert "2+2?" in chat_prompt({"messages": full["messages"][:1]}, tokenizer)


def answer(template: str, record: dict) -> str:
    tokenizer = chatting(template)
    return tokenizer.decode(encode(record, tokenizer).without_end().completion)


def assistant(**message: object) -> dict:
    return {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", **message}]}


CALL = {
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 2, "to": 'a "b"', "also": [2.5, None]}},
}
PARTS = [{"type": "text", "text": "4, "}, {"type": "text", "text": "surely"}]
EVERYTHING = TAGS.replace(
    "m.content",
    "(m.reasoning_content or '') + (m.content if m.content is string else m.content | map(attribute='text') | join if "
    "m.content else '') + (m.tool_calls | tojson if m.tool_calls else '')",
)


@pytest.mark.parametrize(
    ("template", "record", "lost"),
    [
        (
            R1_DISTILL,
            chat("2+2?", "<think>two and two</think>4"),
            "the content '<think>two and two</think>4'",
        ),
        (TAGS, assistant(content="4", reasoning_content="two and two"), "the reasoning 'two and two'"),
        (TAGS, assistant(content="4", thinking="two and two"), "the reasoning 'two and two'"),
        (TAGS, assistant(content="", tool_calls=[CALL]), "the tool call {'name': 'add'"),
        (
            TAGS.replace("+ m.content", "~ m.content"),
            assistant(content=None, tool_calls=[CALL]),
            "the tool call",
        ),
        (TAGS.replace("+ m.content", "~ m.content"), assistant(content=None), "the content, which is None"),
        (TAGS.replace("+ m.content", "~ m.content"), assistant(content=PARTS), "which it prints as a list"),
        (
            TAGS.replace("m.content", "m.content | tojson"),
            assistant(content=PARTS),
            "which it prints as a list",
        ),
        (
            TAGS.replace("+ m.content", "~ m.content"),
            assistant(content={"text": "4"}),
            "must be a text and not {'te",
        ),
        (EVERYTHING, assistant(content=[{"type": "image", "url": "u"}]), "where only text can be read"),
        (TAGS.replace("m.content", "m.content | upper"), chat("A", "four"), "the content 'four'"),
        (
            TAGS.replace("m.content", "m.content[:9]"),
            chat("A", "four and so on"),
            "the content 'four and so on'",
        ),
        (
            TAGS.replace("in messages", "in messages[-2:]"),
            chat("one", "1", "two", "2"),
            "the content 'one' of message 0",
        ),
    ],
)
def test_an_answer_of_which_the_template_loses_something_is_refused_with_its_index(template, record, lost):
    tokenizer = chatting(template, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match=r"^record 1: the chat template .*") as refusal:
        encode_all([chat("A", "4"), record], tokenizer, 99)
    assert lost in str(refusal.value)


def test_an_answer_that_the_template_writes_is_taken_whatever_it_is_made_of():
    assert answer(EVERYTHING, assistant(content=PARTS)) == "4, surely"
    assert answer(EVERYTHING, assistant(content="4", reasoning_content="two and two. ")) == "two and two. 4"
    assert answer(EVERYTHING, assistant(content=None, tool_calls=[CALL])).startswith('[{"type": "function"')
    as_text = {"function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}
    assert "add" in answer(EVERYTHING, assistant(content="so:", tool_calls=[as_text]))
    spread = TAGS.replace(
        "m.content", "m.content.replace('<think>', '<think>\n').replace('</think>', '\n</think>\n\n')"
    )
    assert answer(spread, chat("2+2?", "<think>two</think>4")) == "<think>\ntwo\n</think>\n\n4"
    assert (
        answer(R1_DISTILL, chat("one", "<think>hm</think>1", "two", "2")) == "2"
    )  # a past thought is left out


SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (GEMMA, {"messages": [SYSTEM, *chat("a", "b")["messages"]]}, "TemplateError: System role not supported"),
        (GEMMA, {"messages": [*chat("a", "b")["messages"], *chat("a", "b")["messages"][1:]]}, "roles must alternate"),
        (CHATML, assistant(), "does not take this chat, with the roles .* UndefinedError"),
        ("{% for m in messages %}", chat("a", "b"), "TemplateSyntaxError"),
        ("{{ messages[7].content }}", chat("a", "b"), "UndefinedError"),
        (TAGS.replace("in messages", "in messages if m.role != 'system'"), {"messages": [SYSTEM, *chat("a", "b")["messages"]]}, r"loses the content 'Be kind.' of message 0 \(system\)"),
        (TAGS.split("{% if")[0], chat("a", "b"), "writes '<assistant>' before the answer, and not where one is asked"),
        (TAGS.replace("<assistant>", "<assistant><think>"), chat("one", "1"), "unchanged before the answer"),
        (None, chat("a", "b"), "the tokenizer has no chat template"),
        (TAGS, chat("a", "b", "c"), r"must end with the assistant's message; its roles are \['user', 'assistant', 'us"),
        (TAGS, {"messages": []}, r"must be a list of messages, not \[\]"),
        (TAGS, {"messages": "hello"}, "must be a list of messages, not 'hello'"),
        (TAGS, {"messages": [{"from": "human", "value": "a"}]}, "message 0 must be a dict with a 'role' and a 'content'"),
        (TAGS, {**chat("a", "b"), "tools": [{"function": {"name": "add"}}]}, "loses the tool 'add'"),
    ],
)  # fmt: skip
def test_a_chat_that_the_template_does_not_take_is_refused_with_its_index(template, record, message):
    tokenizer = chatting(template)
    with pytest.raises(ValueError, match=f"^record 0: .*{message}"):
        encode_all([record], tokenizer, 99)


def test_tools_are_shown_to_the_template():
    tokenizer = chatting("{% if tools %}{{ tools | tojson }}{% endif %}" + TAGS)
    record = {
        **chat("a", "b"),
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    assert split_chat(record, tokenizer).prompt.startswith('[{"type": "function"')


def test_the_chat_template_of_another_language_model_may_write_more_before_the_answer():
    """As Qwen3's does: an empty thought, which is not in the prompt, so the model must learn to write it."""
    qwen3 = TAGS.replace(
        "+ m.content", "+ ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content"
    )
    assert answer(qwen3, chat("2+2?", "4")) == "<think>\n\n</think>\n\n4"


def test_the_templates_of_the_course_have_no_other_mark_than_their_eos_token(tokenizer):
    assert end_mark(tokenizer) == tokenizer.eos_token
    assert end_mark(tiny_llama()) == ""
