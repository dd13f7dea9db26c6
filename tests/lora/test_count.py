"""Counts of what trains: r times in plus out, 4-bit weights as the weights they stand for."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.count import adapter_report, trainable
from labkit.lora.inject import add_lora
from labkit.lora.merging import merge
from labkit.models.walk import total_bytes, walk
from labkit.quant.model import quantize_model
from tests.lora.cases import (
    make_model,
)


def test_counts_are_r_times_in_plus_out_and_quantization_does_not_halve_them(small_llama):
    shapes = [
        (m.in_features, m.out_features)
        for n, m in small_llama.named_modules()
        if isinstance(m, nn.Linear) and "layers" in n
    ]
    total = sum(p.numel() for p in small_llama.parameters())
    quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4))
    counted = trainable(small_llama)
    assert counted.trainable == sum(4 * (i + o) for i, o in shapes) == sum(counted.per_module.values())
    assert counted.total == total + counted.trainable


def test_the_report_counts_every_parameter_that_trains():
    config = LoRAConfig(
        r=4, targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 8}, modules_to_save=["model.norm"]
    )
    model = add_lora(make_model(), config)
    report = adapter_report(model)
    rows = {row.name: row for row in report}
    assert (
        rows["model.layers.0.mlp.down_proj"].shape == (64, 192)
        and rows["model.layers.0.mlp.down_proj"].r == 8
    )
    assert rows["model.layers.0.mlp.down_proj"].parameters == 8 * (64 + 192)
    assert rows["model.norm"].r is None and rows["model.norm"].parameters == 64
    assert sum(row.parameters for row in report) == trainable(model).trainable
    lines = str(report).splitlines()
    assert len(lines) == 8 and "100.0%" in lines[-2] and "64 x 192" in str(report) and "full" in str(report)
    assert lines[-1].startswith("not adapted: 10 x linear (")
    adapted = [layer for layer in walk(model) if layer.name in rows]
    assert total_bytes(report.left) + total_bytes(adapted) == sum(p.nbytes for p in make_model().parameters())
    with pytest.raises(ValueError, match="no LoRA adapter"):
        adapter_report(nn.Linear(2, 2))


def test_the_report_of_dora_has_its_magnitudes():
    model = add_lora(make_model(), LoRAConfig(r=4, variant="dora"))
    assert sum(row.parameters for row in adapter_report(model)) == trainable(model).trainable


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_weight_packed_by_another_library_counts_with_the_weights_that_it_stands_for(storage):
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    total = sum(p.numel() for p in model.parameters())
    model[0] = Linear4bit(64, 128, quant_type="nf4", quant_storage=storage).to("cpu")
    add_lora(model, LoRAConfig(r=4))
    assert trainable(model).total == total + trainable(model).trainable
    assert trainable(model).trainable == 2 * 4 * (64 + 128)
    with pytest.raises(ValueError, match="0 is a 4-bit layer"):
        merge(model)


def test_counts_have_the_names_of_the_innermost_model():
    plain = add_lora(make_model(), LoRAConfig(r=4))
    compiled = torch.compile(add_lora(make_model(), LoRAConfig(r=4)), backend="eager")
    assert trainable(compiled) == trainable(plain)
    assert list(adapter_report(nn.DataParallel(plain))) == list(adapter_report(plain))
