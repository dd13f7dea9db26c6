"""A real llama.cpp, from the package xllamacpp: what it answers for a GGUF file, with or without an adapter."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed here: pip install xllamacpp")


def engine(model: Path, adapter: Path | None = None, exact: bool = True):
    """A llama.cpp that has loaded a file.

    Args:
        model: a GGUF file.
        adapter: a GGUF adapter to put on it.
        exact: keys and values in fp32 and no flash attention. False: llama.cpp's defaults.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers = 0
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def answer(server, ids: list[int], tokens: int = 12, top: int = 5) -> SimpleNamespace:
    """What llama.cpp goes on with, greedily.

    Returns:
        `ids`, and `top`: for each a dict from the ids of the likeliest tokens to their log-probabilities.
    """
    said = server.handle_completions(
        {"prompt": ids, "max_tokens": tokens, "temperature": 0.0, "logprobs": top, "cache_prompt": False}
    )
    said = json.loads(said) if isinstance(said, str) else said
    assert "choices" in said, said
    steps = said["choices"][0]["logprobs"]["content"]
    return SimpleNamespace(
        ids=[step["id"] for step in steps],
        top=[{one["id"]: one["logprob"] for one in step["top_logprobs"]} for step in steps],
    )


@torch.no_grad()
def differences(model, ids: list[int], said: SimpleNamespace) -> tuple[list[int], float]:
    """The greedy tokens of `model` after the same texts, and the largest difference of a log-probability."""
    whole = torch.tensor([ids + said.ids])
    logs = model(input_ids=whole).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
    largest = max(
        abs(logs[i, token].item() - value) for i, step in enumerate(said.top) for token, value in step.items()
    )
    return logs.argmax(-1).tolist(), largest
