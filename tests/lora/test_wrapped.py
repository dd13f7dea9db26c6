"""Adapters on a model inside others: compiled, in parallel, with layers in several places, of other kinds."""

import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.ia3 import add_ia3
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.lora.adapters import active_adapter, add_adapter, base_only, use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unload, unmerge
from labkit.lora.mounting import adapters_of
from labkit.lora.targets import matching_layers
from labkit.models.surgery import is_output_layer, untie_embeddings
from labkit.models.walk import total_bytes, walk
from tests.lora.cases import logits, make_model, peft_model, randomize


def compiled(model):
    return torch.compile(model, backend="eager")


def one_block():
    return make_model(num_hidden_layers=1)


AROUND = {
    "compiled": compiled,
    "in parallel": nn.DataParallel,
    "both": lambda m: compiled(nn.DataParallel(m)),
}


@pytest.mark.parametrize("around", ["in parallel", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_wrapped_model_is_adapted_as_the_model_in_it(around):
    config = LoRAConfig(r=4, modules_to_save=["down_proj"])
    wrap, plain = AROUND[around], randomize(add_lora(one_block(), config))
    ours = wrap(one_block())
    logits(ours)  # compiled code is there already, and must not outlive what it was made of
    randomize(add_lora(ours, config))
    assert list(lora_layers(ours)) == list(lora_layers(plain))
    assert list(adapters_of(ours).by_name["default"].modules) == list(
        adapters_of(plain).by_name["default"].modules
    )
    assert torch.equal(logits(ours), logits(plain))
    assert torch.equal(logits(merge(ours)), logits(merge(plain)))
    assert torch.equal(logits(unmerge(ours)), logits(unmerge(plain)))
    with base_only(ours):
        assert active_adapter(ours) is None and torch.equal(logits(ours), logits(one_block()))
    randomize(add_adapter(ours, "second", LoRAConfig(r=2)), seed=2)
    assert active_adapter(ours) == "second" and torch.equal(
        logits(use_adapter(ours, "default")), logits(plain)
    )
    assert trainable(ours) == trainable(plain)
    assert torch.equal(logits(unload(ours)), logits(merge(plain)))


def test_a_compiled_model_is_adapted_and_computes_with_the_adapter():
    model = compiled(make_model(num_hidden_layers=1, intermediate_size=64))
    bare = logits(model)  # compiled code is there already, and must not outlive what it was made of
    randomize(add_lora(model, LoRAConfig(r=4, targets=["q_proj"])))
    assert list(lora_layers(model)) == ["model.layers.0.self_attn.q_proj"]
    adapted = logits(model)
    assert not torch.equal(adapted, bare)
    torch.testing.assert_close(logits(unload(model)), adapted, rtol=1e-4, atol=1e-5)


def test_parts_that_are_compiled_by_themselves_are_adapted_and_put_back():
    plain = randomize(add_lora(one_block(), LoRAConfig(r=4)))
    model = one_block()
    alone = model.model.layers[0].mlp.up_proj = compiled(model.model.layers[0].mlp.up_proj)
    attention = model.model.layers[0].self_attn = compiled(model.model.layers[0].self_attn)
    randomize(add_lora(model, LoRAConfig(r=4)))
    assert list(lora_layers(model)) == list(lora_layers(plain))
    assert torch.equal(logits(model), logits(plain))
    with base_only(model):
        assert model.model.layers[0].mlp.up_proj is alone and model.model.layers[0].self_attn is attention
    model = one_block()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    logits(model)
    assert torch.equal(logits(randomize(add_lora(model, LoRAConfig(r=4)))), logits(plain))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Linear(8, 8)
        self.decode, self.head = self.encode, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.decode(self.encode(x).tanh()))


@pytest.mark.parametrize("targets", ["all-linear", ["decode", "head"], r"(decode|head)"])
def test_a_layer_in_two_places_has_one_adapter_in_both(targets):
    x = torch.randn(5, 8)
    model = randomize(add_lora(Shared(), LoRAConfig(r=2, alpha=6, targets=targets)))
    assert list(lora_layers(model)) == ["encode", "head"] and model.encode is model.decode
    theirs = get_peft_model(Shared(), PeftConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    for name, layer in lora_layers(model).items():  # PEFT adapts the first place, and merges into both
        them = theirs.get_base_model().get_submodule(name)
        them.lora_A["default"].weight.data.copy_(layer.lora_A.data)
        them.lora_B["default"].weight.data.copy_(layer.lora_B.data)
    torch.testing.assert_close(model(x), theirs.merge_and_unload()(x), rtol=1e-5, atol=1e-6)
    model(x).square().sum().backward()
    assert model.encode.lora_B.grad.abs().max() > 0
    assert type(unload(model).decode) is nn.Linear and model.decode is model.encode


def test_a_module_in_two_places_that_trains_in_full_has_one_copy_in_both():
    model = add_lora(Shared(), LoRAConfig(r=2, targets=["head"], modules_to_save=["decode"]))
    copied = adapters_of(model).by_name["default"].modules["encode"]
    assert model.encode is model.decode is copied and trainable(model).per_module["encode"] == 72


def test_the_output_layer_stays_out_inside_a_model_of_ones_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.language = make_model(tie_word_embeddings=False)

    model = Mine()
    assert "language.lm_head" not in matching_layers(model, "all-linear")
    with pytest.raises(ValueError, match=r"also matches language\.lm_head, the output layer"):
        matching_layers(model, ".*")
    add_lora(model, LoRAConfig(r=2, targets=["lm_head"]))
    assert is_output_layer(model, model.language.lm_head), "with its adapter too"


def test_a_tie_is_seen_through_wrappers_and_under_any_name():
    model = nn.DataParallel(make_model(tie_word_embeddings=True))
    with pytest.raises(ValueError, match="lm_head and model.embed_tokens share one weight"):
        add_lora(model, LoRAConfig(r=2, targets=["lm_head"]))
    add_lora(untie_embeddings(model), LoRAConfig(r=2, targets=["lm_head"]))
    table = nn.Module()
    table.rows, table.head = nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 16, bias=False)
    table.head.weight = table.rows
    with pytest.raises(ValueError, match="head and Module share one weight"):
        add_lora(table, LoRAConfig(r=2))


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=100, num_local_experts=8)
    )


def test_a_preset_tells_of_the_experts_that_it_does_not_reach_in_bytes():
    experts = [layer for layer in walk(mixtral()) if layer.name.endswith("experts")]
    told = (
        rf"'all-linear' does not reach 2 x fused experts \({total_bytes(experts):,} bytes: model.layers.0.mlp"
    )
    with pytest.warns(UserWarning, match=told) as record:
        add_lora(mixtral(), LoRAConfig(r=2))
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match=r"1 x fused attention \(.* bytes: self_attn\)"):
        add_lora(nn.TransformerEncoderLayer(16, 2, 32), LoRAConfig(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(mixtral(), LoRAConfig(r=2, targets="attention"))
        add_lora(make_model(), LoRAConfig(r=2))
        add_lora(mixtral(), LoRAConfig(r=2, targets=["q_proj"]))


@pytest.mark.parametrize(
    ("adapt", "carried"),
    [
        (lambda m: add_lora(m, LoRAConfig(r=2)), "LoRA adapters"),
        (lambda m: use_adapter(add_lora(m, LoRAConfig(r=2)), None), "LoRA adapters"),
        (lambda m: nn.DataParallel(add_lora(m, LoRAConfig(r=2))), "LoRA adapters"),
        (add_ia3, "IA3"),
        (lambda m: add_bottleneck(m, BottleneckConfig(size=4)), "Bottleneck"),
        (lambda m: add_prompt(m, PromptConfig(3)), "Prompt"),
        (peft_model, "PEFT's adapters"),
        (lambda m: peft_model(m).get_base_model(), "PEFT's adapters"),
        (
            lambda m: get_peft_model(
                m, PeftConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"])
            ),
            "PEFT",
        ),
    ],
)
def test_a_model_with_adapters_of_any_kind_is_refused_and_left_as_it_was(adapt, carried):
    model = adapt(make_model())
    before, trains = logits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM has {carried}.*already.*fresh base"):
        add_lora(model, LoRAConfig(r=2))
    assert torch.equal(logits(model), before) and [p.requires_grad for p in model.parameters()] == trains
