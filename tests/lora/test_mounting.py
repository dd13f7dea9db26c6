"""The record of a model's adapters: one attribute, copied and saved with the model."""

import copy

import pytest
import torch
from torch import nn

from labkit.formats.adapters import save_adapter
from labkit.lora.adapters import active_adapter, adapter_configs, add_adapter, use_adapter
from labkit.lora.combining import combine
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unload
from labkit.lora.mounting import RECORD, adapters_of, mounted_adapter
from tests.lora.cases import logits, make_model, randomize


def two_adapters(second="dora"):
    model = randomize(add_lora(make_model(), LoRAConfig(r=2, init="pissa"), "first"), seed=1)
    return randomize(add_adapter(model, "second", LoRAConfig(r=2, variant=second)), seed=2)


def saved_and_loaded(model, path):
    torch.save(model, path)
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("how", ["copied", "saved"])
def test_a_copy_of_a_model_has_adapters_of_its_own(how, tmp_path):
    model = two_adapters()
    expected = {name: logits(use_adapter(model, name)) for name in ("first", None, "second")}
    other = copy.deepcopy(model) if how == "copied" else saved_and_loaded(model, tmp_path / "model.pt")
    use_adapter(model, None)
    assert active_adapter(other) == "second" and active_adapter(model) is None
    for name in ("first", None, "second"):
        assert torch.equal(logits(use_adapter(other, name)), expected[name])
    mine = {
        id(p)
        for adapter in adapters_of(model).by_name.values()
        for m in adapter.modules.values()
        for p in m.parameters()
    }
    assert not any(id(p) in mine for p in other.parameters())
    assert all(layer is mounted_adapter(other).modules[name] for name, layer in lora_layers(other).items())


def test_a_model_without_adapters_is_left_without_a_record():
    model = nn.Sequential(nn.Linear(4, 4))
    assert adapters_of(model).by_name == {} and mounted_adapter(model) is None and not hasattr(model, RECORD)
    add_lora(model, LoRAConfig(r=2))
    assert list(adapters_of(model).by_name) == ["default"] and getattr(model, RECORD).active == "default"


def test_the_record_is_not_part_of_the_models_state():
    model = two_adapters()
    assert not any(RECORD in name for name in model.state_dict())
    mounted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert mounted == {n for n, _ in model.named_parameters() if ".lora_" in n}


def test_an_adapter_that_cannot_be_mounted_is_not_recorded():
    model = two_adapters("lora")
    merge(model)
    with pytest.raises(ValueError, match="'second' is merged into the base; unmerge it first"):
        combine(model, {"second": 0.5}, "half")
    assert list(adapter_configs(model)) == ["first", "second"] and active_adapter(model) == "second"


@pytest.mark.parametrize(
    "call", [merge, unload, lambda m: use_adapter(m, None), lambda m: save_adapter(m, "nowhere")]
)
def test_an_adapter_of_which_something_was_replaced_is_neither_merged_nor_taken_off_nor_saved(
    call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = make_model(tie_word_embeddings=False)
    add_lora(model, LoRAConfig(r=2, targets="attention", modules_to_save=["lm_head"]))
    model.resize_token_embeddings(140, mean_resizing=False)
    before = logits(model)
    with pytest.raises(
        ValueError, match="lm_head is not the layer that the adapter 'default' put there.*resize_token"
    ):
        call(model)
    assert torch.equal(logits(model), before) and active_adapter(model) == "default"
    assert not any(layer.is_merged for layer in lora_layers(model).values()) and not list(tmp_path.iterdir())


def test_a_layer_of_an_adapter_may_be_wrapped_where_it_stands():
    model = randomize(add_lora(make_model(), LoRAConfig(r=2)))
    before = logits(model)
    part = model.model.layers[0].mlp
    part.up_proj = torch.compile(part.up_proj, backend="eager")
    torch.testing.assert_close(logits(unload(merge(model))), before, rtol=1e-4, atol=1e-5)
    assert type(part.up_proj) is nn.Linear
