"""What a chat template makes of a chat: the prompt, the answer, and the mark that ends it.

A template is a program. It may trim an answer, cut the reasoning out of it, pass over a tool call, print a list as
Python does, leave a system message out, or raise. So what it writes is compared with what it was given: every
message must be found again in the prompt, and the answer in the part to be learned. A record of which something
would be lost is refused.

The mark is what the template writes after an answer, such as `<|im_end|>`. Training teaches it, so generation
stops there, whatever the tokenizer's EOS token is.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from labkit.data.records import shortened
from labkit.data.tokens import ChatPrompt

REASONING = ("reasoning_content", "reasoning", "thinking")
PROBE = ("Which word?", "Heliotrope")


class SplitChat(NamedTuple):
    """A chat as text: the prompt, the answer as the template writes it, and the mark after it ("" for none)."""

    prompt: ChatPrompt
    answer: str
    mark: str


def split_chat(record: Mapping, tokenizer) -> SplitChat:
    """The template's text up to the assistant's last answer, that answer, and its end mark.

    Raises:
        ValueError: the chat does not end with the assistant, or the template raises or loses something.
    """
    messages = messages_of(record)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            "a chat record must end with the assistant's message; its roles are "
            f"{[message['role'] for message in messages]}"
        )
    prompt, whole = chat_prompt(record, tokenizer), render(messages, record, tokenizer)
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template does not write the prompt unchanged before the answer; use prompt/completion"
        )
    written = whole[len(prompt) :].rstrip()  # what follows the end mark is not worth learning
    message = messages[-1]
    refuse_if_lost([*content_lost(message, written), *rest_lost(message, written)], written)
    content = message["content"].strip() if isinstance(message.get("content"), str) else ""
    before, found, after = written.rpartition(content) if content else ("", "", "")
    spoken = any(message.get(field) for field in REASONING)
    if found and before.strip() and not spoken and render(messages[:-1], record, tokenizer) == prompt:
        raise ValueError(
            f"the chat template writes {before!r} before the answer, and not where one is asked for, so generation "
            "would begin elsewhere than training; let tokenizer.chat_template write it {% if add_generation_prompt %}"
        )
    mark = end_mark(tokenizer)
    if not written.endswith(mark):
        mark = after.lstrip()
    return SplitChat(prompt, written.removesuffix(mark), mark)


def chat_prompt(record: Mapping, tokenizer) -> ChatPrompt:
    """The template's text of a chat up to where the assistant's answer begins; an answer at its end is left off.

    Raises:
        ValueError: no chat, or the template raises or loses a message.
    """
    messages = messages_of(record)
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    prompt = render(asked, record, tokenizer, add_generation_prompt=True)
    lost = [
        f"{what} of message {i} ({message['role']})"
        for i, message in enumerate(asked)
        for what in content_lost(message, prompt, is_past=True)
    ]
    names = [tool.get("function", tool).get("name", "") for tool in record.get("tools") or ()]
    refuse_if_lost([*lost, *(f"the tool {name!r}" for name in names if name not in prompt)], prompt)
    return ChatPrompt(prompt)


def end_mark(tokenizer) -> str:
    """What the template writes after an answer, without the space around it; "" if that is nothing."""
    question, answer = PROBE
    try:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        _, found, after = render(chat, {}, tokenizer).rpartition(answer)
    except ValueError:  # no template, or one that wants other chats
        return ""
    return after.strip() if found else ""


def messages_of(record: Mapping) -> list[dict]:
    """The messages of a chat record.

    Raises:
        ValueError: they are not a list of `{"role", "content"}`.
    """
    messages = record["messages"]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"'messages' must be a list of messages, not {shortened(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i} must be a dict with a 'role' and a 'content', not {shortened(message)}"
            )
    return list(messages)


def render(messages: list[dict], record: Mapping, tokenizer, add_generation_prompt: bool = False) -> str:
    """What the template writes.

    Raises:
        ValueError: there is no template, or it raises.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template; give {'prompt': …, 'completion': …}, or set tokenizer.chat_template"
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=record.get("tools"),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template may raise whatever Python and Jinja can
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"the chat template does not take this chat, with the roles {roles}: {type(error).__name__}: {error}"
        ) from error


def content_lost(message: Mapping, written: str, is_past: bool = False) -> Iterator[str]:
    """What the template's text lacks of a message's content, in words.

    Templates of reasoning models leave out how the assistant came to a past answer, as they should.
    """
    content = message.get("content")
    if isinstance(content, str):
        if is_past and message["role"] == "assistant":
            content = content.rpartition("</think>")[2]
        if not is_found(content, written):
            yield f"the content {shortened(content)}"
    elif isinstance(content, (list, tuple)):
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) else part
            if not isinstance(text, str):
                yield f"the part {shortened(part)}, where only text can be read"
            elif not is_found(text, written):
                yield f"the content {shortened(text)}"
        if any(printed in written for printed in (str(content), json.dumps(content, default=str))):
            yield f"the text of {shortened(content)}, which it prints as a list"
    elif content is not None:
        yield f"the content, which must be a text and not {shortened(content)}"


def rest_lost(message: Mapping, written: str) -> Iterator[str]:
    """What the template's text lacks of an answer besides its content: reasoning and tool calls, in words."""
    calls = message.get("tool_calls") or ()
    for field in REASONING:
        if isinstance(message.get(field), str) and not is_found(message[field], written):
            yield f"the reasoning {shortened(message[field])}"
    for call in calls:
        function = call.get("function", call)
        values = leaves(function.get("arguments", {}))
        if function.get("name", "") not in written or not all(any(f in written for f in v) for v in values):
            yield f"the tool call {shortened(function)}"
    if message.get("content") is None and (not calls or ("None" in written and "None" not in str(calls))):
        yield "the content, which is None"


def leaves(value: object) -> Iterator[set[str]]:
    """Of each key and value in the arguments of a call, the forms in which a template may write it."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if isinstance(parsed, (dict, list)):
            value = parsed
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield {str(key)}
            yield from leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from leaves(inner)
    else:
        forms = {str(value), json.dumps(value).strip('"'), json.dumps(value, ensure_ascii=False).strip('"')}
        yield forms | {
            json.dumps(form)[1:-1] for form in forms
        }  # arguments given as JSON may be quoted again


def is_found(text: str, written: str) -> bool:
    """Is `text` in `written`, but for the space around it and around tags such as `<think>`?"""
    return text.strip() in written or without_space_at_tags(text) in without_space_at_tags(written)


def without_space_at_tags(text: str) -> str:
    return re.sub(r"\s*(</?\w+>)\s*", r"\1", text.strip())


def refuse_if_lost(lost: list[str], written: str) -> None:
    """Raise a `ValueError` that says what the template lost, if anything."""
    if lost:
        raise ValueError(
            f"the chat template loses {' and '.join(lost)}; what it writes is {shortened(written)}. Use a "
            "tokenizer.chat_template that writes it, or give {'prompt': …, 'completion': …}"
        )
