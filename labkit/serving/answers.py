"""What is answered to a request over HTTP: OpenAI's objects, whole or in chunks."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from labkit.serving.protocol import ChatBody, CompletionBody, Refused
from labkit.serving.requests import ERROR, TIMEOUT, Completion

DONE = "data: [DONE]\n\n"


class Answer:
    """The answer to one request, under one id.

    Args:
        body: the request.
        id: of the answer.
        created: seconds since 1970.
    """

    def __init__(self, body: CompletionBody | ChatBody, id: str, created: int):
        self.body, self.is_chat = body, isinstance(body, ChatBody)
        self.head = {"id": id, "created": created, "model": body.model}

    def whole(self, texts: Sequence[str], answers: Sequence[Completion]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, (text, answer) in enumerate(zip(texts, answers)):
            said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": answer.finish_reason})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage(answers)}

    def usage(self, answers: Iterable[Completion]) -> dict[str, Any]:
        """Tokens read and written; a prompt counts once, however many answers it has."""
        answers = list(answers)
        asked = answers[:: self.body.n]
        read, written = sum(a.prompt_tokens for a in asked), sum(len(a.tokens) for a in answers)
        cached = {"cached_tokens": sum(a.cached_tokens for a in asked)}
        made = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {**made, "prompt_tokens_details": cached}

    def first(self, index: int) -> str | None:
        """The chunk that begins an answer: a chat's says whose it is."""
        return self.chunk(index, {"role": "assistant", "content": ""}, None) if self.is_chat else None

    def piece(self, index: int, text: str) -> str:
        """The chunk of a piece of text."""
        return self.chunk(index, {"content": text} if self.is_chat else text, None)

    def last(self, index: int, answer: Completion) -> str:
        """The chunk that ends an answer."""
        return self.chunk(index, {} if self.is_chat else "", answer.finish_reason)

    def chunk(self, index: int, said: Any, reason: str | None) -> str:
        choice = {"index": index, "delta" if self.is_chat else "text": said, "finish_reason": reason}
        return self.event([choice | {"logprobs": None}], None)

    def counted(self, answers: Iterable[Completion]) -> str:
        """The chunk with the tokens counted, and no text."""
        return self.event([], self.usage(answers))

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> str:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        made = {**self.head, "object": kind, "choices": choices}
        if self.body.include_usage:
            made["usage"] = usage
        return f"data: {json.dumps(made, ensure_ascii=False)}\n\n"


def failure(answer: Completion) -> Refused | None:
    """What is answered where the engine could not finish; None if it could."""
    if answer.finish_reason == TIMEOUT:
        return Refused(504, "the answer took too long, and was given up", "timeout")
    if answer.finish_reason != ERROR:
        return None
    if isinstance(answer.error, (ValueError, OSError)):  # of an adapter that cannot be served
        return Refused(422, str(answer.error), "adapter_not_servable", "model")
    return Refused(500, "the answer could not be computed", "internal_error")
