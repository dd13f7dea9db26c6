"""Between a service and its rollouts: who answers a request, who hears of the answer, and what the shadow is asked.

The version is chosen once, when a request is submitted. What a client is sent never waits for a rollout, and never
fails with it: the text goes out first, and a shadow that is not taken, or fails, is a line in the record.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from labkit.serving.protocol import ChatBody, CompletionBody
from labkit.serving.requests import Completion, GenerationRequest
from labkit.serving.rollout import Rollouts
from labkit.serving.routed import Routed
from labkit.serving.versions import Version

TENANT = "shadow"  # shadows take turns with the users as one more of them
Send = Callable[[int, str | Completion], None]
log = logging.getLogger(__name__)


def route(
    rollouts: Rollouts | None, id: str, body: CompletionBody | ChatBody, source: Any, answers: int
) -> Routed | None:
    """Which version answers; None if that is not for a rollout to say."""
    if rollouts is None or not isinstance(source, Version):
        return None
    return rollouts.route(id, body.model, body.user, source, asked(body) if answers == 1 else None)


def asked(body: CompletionBody | ChatBody) -> str | None:
    """What a judge is shown of a request: the prompt, or the last message of a chat; None for token ids."""
    if isinstance(body, ChatBody):
        return body.messages[-1].content
    prompt = body.prompts[0]
    return prompt if isinstance(prompt, str) else None


def heard(rollouts: Rollouts | None, given: Routed | None, answers: int, send: Send) -> Send:
    """`send`, which the rollouts hear of after it."""
    if rollouts is None or given is None:
        return send
    gather = rollouts.gathering(given, answers)

    def send_and_gather(index: int, event: str | Completion) -> None:
        send(index, event)
        gather(index, event)

    return send_and_gather


def forget(rollouts: Rollouts | None, given: Routed | None) -> None:
    """Take note that an answer is not given after all."""
    if rollouts is not None and given is not None:
        rollouts.forget(given)


def shadow(service: Any, given: Routed | None, request: GenerationRequest, stops: list[str]) -> None:
    """Have the candidate answer too. It is passed over while half of the queue is taken, and no failure gets out."""
    if given is None or given.shadow is None:
        return
    engine, label = service.engine, given.shadow
    with engine.changed:
        if 2 * len(engine.waiting) >= engine.limits.queue:
            return
    gather = partial(service.rollouts.gathering(given, 1, is_shadow=True), 0)
    given.running += 1
    try:
        given.stream = service.begin(replace(request, adapter=label, tenant=TENANT), stops, label, gather)
    except Exception:
        given.let_go()
        log.exception("the shadow of an answer was not asked")
