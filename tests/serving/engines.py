"""Engines on tiny-llama with four adapters and an alias, and what each request writes alone."""

from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

import labkit
from labkit import models
from labkit.serving.adapter_cache import AdapterCache
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.requests import GenerationRequest, Source
from labkit.serving.rows import EngineLimits
from tests.serving.adapters import make_folder, make_folders

ENOUGH = 10_000  # steps, after which an engine is stuck


class AtOnce(Executor):
    """Runs what is submitted in the thread that submits it."""

    def submit(self, function, *arguments):
        function(*arguments)
        return Future()


class Clock:
    """Says what it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Served:
    """tiny-llama, folders of adapters, and `alias`, whose name can be given to another adapter."""

    def __init__(self, root: Path):
        self.plain, _ = models.load("tiny-llama", dtype=torch.float32)
        self.folders = make_folders(self.plain, root)
        self.names = {name: Source(name, folder, name) for name, folder in self.folders.items()}
        self.names["alias"] = self.names["sql"]
        for name, folder in self.folders.items():
            labkit.load_adapter(self.plain, folder, name)
        self.lone: Engine | None = None

    def add(self, name: str, root: Path, scale: float) -> None:
        """One more adapter, of numbers of that scale."""
        model, _ = models.load("tiny-llama", dtype=torch.float32)
        folder = make_folder(model, root / name, labkit.LoRAConfig(r=2), 0, scale)
        self.names[name] = Source(name, folder, name)

    def resolve(self, name: str) -> Source:
        return self.names[name]

    def engine(self, adapters: int | None = None, loader: Executor | None = None, **limits) -> Engine:
        """A new engine, with a clock of its own and room for so many bytes of adapters."""
        model, _ = models.load("tiny-llama", dtype=torch.float32)
        bank = AdapterBank(model)
        cache = AdapterCache(bank, adapters or 2**28, loader or AtOnce())
        return Engine(bank, self.resolve, EngineLimits(**limits), cache, Clock())

    @lru_cache(maxsize=512)  # noqa: B019  one of these lives as long as the tests do
    def alone(self, prompt: tuple[int, ...], adapter: str | None, tokens: int) -> list[int]:
        """What transformers' `generate` writes, greedily, with the adapter loaded by `load_adapter`."""
        labkit.use_adapter(self.plain, adapter)
        ids = torch.tensor([prompt])
        out = self.plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist()

    def drawn_alone(self, request: GenerationRequest, adapter: str | None) -> list[int]:
        """What an engine of one row, without prefixes, draws for a request by this adapter."""
        if self.lone is None:
            self.lone = self.engine(rows=1, prefix_bytes=0)
        stream = self.lone.submit(replace(request, adapter=adapter))
        finish(self.lone)
        return stream.result(0).ids


def finish(engine: Engine) -> None:
    """Step until there is nothing left to do."""
    for _ in range(ENOUGH):
        if engine.is_idle:
            return
        engine.step()
    raise AssertionError(f"not idle after {ENOUGH} steps")


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    """Token ids by seed; those of one seed begin alike."""
    return tuple(torch.randint(4, 4096, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def asked(seed: int, length: int, adapter: str | None = None, tokens: int = 6, **others) -> GenerationRequest:
    return GenerationRequest(prompt_of(seed, length), adapter, max_new_tokens=tokens, **others)
