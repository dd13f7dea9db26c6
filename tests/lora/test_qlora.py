"""QLoRA: the base is quantized when the start of the adapter allows it, and only the adapter trains."""

import pytest
import torch
from torch import nn

from labkit.lora.adapters import (
    add_adapter,
    use_adapter,
)
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.qlora import add_qlora
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from tests.lora.cases import (
    IDS,
    assert_same_logits_loss_and_gradients,
    give,
    logits,
    make_model,
    peft_model,
    randomize,
    with_bitsandbytes,
)


def test_qpissa_equals_peft_over_bitsandbytes():
    """PEFT's recipe: PiSSA in full precision, quantize the residual, and the adapter on top."""
    ours = add_qlora(make_model().train(), LoRAConfig(r=4, alpha=12, init="pissa"), scale_rounding="lookup")
    residual = peft_model(make_model(), init_lora_weights="pissa").unload()
    theirs = peft_model(with_bitsandbytes(residual))
    give(ours, theirs)
    assert_same_logits_loss_and_gradients(ours, theirs)


@pytest.mark.parametrize("init", ["default", "pissa", "olora", "loftq"])
def test_add_qlora_quantizes_all_linear_layers_and_trains_the_adapter_only(init):
    torch.manual_seed(0)
    model = add_qlora(
        make_model().train(), LoRAConfig(r=4, targets="attention", init=init), compute_dtype=torch.float32
    )
    quantized = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(quantized) == 14 and all(m.compute_dtype == torch.float32 for m in quantized)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in lora_layers(model).values())


def test_add_qlora_with_a_random_start_is_quantizing_and_adding():
    results = []
    for make in (
        lambda m, c: add_qlora(m, c),
        lambda m, c: (quantize_model(m, progress=False), add_lora(m, c))[1],
    ):
        model = make_model()
        torch.manual_seed(5)
        results.append(make(model, LoRAConfig(r=4)).state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_an_adapter_that_is_one_with_its_4_bit_base_stays():
    model = add_qlora(make_model(), LoRAConfig(r=4, init="pissa"))
    with pytest.raises(ValueError, match="were not kept"):
        use_adapter(model, None)
    with pytest.raises(ValueError, match="were not kept"):
        add_adapter(model, "poet", LoRAConfig(r=2))


def snapshot(model):
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    return kinds, [(name, p.requires_grad) for name, p in model.named_parameters()], logits(model)


@pytest.mark.parametrize("init", ["default", "pissa", "loftq"])
@pytest.mark.parametrize(
    ("settings", "spoil"),
    [
        ({"targets": ["q_porj"]}, None),
        ({"r": 65}, None),
        ({"rank_pattern": {"nothing": 2}}, None),
        ({"modules_to_save": ["act_fn"]}, None),
        ({"targets": ["q_proj"]}, lambda m: m.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))),
        ({}, lambda m: add_lora(m, LoRAConfig(r=2))),
        ({"name": "a.b"}, None),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_quantized(init, settings, spoil):
    model = make_model()
    if spoil:
        spoil(model)
    kinds, flags, before = snapshot(model)
    state = torch.random.get_rng_state()
    name = settings.get("name", "default")
    config = LoRAConfig(**{"r": 4, "init": init} | {k: v for k, v in settings.items() if k != "name"})
    with pytest.raises(ValueError):
        add_qlora(model, config, name=name)
    now = snapshot(model)
    assert now[:2] == (kinds, flags) and torch.equal(now[2].nan_to_num(7), before.nan_to_num(7))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("init", ["default", "pissa", "loftq"])
def test_a_model_in_a_wrapper_becomes_the_same_qlora(init):
    plain = randomize(add_qlora(make_model(), LoRAConfig(r=4, init=init, modules_to_save=["down_proj"])))
    wrapped = nn.DataParallel(make_model())
    randomize(add_qlora(wrapped, LoRAConfig(r=4, init=init, modules_to_save=["down_proj"])))
    assert torch.equal(logits(wrapped), logits(plain))
    assert {type(layer.base) for layer in lora_layers(wrapped).values()} == {QuantLinear}
    assert [p.requires_grad for p in wrapped.parameters()] == [p.requires_grad for p in plain.parameters()]
