"""Tensors that do not fit are named, and nothing is changed."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch
from labkit.lora.inject import add_lora, lora_layers
from tests.conftest import make_small_llama
from tests.formats.cases import adapted, change_tensors, untied
from tests.lora.cases import make_model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"),
            r"up_proj.lora_A.weight is missing",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}
            ),
            "layers.9.*no such",
        ),
        (lambda t: t.update({"base_model.model.extra": torch.ones(1)}), "extra"),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 65)}
            ),
            r"has shape \(4, 65\), not \(4, 64\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_change_nothing(tmp_path, change, message):
    save_adapter(adapted(), tmp_path / "a")
    change_tensors(tmp_path / "a", change)
    fresh = make_small_llama()
    with pytest.raises(AdapterMismatch, match=message):
        load_adapter(fresh, tmp_path / "a")
    assert not lora_layers(fresh)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, lambda t, p: [t.pop(f"{p}.layers.1.mlp.up_proj.lora_{x}.weight") for x in "AB"], "layers.1.mlp.up_proj.lora_A.weight is missing"),
        ({"variant": "dora"}, lambda t, p: t.pop(f"{p}.layers.0.mlp.up_proj.lora_magnitude_vector"), "up_proj.lora_magnitude_vector is missing"),
        ({}, lambda t, p: t.update({f"{p}.layers.0.mlp.up_proj.lora_magnitude_vector": torch.ones(192)}), "magnitude_vector is left over"),
        ({"targets": ["q_proj"]}, lambda t, p: t.update({f"{p}.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}), "up_proj.lora_A.weight is left over"),
        ({"modules_to_save": ["model.norm"]}, lambda t, p: t.pop(f"{p}.norm.weight"), "norm.weight is missing"),
        ({"rank_pattern": {"up_proj": 2}}, lambda t, p: t.update({f"{p}.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}), r"has shape \(4, 64\), not \(2, 64\)"),
    ],
)  # fmt: skip
def test_a_key_too_many_or_too_few_is_named_for_every_kind(tmp_path, config, change, message):
    save_adapter(add_lora(make_model(), LoRAConfig(**{"r": 4} | config)), tmp_path / "a")
    change_tensors(tmp_path / "a", lambda tensors: change(tensors, "base_model.model.model"))
    fresh = make_model()
    with pytest.raises(AdapterMismatch, match=message):
        load_adapter(fresh, tmp_path / "a")
    assert not lora_layers(fresh) and all(p.requires_grad for p in fresh.parameters())


def test_another_vocabulary_is_noticed_by_the_embedding_that_peft_saves(tmp_path):
    theirs = get_peft_model(untied(), PeftConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    theirs.get_base_model().model.embed_tokens.base_layer.weight.data[5] += 1
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterMismatch, match="not the weight of this base"):
        load_adapter(untied(), tmp_path / "a")
