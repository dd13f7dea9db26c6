"""Tokens a second for 16 requests at once, over 1, 4 and 16 distinct adapters; the engines take turns, others held."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from labkit.data.tickets import load_tickets, ticket_chat
from labkit.data.tokens import prompt_ids
from labkit.training.evaluate import chat_prompts
from recipes.serving_engines.adapters import NAMES
from recipes.serving_engines.engines import Server

REQUESTS = 16
TOKENS = 32  # of an answer, unless it ends before
DISTINCT = (1, 4, 16)


def prompts(tokenizer: Any, lap: int) -> list[list[int]]:
    """Tickets that no lap before had, so that only what all begin with is in anybody's cache."""
    tickets = load_tickets("train")[lap * REQUESTS * len(DISTINCT) :][: REQUESTS * len(DISTINCT)]
    return [
        prompt_ids(text, tokenizer) for text in chat_prompts([ticket_chat(t) for t in tickets], tokenizer)
    ]


def at_once(server: Server, asked: Sequence[list[int]], names: Sequence[str], tokens: int = TOKENS) -> dict:
    """Ask everything at the same time, request i of adapter i modulo n; from the first word sent to the last one read."""
    with ThreadPoolExecutor(len(asked)) as pool:
        began = time.perf_counter()
        waiting = [
            pool.submit(server.complete, ids, names[place % len(names)], tokens)
            for place, ids in enumerate(asked)
        ]
        said = [one.result() for one in waiting]
        seconds = time.perf_counter() - began
    failed = [one.words for one in said if one.status != 200]
    if failed:
        raise RuntimeError(f"{server.name}: {failed[0]}")
    made = sum(one.tokens for one in said)
    read = sum(len(ids) for ids in asked)
    return {"requests": len(asked), "prompt_tokens": read, "tokens": made, "seconds": round(seconds, 4)}


def laps(servers: Sequence[Server], tokenizer: Any, places: Sequence[int]) -> Iterator[dict]:
    """The lines of some laps. The order of the engines turns with each lap.

    Every server first answers each adapter once, untimed: what is loaded or compiled at first use is not what is measured.
    """
    for server in servers:
        server.hold()
    for server in servers:
        server.hold(False)
        for n in DISTINCT:
            at_once(server, prompts(tokenizer, 20)[:REQUESTS], NAMES[:n], 2)
        server.hold()
    for lap in places:
        asked = prompts(tokenizer, lap)
        turn = lap % len(servers)
        for place, n in enumerate(DISTINCT):
            for server in [*servers[turn:], *servers[:turn]]:
                server.hold(False)
                found = at_once(server, asked[place * REQUESTS :][:REQUESTS], NAMES[:n])
                server.hold()
                yield {"kind": "speed", "engine": server.name, "n": n, "lap": lap, **found}
    for server in servers:
        server.hold(False)
