"""llama.cpp in this process, by the package xllamacpp: what it computes from a GGUF file, with or without an adapter.

To compare it with another program, give it a cache of keys and values in fp32 and no flash attention (`exact`). Its
defaults, fp16 and flash attention, move a log-probability by about a thousandth.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from labkit.checks import needed


class Answer(NamedTuple):
    """What llama.cpp goes on with, greedily.

    Attributes:
        ids: of the tokens.
        top: for each of them, the log-probabilities of the likeliest tokens, by id.
    """

    ids: list[int]
    top: list[dict[int, float]]


def is_installed() -> bool:
    """Is llama.cpp there? `pip install xllamacpp` gets it, for most machines without compiling."""
    return importlib.util.find_spec("xllamacpp") is not None


def settings(
    model: Path,
    adapters: Sequence[Path] = (),
    exact: bool = True,
    context: int = 512,
    threads: int = 1,
    rows: int = 1,
) -> Any:
    """What llama.cpp is to load and how, on the CPU: the parameters of `xllamacpp.Server`.

    Args:
        model: a GGUF file.
        adapters: GGUF adapters; each is on unless a request says otherwise.
        exact: keys and values in fp32 and no flash attention. False: llama.cpp's defaults.
        context: tokens of prompt and answer together.
        threads: to compute on.
        rows: requests at once, each with a context of its own.

    Raises:
        ModuleNotFoundError: xllamacpp is not installed.
    """
    xllamacpp = needed("xllamacpp", "running llama.cpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context * rows, rows, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0) for adapter in adapters]
    return params


def engine(
    model: Path, adapter: Path | None = None, exact: bool = True, context: int = 512, threads: int = 1
) -> Any:
    """A llama.cpp in this process that has loaded a file, and an adapter to put on it; see `settings`.

    Raises:
        ModuleNotFoundError: xllamacpp is not installed.
        RuntimeError: llama.cpp does not load the file; it says nothing more.
    """
    params = settings(model, () if adapter is None else (adapter,), exact, context, threads)
    return needed("xllamacpp", "running llama.cpp").Server(params)


def answer(server: Any, ids: list[int], tokens: int = 12, top: int = 5) -> Answer:
    """What llama.cpp goes on with after `ids`, greedily, without a cache of earlier prompts.

    Args:
        server: of `engine`.
        ids: of the prompt.
        tokens: at most so many.
        top: how many log-probabilities at each.

    Raises:
        ValueError: llama.cpp refuses, such as a prompt longer than its context.
    """
    said = server.handle_completions(
        {"prompt": ids, "max_tokens": tokens, "temperature": 0.0, "logprobs": top, "cache_prompt": False}
    )
    said = json.loads(said) if isinstance(said, str) else said
    if "choices" not in said:
        raise ValueError(f"llama.cpp does not answer: {said}")
    steps = said["choices"][0]["logprobs"]["content"]
    return Answer(
        [step["id"] for step in steps],
        [{one["id"]: one["logprob"] for one in step["top_logprobs"]} for step in steps],
    )
