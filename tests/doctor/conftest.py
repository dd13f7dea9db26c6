"""A patient that is sound, for the doctor's tests."""

import pytest
import torch

from labkit.doctor.specimens import adapted
from labkit.lora.inject import lora_layers


@pytest.fixture
def moved(tiny):
    """(model, tokenizer): tiny-llama with an adapter whose B is not zero."""
    model = adapted(0, r=2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.02)
    return model, tiny[1]
