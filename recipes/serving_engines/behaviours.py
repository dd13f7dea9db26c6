"""What each engine does where serving goes wrong in silence: a row for each case, with the server's own words.

Outcomes: "right"; "refused" with an error; "wrong", answered as if all were well; "cannot".
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from labkit.serving.registry import Registry
from recipes.serving_engines.adapters import folder
from recipes.serving_engines.engines import (
    LABKIT,
    LLAMA,
    VLLM,
    LabkitServer,
    LlamaServer,
    Said,
    Server,
    VllmServer,
)

TOKENS = 24  # of an answer that is compared
CLOSE = 1e-3  # of a log-probability: more is another model, not rounding
TRIES = 3
TYPO = "tikcets"
RIGHT, REFUSED, WRONG, CANNOT = "right", "refused", "wrong", "cannot"


def row(engine: str, case: str, outcome: str, words: str, status: int | None = None, **others: Any) -> dict:
    """One line of the records."""
    known = {"kind": "behaviour", "engine": engine, "case": case, "outcome": outcome, "status": status}
    return known | {"words": " ".join(words.split())[:500]} | others


def unknown_name(server: Server, ids: list[int]) -> Iterator[dict]:
    """A name with a typo, and for llama.cpp a number that no adapter has."""
    base = server.complete(ids, None, TOKENS)
    named = raw(server, ids, model=TYPO)
    yield answered_as_base(server, "unknown name", f"model: {TYPO!r}", named, base)
    if isinstance(server, LlamaServer):
        said = raw(server, ids, lora=[{"id": 99, "scale": 1.0}])
        yield answered_as_base(server, "unknown number", "lora: [{'id': 99}]", said, base)
        yield no_adapter_named(server, ids, base)


def no_adapter_named(server: LlamaServer, ids: list[int], base: Said) -> dict:
    """The row of a request to llama.cpp that says nothing of adapters, although it was told to load them switched off."""
    said = raw(server, ids, lora=[])
    every = raw(server, ids, lora=[{"id": number, "scale": 1.0} for number in server.ids.values()])
    whose = (
        "the base"
        if said.words == base.words
        else "all adapters added up"
        if said.words == every.words
        else "neither"
    )
    words = f"with lora_init_without_apply, the answer is that of: {whose}; {said.words[:80]!r}"
    return row(LLAMA, "no adapter named", RIGHT if said.words == base.words else WRONG, words, said.status)


def raw(server: Server, ids: list[int], **changed: Any) -> Said:
    """The answer to a request to the base with other fields."""
    return server.read(server.ask("POST", "/v1/completions", server.body(ids, None, TOKENS, 0) | changed))


def answered_as_base(server: Server, case: str, asked: str, said: Said, base: Said) -> dict:
    """The row of a request that names nothing, where an answer is the base's or somebody's."""
    if said.status != 200:
        return row(server.name, case, REFUSED, said.words, said.status, asked=asked)
    words = f"answers {'as the base' if said.words == base.words else 'something else than the base'}"
    return row(server.name, case, WRONG, words, 200, asked=asked)


def apart(one: Said, other: Said) -> float:
    """By how much a log-probability differs at most, over the first answer's tokens, up to where the other goes on otherwise.

    A token that the other does not name among its likeliest counts with the least of those: the difference is larger.
    """
    most = 0.0
    for mine, theirs in zip(one.top or (), other.top or ()):
        best = max(mine, key=mine.__getitem__)
        most = max(most, abs(mine[best] - theirs.get(best, min(theirs.values()))))
        if max(theirs, key=theirs.__getitem__) != best:
            break
    return round(most, 7)


def together(
    server: Server, asked: Sequence[tuple[list[int], str | None]], busy: list[int], top: int
) -> list[Said]:
    """The answers to requests that come while another one is being answered, so that they are taken on in one step."""
    with ThreadPoolExecutor(len(asked) + 1) as pool:
        first = pool.submit(server.complete, busy, None, 3 * TOKENS)
        time.sleep(0.5)
        rest = [pool.submit(server.complete, ids, name, TOKENS, top) for ids, name in asked]
        said = [one.result() for one in rest]
        first.result()
    if silent := [one.words for one in said if one.status != 200]:  # such as a machine that slept meanwhile
        raise RuntimeError(f"{server.name} did not answer a request of a batch: {silent[0]}")
    return said


def mixed_batch(
    server: Server, ids: list[int], busy: list[int], names: Sequence[str], **others: Any
) -> Iterator[dict]:
    """The base and adapters at once: is each answer the one that it is alone?"""
    top = 0 if server.name == LABKIT else 2
    rows = [None, *names]
    alone = {name: server.complete(ids, name, TOKENS, top) for name in rows}
    tries = [together(server, [(ids, name) for name in rows], busy, top) for _ in range(TRIES)]
    for name in rows:
        said = [one[rows.index(name)] for one in tries]
        changed = sum(one.words != alone[name].words for one in said)
        most = max(apart(alone[name], one) for one in said)
        wrong = bool(changed) or most > CLOSE
        words = f"{changed} of {TRIES} answers differ from the one alone; alone: {alone[name].words[:80]!r}"
        if changed:
            other = next(one for one in said if one.words != alone[name].words)
            words += f", in the batch: {other.words[:80]!r}"
        case = "mixed batch, the base" if name is None else "mixed batch, an adapter"
        found = {"adapter": name, "apart": most if top else None, "changed": changed, "tries": TRIES}
        yield row(server.name, case, WRONG if wrong else RIGHT, words, 200, **found, **others)


def other_base(server: LabkitServer | VllmServer, ids: list[int], misfits: Path) -> Iterator[dict]:
    """Adapters of other bases, loaded while the server runs."""
    for name, case in (
        ("other-shape", "adapter of another shape"),
        ("other-weights", "adapter of another base"),
    ):
        loaded = server.load(name, misfits / name)
        if loaded.status != 200:
            yield row(server.name, case, REFUSED, loaded.words, loaded.status)
            continue
        base, said = server.complete(ids, None, TOKENS, 2), server.complete(ids, name, TOKENS, 2)
        if said.status != 200:
            yield row(server.name, case, REFUSED, f"{loaded.words} Then: {said.words}", said.status)
            continue
        words = f"{loaded.words} Then answers: {said.words[:80]!r}; the base: {base.words[:80]!r}"
        yield row(server.name, case, WRONG, words, 200, apart=apart(base, said))
        server.unload(name)


def other_base_of_llama(
    start: Callable[[dict[str, Path]], LlamaServer], ids: list[int], misfits: Path
) -> Iterator[dict]:
    """The same for llama.cpp, which loads adapters when it starts."""
    for name, case in (
        ("other-shape", "adapter of another shape"),
        ("other-weights", "adapter of another base"),
    ):
        try:
            server = start({name: misfits / f"{name}.gguf"})
        except RuntimeError as error:
            lines = [
                line
                for line in str(error).splitlines()
                if "lora" in line.lower() or "adapter" in line.lower()
            ]
            yield row(LLAMA, case, REFUSED, "the server does not start: " + " ".join(lines or [str(error)]))
            continue
        base, said = server.complete(ids, None, TOKENS, 2), server.complete(ids, name, TOKENS, 2)
        server.close()
        words = f"starts, and answers: {said.words[:80]!r}; the base: {base.words[:80]!r}"
        yield row(LLAMA, case, WRONG, words, 200, apart=apart(base, said))


def alias_moved(server: LabkitServer, ids: list[int], registry: Registry) -> Iterator[dict]:
    """An alias that moves while an answer is being written, and the next request to it."""
    old, new = (server.complete(ids, f"support@v{number}", 60).words for number in (1, 2))
    registry.set_alias("support@production", 1)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.complete, ids, "support@production", 60)
        time.sleep(0.5)
        registry.set_alias("support@production", 2)
        in_time = not under_way.done()
        following = server.complete(ids, "support@production", 60).words
        first = under_way.result().words
    registry.set_alias("support@production", 1)
    right = in_time and first == old and following == new and old != new
    words = f"moved while an answer was under way: {in_time}; that one is the old version's: {first == old}; the next one "
    yield row(
        LABKIT,
        "version changed meanwhile",
        RIGHT if right else WRONG,
        words + f"the new one's: {following == new}",
    )


def changed_meanwhile(server: VllmServer, ids: list[int], work: Path) -> Iterator[dict]:
    """The same for vLLM, which has no aliases: a name is loaded anew, in place, while it answers."""
    for name, source in (("old", "tickets"), ("new", "sql"), ("moving", "tickets")):
        server.load(name, folder(work, source))
    old, new = server.complete(ids, "old", 60), server.complete(ids, "new", 60)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.complete, ids, "moving", 60)
        time.sleep(1.0)
        said = server.load("moving", folder(work, "sql"), load_inplace=True)
        in_time = not under_way.done()
        following, first = server.complete(ids, "moving", 60), under_way.result()
    for name in ("old", "new", "moving"):
        server.unload(name)
    right = in_time and first.words == old.words and following.words == new.words
    whose = {old.words: "the old adapter's", new.words: "the new one's"}
    words = f"{said.words} Loaded in place while an answer was under way: {in_time}; that one is "
    words += f"{whose.get(first.words, 'of neither')}: {first.words[:100]!r}; the next one is "
    words += f"{whose.get(following.words, 'of neither')}: {following.words[:60]!r}"
    yield row(VLLM, "version changed meanwhile", RIGHT if right else WRONG, words, said.status)


def same_name(server: LabkitServer | VllmServer, long: list[int], work: Path) -> Iterator[dict]:
    """Other weights under the name of before, and a prompt of before: are its old keys and values used?

    Either from another folder, or from the same folder with other files in it.
    """
    top = 0 if server.name == LABKIT else 2
    place, truth = work / "overwritten", {}
    for name in ("tickets", "sql"):
        server.load(f"cold-{name}", copied(folder(work, name), work / f"cold-{name}"))
        truth[name] = server.complete(long, f"cold-{name}", TOKENS, top)
    for case in ("same name, another folder", "same folder, other files"):
        server.load("draft", copied(folder(work, "tickets"), place))
        before = server.complete(long, "draft", TOKENS, top)
        server.unload("draft")
        path = copied(folder(work, "sql"), place) if case.startswith("same folder") else work / "cold-sql"
        said = server.load("draft", path)
        after = server.complete(long, "draft", TOKENS, top)
        server.unload("draft")
        most = apart(truth["sql"], after)
        right = before.words == truth["tickets"].words and after.words == truth["sql"].words and most < CLOSE
        words = f"loaded again ({said.status}), the answer is the new weights' own: {right}; expected "
        words += f"{truth['sql'].words[:60]!r}, got {after.words[:60]!r}"
        yield row(
            server.name, case, RIGHT if right else WRONG, words, said.status, apart=most if top else None
        )
    for name in ("tickets", "sql"):
        server.unload(f"cold-{name}")


def copied(source: Path, target: Path) -> Path:
    """`target`, a copy of the folder `source`, whatever was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def same_prompt_of_llama(
    server: LlamaServer, long: list[int], names: Sequence[str] = ("tickets", "sql")
) -> Iterator[dict]:
    """llama.cpp has no names to load anew: one prompt for one adapter, then for another."""
    asked = server.body(long, names[1], TOKENS, 2) | {"cache_prompt": False}
    cold = server.read(server.ask("POST", "/v1/completions", asked), 2)
    server.complete(long, names[0], TOKENS, 2)
    after = server.complete(long, names[1], TOKENS, 2)
    most = apart(cold, after)
    words = f"a prompt for one adapter, then for another: as without a cache, to {most:.1g}"
    right = after.words == cold.words and most < CLOSE
    yield row(
        LLAMA, "same prompt, another adapter", RIGHT if right else WRONG, words, after.status, apart=most
    )
    said = server.ask("POST", "/lora-adapters", [{"path": "other.gguf", "scale": 1.0}])
    words = f"its server has no route that loads one; POST /lora-adapters with a path: {said.words}"
    yield row(LLAMA, "load while it runs", CANNOT, words, said.status)


def load_while_running(
    server: LabkitServer | VllmServer, ids: list[int], work: Path, laps: int = 5
) -> Iterator[dict]:
    """How long it takes until an adapter that the server did not start with has answered, and whether it is gone after."""
    loads, first, second = [], [], []
    for lap in range(laps):
        path = copied(folder(work, f"random-{lap + 1:02}"), work / f"loaded-{lap}")
        began = time.perf_counter()
        said = server.load(f"loaded-{lap}", path)
        loads.append(time.perf_counter() - began)
        for taken in (first, second):
            began = time.perf_counter()
            server.complete(ids, f"loaded-{lap}", 1)
            taken.append(time.perf_counter() - began)
        server.unload(f"loaded-{lap}")
        gone = server.complete(ids, f"loaded-{lap}", 1)
    right = said.status == 200 and gone.status == 404
    words = f"{said.words} After unloading it: {gone.status} {gone.words}"
    times = {"load_ms": loads, "first_ms": first, "second_ms": second}
    milliseconds = {name: [round(1000 * one, 1) for one in taken] for name, taken in times.items()}
    yield row(
        server.name, "load while it runs", RIGHT if right else WRONG, words, said.status, **milliseconds
    )


def no_log_probabilities(server: LabkitServer, ids: list[int]) -> Iterator[dict]:
    """labkit's server refuses to say log-probabilities."""
    said = raw(server, ids, logprobs=5)
    yield row(LABKIT, "log-probabilities", CANNOT, said.words, said.status)
