"""Several adapters on one base: switching, taking them out, and what each of them must leave alone."""

import copy

import pytest
import torch

from labkit.lora.adapters import (
    active_adapter,
    adapter_configs,
    add_adapter,
    base_only,
    remove_adapter,
    use_adapter,
)
from labkit.lora.combining import combine
from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unmerge
from labkit.quant.model import quantize_model
from tests.lora.cases import (
    logits,
    make_model,
    randomize,
)


def two_adapters(**second):
    """ "poet" on all linear layers, and "clerk" on attention, both as if trained."""
    model = randomize(add_lora(make_model(), LoRAConfig(r=4, alpha=8), "poet"), seed=1)
    add_adapter(model, "clerk", LoRAConfig(**{"r": 2, "alpha": 6, "targets": "attention"} | second))
    return randomize(model, seed=2)


def test_each_adapter_gives_what_it_gives_alone():
    alone = logits(randomize(add_lora(make_model(), LoRAConfig(r=4, alpha=8)), seed=1))
    model = two_adapters()
    clerk = logits(model)
    assert list(adapter_configs(model)) == ["poet", "clerk"] and active_adapter(model) == "clerk"
    assert torch.equal(logits(use_adapter(model, "poet")), alone)
    assert torch.equal(logits(use_adapter(model, "clerk")), clerk)
    assert not torch.equal(alone, clerk)


def test_the_base_alone_is_the_base_bit_for_bit():
    base, model = logits(make_model()), two_adapters()
    with base_only(model):
        assert torch.equal(logits(model), base) and not lora_layers(model) and active_adapter(model) is None
    assert active_adapter(model) == "clerk"
    use_adapter(model, None)
    assert torch.equal(logits(model), base)


def test_only_the_mounted_adapter_trains_and_the_base_is_held_once():
    model = two_adapters()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    assert (
        trainable(model).trainable
        == trainable(add_lora(make_model(), LoRAConfig(r=2, targets="attention"))).trainable
    )
    weights = [layer.base.weight for layer in lora_layers(model).values()]
    poets = [layer.base.weight for layer in lora_layers(use_adapter(model, "poet")).values()]
    assert all(any(w is p for p in poets) for w in weights)


def test_adapters_of_other_variants_stand_beside_each_other():
    model = two_adapters(variant="dora")
    dora = logits(model)
    poet = logits(use_adapter(model, "poet"))
    add_adapter(model, "pissa", LoRAConfig(r=4, init="pissa"))
    torch.testing.assert_close(logits(model), logits(make_model()), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(use_adapter(model, "poet")), poet), "PiSSA's own base is not the others'"
    assert torch.equal(logits(use_adapter(model, "clerk")), dora)


def test_a_base_quantized_meanwhile_is_the_base_of_all():
    model = two_adapters()
    quantize_model(model, progress=False)
    quantized = make_model()
    quantize_model(quantized, progress=False)
    expected = logits(randomize(add_lora(quantized, LoRAConfig(r=4, alpha=8)), seed=1))
    assert torch.equal(logits(use_adapter(model, "poet")), expected)


def test_copies_and_modes_carry_over():
    model = two_adapters()
    other = copy.deepcopy(model)
    use_adapter(other, "poet")
    assert active_adapter(model) == "clerk" and not torch.equal(logits(model), logits(other))
    use_adapter(model.train(), "poet")
    assert all(layer.training for layer in lora_layers(model).values())
    assert not any(layer.training for layer in lora_layers(use_adapter(model.eval(), "clerk")).values())


def test_a_module_that_trains_in_full_comes_and_goes_with_its_adapter():
    model = add_lora(make_model(), LoRAConfig(r=2, modules_to_save=["model.norm"]), "poet")
    base = logits(make_model())
    model.model.norm.weight.data *= 2
    assert model.model.norm.weight.requires_grad and not torch.equal(logits(model), base)
    with base_only(model):
        assert torch.equal(logits(model), base) and not model.model.norm.weight.requires_grad
    assert "model.norm" in trainable(model).per_module


def test_two_adapters_with_one_name_are_an_error():
    model = two_adapters()
    with pytest.raises(ValueError, match="named 'poet' already"):
        add_adapter(model, "poet", LoRAConfig(r=2))
    with pytest.raises(ValueError, match="named 'poet' already"):
        combine(model, {"poet": 1, "clerk": 1}, "poet")
    with pytest.raises(ValueError, match="without dots"):
        add_adapter(model, "a.b", LoRAConfig(r=2))
    assert active_adapter(model) == "clerk"


def test_errors_name_what_there_is():
    model = two_adapters()
    for function in (use_adapter, remove_adapter):
        with pytest.raises(ValueError, match="no adapter 'baker'; there are: poet, clerk"):
            function(model, "baker")
    with pytest.raises(ValueError, match="baker.*there are: poet, clerk"):
        combine(model, {"baker": 1}, "both")
    with pytest.raises(ValueError, match="use how='cat'"):
        combine(model, {"poet": 1, "clerk": 1}, "both", "linear")
    with pytest.raises(ValueError, match="how='average'"):
        combine(model, {"poet": 1, "clerk": 1}, "both", "average")
    with pytest.raises(ValueError, match="no adapter yet; begin with"):
        add_adapter(make_model(), "poet", LoRAConfig(r=2))
    with pytest.raises(ValueError, match="more than a correction"):
        combine(two_adapters(variant="dora"), {"poet": 1, "clerk": 1}, "both")
    remove_adapter(model, "clerk")
    assert list(adapter_configs(model)) == ["poet"] and active_adapter(model) is None


def test_a_merged_adapter_cannot_be_switched_off():
    model = two_adapters()
    merge(model)
    for act in (lambda: use_adapter(model, "poet"), lambda: base_only(model).__enter__()):
        with pytest.raises(ValueError, match="'clerk' is merged into the base; unmerge it first"):
            act()
    with pytest.raises(ValueError, match="unmerge"):
        add_adapter(model, "baker", LoRAConfig(r=2))
    assert list(adapter_configs(model)) == ["poet", "clerk"]
    use_adapter(unmerge(model), "poet")
