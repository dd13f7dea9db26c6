"""Do the engines compute the same? Log-probabilities of the first token, held against transformers with PEFT in fp32."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from labkit.checks import needed
from labkit.data.sql import load_questions, sql_record
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.data.tokens import prompt_ids
from labkit.serving.batched import AdapterBank
from labkit.serving.registry import Registry
from labkit.serving.stepping import Stepper
from labkit.training.evaluate import chat_prompts
from recipes.serving_engines.adapters import NAMES
from recipes.serving_engines.engines import LABKIT, Server

TOP = 5  # log-probabilities that are compared
COMPARED = (None, *NAMES[:4])  # None: the base
Logs = dict[int, float]


def prompts(tokenizer: Any) -> list[list[int]]:
    """What every engine is asked: two tickets, a question to a database, and the beginning of a sentence."""
    chats = [ticket_chat(ticket) for ticket in load_tickets("test")[:2]] + [
        sql_record(load_questions("test")[0])
    ]
    texts = [*chat_prompts(chats, tokenizer), "It is a truth universally acknowledged, that a single man"]
    return [prompt_ids(text, tokenizer) for text in texts]


def top_of(logits: torch.Tensor) -> Logs:
    """The log-probabilities of the likeliest tokens, by id; logits of one place, (vocabulary,)."""
    logs = logits.float().log_softmax(-1)
    best = logs.topk(TOP)
    return dict(zip(best.indices.tolist(), best.values.tolist()))


@torch.no_grad()
def reference(
    model: nn.Module, asked: list[list[int]], registry: Registry
) -> dict[tuple[str | None, int], Logs]:
    """What transformers and PEFT say, by adapter and prompt."""
    peft = needed("peft", "comparing engines with PEFT")
    first = registry.resolve(NAMES[0])
    adapted = peft.PeftModel.from_pretrained(model, first.path, adapter_name=NAMES[0])
    for name in COMPARED[2:]:
        adapted.load_adapter(registry.resolve(name).path, adapter_name=name)
    found = {}
    for place, ids in enumerate(asked):
        whole = torch.tensor([ids])
        with adapted.disable_adapter():
            found[None, place] = top_of(adapted(input_ids=whole).logits[0, -1])
        for name in COMPARED[1:]:
            adapted.set_adapter(name)
            found[name, place] = top_of(adapted(input_ids=whole).logits[0, -1])
    return found


def of_labkit(model: nn.Module, asked: list[list[int]], registry: Registry) -> Iterator[dict]:
    """What the engine in `labkit.serving` computes, in one batch of the base and all adapters; its server says no numbers.

    Three numbers say what the adapters of others do to the base's row. `base_apart`: the largest difference of a logit
    from the same batch without adapters, where only they differ. `alone_apart`, `alone_relative`: from the row alone, in
    logits and as a share of their norm, where matrix products of another shape round otherwise, too.
    """
    bank = AdapterBank(model)
    for name in COMPARED[1:]:
        bank.load(registry.resolve(name).path, name)
    rows = len(COMPARED)
    stepper = Stepper(bank, rows)
    for place, ids in enumerate(asked):
        logits = stepper.step(0, [0] * rows, [ids] * rows, COMPARED)
        plain = stepper.step(0, [0] * rows, [ids] * rows, [None] * rows)[0]
        alone = stepper.step(0, [0], [ids], [None])[0]
        for row, name in enumerate(COMPARED):
            line = {"adapter": name, "prompt": place, "top": top_of(logits[row])}
            if name is None:
                gap = logits[row] - alone
                line["base_apart"] = (logits[row] - plain).abs().max().item()
                line["alone_apart"] = gap.abs().max().item()
                line["alone_relative"] = (gap.norm() / alone.norm()).item()
            yield line
    for name in COMPARED[1:]:
        bank.unload(name)


def of_server(server: Server, asked: list[list[int]]) -> Iterator[dict]:
    """What a server says over HTTP."""
    for place, ids in enumerate(asked):
        for name in COMPARED:
            said = server.complete(ids, name, 1, TOP)
            if said.top is None:
                raise RuntimeError(f"{server.name} answers {name}: {said.words}")
            yield {"adapter": name, "prompt": place, "top": said.top[0]}


def line_of(engine: str, found: dict, expected: dict[tuple[str | None, int], Logs]) -> dict:
    """The line of one adapter and prompt: the likeliest token, and the largest difference among PEFT's likeliest.

    A token among PEFT's five that the engine does not name among its own is left out of the difference.
    """
    wanted, top = expected[found["adapter"], found["prompt"]], found.pop("top")
    first = max(wanted, key=wanted.__getitem__)
    apart = [abs(top[token] - value) for token, value in wanted.items() if token in top]
    return {
        "kind": "agreement",
        "engine": engine,
        **found,
        "over": "in process" if engine == LABKIT else "HTTP",
        "logprob": round(top.get(first, float("nan")), 7),
        "peft": round(wanted[first], 7),
        "same_token": max(top, key=top.__getitem__) == first,
        "compared": len(apart),
        "apart": round(max(apart), 8),
    }
