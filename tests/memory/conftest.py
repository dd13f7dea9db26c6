"""What the tests of the memory ledger share: a small config, and measured steps of tiny-llama."""

import json

import pytest

from labkit.memory import subjects
from labkit.memory.measurement import measure
from labkit.memory.setup import Setup

EXACT = ("weights", "constants", "lora", "gradients", "optimizer")
SMALL = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    tie_word_embeddings=True,
)


def close(a: float, b: float, share: float) -> bool:
    return abs(a - b) <= share * abs(b)


@pytest.fixture(scope="session")
def tiny():
    """`tiny(method, checkpointing, batch_size, max_length, **choices)`: a measured ledger, made once."""
    made = {}

    def get(method, checkpointing, batch_size, max_length, **choices):
        key = json.dumps([method, checkpointing, batch_size, max_length, choices])
        if key not in made:
            setup = Setup(method=method, **(dict(dtype="fp32", r=8) | choices))
            model = subjects.real_model("tiny-llama", setup)
            batch = subjects.make_batch(model.config.vocab_size, batch_size, max_length, 0.5)
            made[key] = measure(model, batch, checkpointing=checkpointing)
        return made[key]

    return get
