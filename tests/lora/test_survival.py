"""How much of an update survives a merge: in four bits it depends on its size, in sixteen on the dtype."""

import pytest
import torch

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unload
from labkit.lora.survival import merged_survival, survival
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from tests.lora.cases import make_model, randomize


def weight_and_update(rho, size=512, r=16):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    update = torch.randn(size, r, generator=generator) @ torch.randn(r, size, generator=generator)
    return weight, update * (rho * weight.norm() / update.norm())


@pytest.mark.parametrize(
    ("rho", "share"), [(0.01, 0.02), (0.03, 0.04), (0.05, 0.28), (0.08, 0.69), (0.1, 0.84), (0.2, 0.99)]
)
def test_in_nf4_what_survives_rises_from_nothing_to_all_between_rho_003_and_02(rho, share):
    weight, update = weight_and_update(rho)
    base = quantize(weight).dequantize()
    update = update * (base.norm() / weight.norm())
    found = survival(base, quantize(base + update).dequantize(), update)
    assert found.rho == pytest.approx(rho, rel=1e-3) and found.share == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("rho", [0.01, 0.05])
def test_quantizing_the_original_sum_keeps_the_update_and_is_further_away(rho):
    weight, update = weight_and_update(rho)
    base = quantize(weight).dequantize()
    naive = survival(base, quantize(base + update).dequantize(), update)
    again = survival(base, quantize(weight + update).dequantize(), update)
    assert naive.share < 0.5 and again.share == pytest.approx(1, abs=0.05)
    assert again.error > 1.5 * naive.error, "by distance the merge without the update looks better"


@pytest.mark.parametrize(("dtype", "law"), [(torch.bfloat16, 0.00165), (torch.float16, 0.00021)])
@pytest.mark.parametrize("rho", [0.01, 0.1])
def test_in_16_bits_all_survives_with_an_error_that_goes_with_1_over_rho(rho, dtype, law):
    weight, update = weight_and_update(rho)
    weight = weight.to(dtype).float()
    found = survival(weight, (weight + update).to(dtype), update)
    assert found.share == pytest.approx(1, abs=0.02) and found.error == pytest.approx(law / rho, rel=0.1)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_of_a_merged_model_each_layer_and_the_whole_are_told(variant):
    model = randomize(add_lora(make_model(), LoRAConfig(r=4, variant=variant)))
    unmerged = {name: layer.base.weight.clone() for name, layer in lora_layers(model).items()}
    deltas = {name: layer.delta().detach() for name, layer in lora_layers(model).items()}
    found = merged_survival(merge(model))
    assert list(found) == ["", *deltas] and all(one.share == pytest.approx(1) for one in found.values())
    path = "model.layers.1.mlp.down_proj"
    ratio = deltas[path].norm() / unmerged[path].norm()
    assert found[path].rho == pytest.approx(ratio.item(), rel=1e-5)
    assert all(layer.is_merged for layer in lora_layers(model).values())


def test_a_small_adapter_merged_into_four_bits_is_told_to_be_lost():
    model = make_model()
    quantize_model(model, progress=False)
    randomize(add_lora(model, LoRAConfig(r=4)))
    for layer in lora_layers(model).values():
        layer.lora_B.data *= 0.02 * layer.base.weight.dequantize().norm() / layer.delta().norm()
    assert merged_survival(merge(model, requantize=True))[""].share < 0.2


def test_what_has_no_share_is_refused():
    ones = torch.ones(2, 2)
    with pytest.raises(ValueError, match="update is zero"):
        survival(ones, ones, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"one shape, not \(2, 2\), \(2,\), \(2, 2\)"):
        survival(ones, ones[0], ones)
    model = randomize(add_lora(make_model(), LoRAConfig(r=2)))
    for one in (model, unload(merge(model))):
        with pytest.raises(ValueError, match="no merged adapter"):
            merged_survival(one)
    with pytest.raises(ValueError, match="update is zero"):
        merged_survival(merge(add_lora(make_model(), LoRAConfig(r=2))))
