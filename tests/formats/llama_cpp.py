"""A real llama.cpp, from the package xllamacpp, against the model that a file was written from."""

import pytest
import torch

from labkit.formats.llama_cpp import Answer, answer, engine

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed here: pip install xllamacpp")

__all__ = ["answer", "differences", "engine"]


@torch.no_grad()
def differences(model, ids: list[int], said: Answer) -> tuple[list[int], float]:
    """The greedy tokens of `model` after the same texts, and the largest difference of a log-probability."""
    whole = torch.tensor([ids + said.ids])
    logs = model(input_ids=whole).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
    largest = max(
        abs(logs[i, token].item() - value) for i, step in enumerate(said.top) for token, value in step.items()
    )
    return logs.argmax(-1).tolist(), largest
