"""Models that tests share: a small Llama with random weights, and the real base model, loaded once."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labkit import models


def make_small_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A Llama with random weights and the real vocabulary."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=2, tie_word_embeddings=True, **sizes | changes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def small_llama():
    return make_small_llama()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the real base; read only."""
    return models.load("smollm2-135m")


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return smollm2[1]


@pytest.fixture(scope="session")
def records():
    """Sixteen chat records to train on."""
    from labkit.data.tickets import load_tickets, ticket_chat

    return [ticket_chat(ticket) for ticket in load_tickets("train")[:16]]
