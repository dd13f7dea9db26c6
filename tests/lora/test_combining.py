"""Weighted sums of adapters equal PEFT's: exact by concatenation, approximate by addition."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from labkit.lora.adapters import (
    adapter_configs,
    use_adapter,
)
from labkit.lora.combining import combine
from labkit.lora.inject import lora_layers
from tests.lora.cases import (
    logits,
    make_model,
)
from tests.lora.test_adapters import two_adapters


def peft_with(model):
    """PEFT with the adapters of `model`."""
    theirs = None
    for name, config in adapter_configs(model).items():
        use_adapter(model, name)
        wanted = PeftConfig(
            r=config.r,
            lora_alpha=config.alpha,
            target_modules=[n.rpartition(".")[2] for n in lora_layers(model)],
        )
        if theirs is None:
            theirs = get_peft_model(make_model(), wanted, adapter_name=name)
        else:
            theirs.add_adapter(name, wanted)
        modules = dict(theirs.get_base_model().named_modules())
        for path, layer in lora_layers(model).items():
            modules[path].lora_A[name].weight.data.copy_(layer.lora_A.data)
            modules[path].lora_B[name].weight.data.copy_(layer.lora_B.data)
    return theirs.eval()


@pytest.mark.parametrize(("how", "rank"), [("cat", 2), ("linear", 4)])
def test_combinations_equal_pefts(how, rank):
    model = two_adapters(r=rank)
    theirs = peft_with(model)
    combine(model, {"poet": 0.7, "clerk": -0.4}, "both", how)
    theirs.add_weighted_adapter(["poet", "clerk"], [0.7, -0.4], "both", combination_type=how)
    theirs.set_adapter("both")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_concatenation_is_exact_and_addition_is_not():
    model = two_adapters(r=4)
    deltas = {
        name: {n: layer.delta() for n, layer in lora_layers(use_adapter(model, name)).items()}
        for name in ("poet", "clerk")
    }
    path = "model.layers.0.self_attn.q_proj"
    wanted = 0.7 * deltas["poet"][path] + 0.3 * deltas["clerk"][path]
    combine(model, {"poet": 0.7, "clerk": 0.3}, "exact")
    layer = lora_layers(model)[path]
    torch.testing.assert_close(layer.delta(), wanted, rtol=1e-5, atol=1e-6)
    assert layer.r == 8 and lora_layers(model)["model.layers.0.mlp.up_proj"].r == 4
    combine(model, {"poet": 0.7, "clerk": 0.3}, "sum", "linear")
    layer = lora_layers(model)[path]
    assert layer.r == 4 and (layer.delta() - wanted).norm() > 0.1 * wanted.norm()


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="weights is empty"):
        combine(two_adapters(), {}, "nothing")
