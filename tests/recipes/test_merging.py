"""What merging loses: every run is recorded, and the ways of serving are what they are called."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge
from labkit.lora.qat import quantization_aware
from labkit.quant.model import quantize_model
from labkit.sweeps.records import load_recorded
from recipes import merging


@pytest.mark.parametrize("name", ["served", "served_qat", "combined", "extracted"])
def test_every_run_is_recorded_on_the_data_as_it_is_now(name):
    wanted = {config for file, _, config in merging.plan() if file == name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = load_recorded(f"merging/{name}")
    assert wanted == results.by_config().keys()
    assert all(record["status"] == "done" for record in results.records)


@pytest.mark.slow
def test_each_way_of_serving_gives_the_loss_of_the_model_it_describes(monkeypatch):
    monkeypatch.setattr(merging, "PASSAGES", 2)
    config = replace(merging.LORA, r=2)
    base, _, _ = merging.bases()
    model = add_lora(copy.deepcopy(base), config.lora_config())
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    factors = {name: (layer.lora_A, layer.lora_B) for name, layer in lora_layers(model).items()}
    found = merging.serve(factors, config)
    held_out = merging.prose()
    assert found["fp32"] == merging.loss(model, held_out)
    with quantization_aware(model):
        assert found["from_original"] == merging.loss(model, held_out)
    quantize_model(model, progress=False)
    assert found["nf4"] == merging.loss(model, held_out)
    assert found["rule"] == pytest.approx(found["nf4"], abs=0.01) and found["rule"] != found["nf4"]
    merge(model, requantize=True)
    assert found["naive"] == merging.loss(model, held_out)
    assert found["share_naive"] < found["share_from_original"] == pytest.approx(1, abs=0.05)
