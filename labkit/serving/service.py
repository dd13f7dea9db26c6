"""What a server serves: a base, the versions of a registry and their aliases, and adapters loaded while it runs.

    support, support@production, support@v2      of the registry
    draft                                        loaded by a path, until it is unloaded
    smollm2-135m                                 the base alone, by its own name and no other

A name that means nothing is an error. Nothing falls back to the base.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from labkit.data.chats import chat_prompt
from labkit.data.tokens import prompt_ids
from labkit.files.writing import InUse
from labkit.serving import traffic
from labkit.serving.database import RegistryDamaged
from labkit.serving.engine import Engine
from labkit.serving.loaded import read_adapter
from labkit.serving.metrics import BASE, Metrics
from labkit.serving.naming import UnknownAdapter, check_name
from labkit.serving.protocol import CHOICES, ChatBody, CompletionBody, Refused
from labkit.serving.registry import Registry
from labkit.serving.requests import Completion, GenerationRequest, Source, Stream
from labkit.serving.rollout import Rollouts
from labkit.serving.schema import OtherSchema
from labkit.serving.texts import TextWriter
from labkit.training.greedy import stops_of


@dataclass(frozen=True)
class Card:
    """A name that a request may use, as `/v1/models` lists it."""

    name: str
    parent: str | None
    created: int
    owner: str

    def as_json(self) -> dict[str, Any]:
        root = self.name if self.parent is None else self.name.partition("@")[0]
        made = {"id": self.name, "object": "model", "created": self.created, "owned_by": self.owner}
        return made | {"root": root, "parent": self.parent}


class Service:
    """A base with its adapters, behind a server.

    Args:
        engine: whose `resolve` is replaced by this service's.
        tokenizer: of the base.
        name: of the base.
        registry: of the adapters; None for those alone that are loaded while it runs.
        folder: adapters below it may be loaded while it runs; None for none.
        rollouts: the trials of the registry's versions; None for none.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        name: str,
        registry: Registry | None = None,
        folder: Path | None = None,
        rollouts: Rollouts | None = None,
    ):
        self.engine, self.tokenizer, self.name, self.registry = engine, tokenizer, name, registry
        self.folder = None if folder is None else Path(folder).resolve()
        self.rollouts = rollouts
        self.loaded: dict[str, Source] = {}
        self.lock = threading.Lock()
        self.metrics = Metrics(engine)
        self.stops = stops_of(engine.bank.model, tokenizer)
        engine.resolve = self.resolve

    def resolve(self, name: str) -> Any:
        """The adapter that a name means now.

        Raises:
            LookupError: none.
            Refused: the registry cannot be read.
        """
        with self.lock:
            if name in self.loaded:
                return self.loaded[name]
        if self.registry is None:
            raise UnknownAdapter(f"there is no adapter {name[:100]!r}")
        try:
            with self.registry_read():
                return self.registry.resolve(name)
        except ValueError as error:  # no name at all
            raise UnknownAdapter(str(error)) from None

    @contextmanager
    def registry_read(self) -> Iterator[None]:
        """A registry that cannot be read is 503, and no fault of the request; one that recovers is read again."""
        try:
            yield
        except (InUse, OSError, OtherSchema, RegistryDamaged) as error:
            raise Refused(503, self.placeless(error), "registry_unavailable") from None

    def cards(self) -> Iterator[Card]:
        """Every name that may be asked for."""
        yield Card(self.name, None, 0, "labkit")
        if self.registry is not None:
            with self.registry_read():
                made = {version.label: version for version in self.registry.versions()}
                aliases = self.registry.aliases()
            for label, version in made.items():
                yield Card(label, self.name, int(version.published.timestamp()), version.owner)
            for alias, number in aliases.items():
                if version := made.get(f"{alias.partition('@')[0]}@v{number}"):
                    yield Card(alias, self.name, int(version.published.timestamp()), version.owner)
        with self.lock:
            names = list(self.loaded)
        for name in names:
            yield Card(name, self.name, 0, "runtime")

    def load(self, name: str, path: str) -> None:
        """Make the PEFT folder `path` an adapter of this name, until it is unloaded.

        Raises:
            Refused: not allowed, a name that is taken, or a folder that cannot be served; says why.
        """
        if self.folder is None:
            message = "this server loads no adapters by path; publish them in its registry, or start it with --adapters"
            raise Refused(403, message, "loading_disabled")
        place = (self.folder / path).resolve()
        if not place.is_relative_to(self.folder):
            message = "lora_path leads out of the folder of --adapters; give a path below it"
            raise Refused(403, message, "path_not_allowed", "lora_path")
        try:
            check_name(name, "lora_name")
            bank = self.engine.bank
            adapter = read_adapter(bank.model, place, name, bank.fingerprint)
        except FileNotFoundError as error:
            raise Refused(404, self.placeless(error), "adapter_not_found", "lora_path") from None
        except (ValueError, OSError) as error:
            raise Refused(400, self.placeless(error), "adapter_not_servable") from None
        if adapter.nbytes > self.engine.adapters.budget:
            message = (
                f"{name} takes {adapter.nbytes:,} bytes, and the budget is {self.engine.adapters.budget:,}"
            )
            raise Refused(400, message, "adapter_too_large")
        with self.lock:
            if name == self.name or name in self.loaded or self.is_published(name):
                raise Refused(400, f"there is a model {name!r} already", "name_taken", "lora_name")
            self.loaded[name] = Source(name, place, adapter.version)

    def placeless(self, error: Exception) -> str:
        """What an error says, without where its files are on this machine, which is nothing to a client."""
        text = str(error)
        for place in (self.folder, self.registry and self.registry.root):
            text = text.replace(str(place), place.name) if place else text
        return text

    def is_published(self, name: str) -> bool:
        return self.registry is not None and bool(self.registry.versions(name))

    def unload(self, name: str) -> None:
        """Forget an adapter that was loaded by path; what is being written with it is finished.

        Raises:
            Refused: there is none of this name.
        """
        with self.lock:
            if self.loaded.pop(name, None) is None:
                raise Refused(
                    404, f"no adapter {name[:100]!r} was loaded by path", "adapter_not_found", "lora_name"
                )

    def prompts(self, body: CompletionBody | ChatBody) -> list[list[int]]:
        """The prompts of a request as token ids.

        Raises:
            Refused: there is none, or the template does not take the chat.
        """
        if isinstance(body, ChatBody):
            messages = [message.model_dump(exclude_none=True) for message in body.messages]
            if messages[-1]["role"] == "assistant":
                raise Refused(
                    400, "the last message must not be the assistant's", "invalid_value", "messages"
                )
            try:
                return [prompt_ids(chat_prompt({"messages": messages}, self.tokenizer), self.tokenizer)]
            except ValueError as error:
                raise Refused(400, str(error), "chat_not_rendered", "messages") from None
        made = [
            prompt_ids(prompt, self.tokenizer) if isinstance(prompt, str) else list(prompt)
            for prompt in body.prompts
        ]
        if not made or not all(made):
            raise Refused(400, "prompt is empty; give at least one token", "invalid_value", "prompt")
        return made

    def submit(
        self, body: CompletionBody | ChatBody, send: Callable[[int, str | Completion], None], id: str = ""
    ) -> list[Stream]:
        """Ask the engine for all answers to a request, in order of prompts, and of `n` for each.

        Args:
            body: the request.
            send: called in the engine's thread with the index of an answer, and a piece of its text or its end.
            id: of the answer, by which feedback will name it.

        Returns:
            the streams. Their ends are counted in the metrics, whether or not somebody still reads.

        Raises:
            Refused, LookupError, ValueError, Full, Draining: the request is not taken, and nothing is written.
        """
        prompts = self.prompts(body)
        answers = len(prompts) * body.n
        if answers > CHOICES:
            message = (
                f"{len(prompts)} prompts times n={body.n} are {answers} answers; at most {CHOICES} are given"
            )
            raise Refused(400, message, "invalid_value", "n")
        source = None if body.model == self.name else self.resolve(body.model)
        with self.registry_read():
            given = traffic.route(self.rollouts, id, body, source, answers)
        send = traffic.heard(self.rollouts, given, answers, send)
        label = given.label if given is not None else None if source is None else source.label
        streams: list[Stream] = []
        try:
            for index, sampling in enumerate(body.samplings(answers)):
                ids = prompts[index // body.n]
                request = GenerationRequest(
                    ids,
                    label,  # an alias may move meanwhile
                    strength=body.strength,
                    max_new_tokens=self.tokens(body, len(ids)),
                    sampling=sampling,
                    stop_ids=self.stops.ids,
                    tenant=body.user or "",
                )
                streams.append(self.begin(request, body.stop, label or BASE, partial(send, index)))
        except Exception:
            for stream in streams:
                stream.cancel()
            traffic.forget(self.rollouts, given)
            raise
        traffic.shadow(self, given, request, body.stop)
        return streams

    def begin(
        self,
        request: GenerationRequest,
        stops: Sequence[str],
        adapter: str,
        send: Callable[[str | Completion], None],
    ) -> Stream:
        """Ask the engine for one answer."""

        def count(event: str | Completion) -> None:
            if isinstance(event, Completion):
                self.metrics.count(adapter, event)
                if isinstance(event.error, (ValueError, OSError)):
                    event = replace(event, error=ValueError(self.placeless(event.error)))
            send(event)

        own = [self.stops.text] if self.stops.text else []
        writer = TextWriter(self.text, [*stops, *own], count)
        stream = self.engine.submit(request, writer)
        writer.attach(stream)
        return stream

    def tokens(self, body: CompletionBody | ChatBody, prompt: int) -> int:
        """How many tokens an answer may have; without a number in the request, as many as there is room for."""
        asked = body.max_tokens
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            asked = body.max_completion_tokens
        if asked is not None:
            return asked
        return max(1, min(self.engine.limits.new_tokens, self.engine.context - prompt))

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
