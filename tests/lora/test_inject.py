"""Injecting: into any module, once, and an error changes nothing."""

import pytest
import torch
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from tests.lora.cases import (
    make_model,
)


def test_any_module_with_linears_can_be_adapted():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    add_lora(model, LoRAConfig(r=2))
    assert set(lora_layers(model)) == {"0", "2"}
    model(torch.randn(3, 8)).sum().backward()


def test_injecting_twice_is_an_error(small_llama):
    add_lora(small_llama, LoRAConfig(r=4))
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(small_llama, LoRAConfig(r=4))


def test_rank_above_a_layers_width_changes_nothing(small_llama):
    with pytest.raises(ValueError, match="r=33 is above 32"):
        add_lora(small_llama, LoRAConfig(r=33))
    assert not lora_layers(small_llama)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (make_model, {"init": "loftq"}, "add_qlora"),
        (make_model, {"init": "pissa", "variant": "dora"}, "row norms"),
        (
            lambda: make_model(tie_word_embeddings=False),
            {"targets": ["embed_tokens"], "variant": "dora"},
            "looked up",
        ),
        (
            lambda: make_model(tie_word_embeddings=False),
            {"targets": ["embed_tokens"], "init": "pissa"},
            "looked up",
        ),
    ],
)
def test_a_variant_on_a_layer_that_it_cannot_adapt_says_so_and_changes_nothing(make, config, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(r=4, **config))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
