"""Updates of models: the same numbers under the same names, whatever the method."""

import copy

import peft
import pytest
import torch

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers, merge_ia3
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.analysis.subspace import add_subspace
from labkit.analysis.updates import PARTS, find_updates, linear_layers, with_update
from labkit.lora.adapters import base_only as disabled
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge
from labkit.models.stand_in import StandIn
from labkit.quant.layer_kinds import dense_weight, widths
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model
from tests.analysis.matrices import gaussian
from tests.conftest import make_small_llama
from tests.lora.cases import make_gpt2


def randomize_B(model, seed=1, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=std, generator=generator)
    return model


def test_update_of_full_fine_tuning_is_the_difference_and_leaves_the_output_layer_out(small_llama):
    tuned, change = copy.deepcopy(small_llama), {}
    for n, (name, layer) in enumerate(linear_layers(tuned).items()):
        change[name] = 0.01 * gaussian(*layer.weight.shape, seed=n)
        layer.weight.data += change[name]
    found = find_updates(small_llama, tuned)
    assert set(found) == set(change) and len(found) == 21 and "lm_head" not in found
    assert all(torch.allclose(found[name], change[name], atol=1e-7) for name in change)
    assert all((error == 0).all() for error in find_updates(small_llama, tuned, "error").values())
    total = find_updates(small_llama, tuned, "total")
    assert all(torch.equal(total[name], found[name]) for name in found)


def test_lora_and_qlora_have_the_same_names_and_the_same_update(small_llama):
    lora = randomize_B(add_lora(copy.deepcopy(small_llama), LoRAConfig(r=4)))
    qlora = copy.deepcopy(small_llama)
    quantize_model(qlora, progress=False)
    add_lora(qlora, LoRAConfig(r=4))
    for name, layer in lora_layers(qlora).items():
        layer.load_state_dict(
            {k: v for k, v in lora.get_submodule(name).state_dict().items() if "lora" in k}, strict=False
        )
    plain, quantized = find_updates(small_llama, lora), find_updates(small_llama, qlora)
    assert set(plain) == set(quantized) == set(find_updates(small_llama, small_llama))
    assert all(torch.equal(plain[name], quantized[name]) for name in plain)
    factored = find_updates(small_llama, qlora, factored=True)
    assert all(torch.allclose(factored[name].dense(), plain[name]) for name in plain)


def test_parts_of_a_qlora_model_add_up_and_the_error_is_that_of_quantization(small_llama):
    qlora = copy.deepcopy(small_llama)
    quantize_model(qlora, progress=False)
    quantized = copy.deepcopy(qlora)
    randomize_B(add_lora(qlora, LoRAConfig(r=4)))
    update, error, total = (find_updates(small_llama, qlora, part) for part in PARTS)
    for name, layer in linear_layers(small_llama).items():
        base = quantized.get_submodule(name)
        assert isinstance(base, QuantLinear)
        assert torch.equal(error[name], base.weight.dequantize() - layer.weight)
        assert torch.allclose(total[name], error[name] + update[name], atol=1e-6)
        # the layer computes with W_0 + total
        x = gaussian(3, layer.in_features)
        assert torch.allclose(qlora.get_submodule(name)(x), x @ (layer.weight + total[name]).T, atol=1e-4)
    assert all((u == 0).all() for u in find_updates(small_llama, quantized).values())
    assert all(torch.equal(u, error[n]) for n, u in find_updates(small_llama, quantized, "total").items())


def test_an_adapter_on_some_layers_has_updates_only_there(small_llama):
    tuned = randomize_B(add_lora(copy.deepcopy(small_llama), LoRAConfig(r=4, targets=["q_proj"])))
    assert set(find_updates(small_llama, tuned)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    total = find_updates(small_llama, tuned, "total")
    assert len(total) == 21 and (total["model.layers.0.mlp.up_proj"] == 0).all()


def test_a_merged_adapter_has_the_update_that_it_had_before(small_llama):
    tuned = randomize_B(add_lora(copy.deepcopy(small_llama), LoRAConfig(r=4)))
    before = find_updates(small_llama, tuned)
    after = find_updates(small_llama, merge(tuned))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("base", ["llama", "llama in 4 bits", "gpt2"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_update_of_an_adapter_is_what_merging_it_adds(variant, base):
    original = make_gpt2() if base == "gpt2" else make_small_llama()
    tuned = copy.deepcopy(original)
    if base == "llama in 4 bits":
        quantize_model(tuned, progress=False)
    randomize_B(add_lora(tuned, LoRAConfig(r=2, alpha=4, variant=variant)))
    layers = lora_layers(tuned)
    if variant == "dora":
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_magnitude *= 1.1
    found = find_updates(original, tuned)
    assert set(found) == set(layers)
    frozen = {name: dense_weight(layer.base).clone() for name, layer in layers.items()}
    dense = dequantize_model(tuned) if base == "llama in 4 bits" else tuned
    merged = {name: dense_weight(layer.base) for name, layer in lora_layers(merge(dense)).items()}
    for name, update in found.items():
        torch.testing.assert_close(update, merged[name] - frozen[name], atol=1e-6, rtol=1e-5)
        rank = torch.linalg.matrix_rank(update, rtol=1e-4)
        assert rank == 2 if variant == "lora" else rank > 2, (
            "only a stretched weight has more than r directions"
        )
    if base != "llama in 4 bits":  # whose base is now another
        for name, update in find_updates(original, tuned).items():
            torch.testing.assert_close(update, found[name], atol=1e-6, rtol=1e-5)


def test_dora_has_no_factors(small_llama):
    tuned = add_lora(copy.deepcopy(small_llama), LoRAConfig(r=2, variant="dora"))
    with pytest.raises(ValueError, match="no factors"):
        find_updates(small_llama, tuned, factored=True)


def test_an_adapter_on_another_base_and_other_models_are_refused(small_llama):
    other = add_lora(make_small_llama(seed=1), LoRAConfig(r=4))
    with pytest.raises(ValueError, match="not that of base"):
        find_updates(small_llama, other)
    assert len(find_updates(small_llama, other, "total")) == 21
    with pytest.raises(ValueError, match="same linear layers"):
        find_updates(small_llama, make_small_llama(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"\(176, 64\) in base and \(128, 64\) in tuned"):
        find_updates(small_llama, make_small_llama(intermediate_size=128))
    with pytest.raises(ValueError, match="part='delta' is not known"):
        find_updates(small_llama, small_llama, "delta")
    with pytest.raises(ValueError, match="has no factors"):
        find_updates(small_llama, other, "total", factored=True)


def test_a_change_that_does_not_fit_changes_nothing(small_llama):
    name = "model.layers.0.self_attn.q_proj"
    weight = small_llama.get_submodule(name).weight.clone()
    for changes in ({name: torch.ones(64, 64), "nowhere": torch.ones(2, 2)}, {name: torch.ones(3, 3)}):
        with pytest.raises(ValueError, match="nowhere|3, 3"), with_update(small_llama, changes):
            pass
        assert torch.equal(small_llama.get_submodule(name).weight, weight)


@pytest.mark.parametrize("base", ["llama", "llama in 4 bits", "gpt2"])
@torch.no_grad()
def test_the_update_of_ia3_is_what_merging_it_adds_and_the_same_merged(base):
    original = make_gpt2() if base == "gpt2" else make_small_llama()
    tuned = copy.deepcopy(original)
    config = None
    if base == "llama in 4 bits":
        quantize_model(tuned, progress=False)
        config = IA3Config(("k_proj", "v_proj", "up_proj"), ())
    add_ia3(tuned, config)
    for n, layer in enumerate(ia3_layers(tuned).values()):
        layer.vector += 0.1 * gaussian(1, len(layer.vector), seed=n)[0]
    update, total = find_updates(original, tuned), find_updates(original, tuned, "total")
    assert set(update) == set(ia3_layers(tuned)) and set(total) == set(linear_layers(original))
    for name, change in update.items():
        start, layer = dense_weight(ia3_layers(tuned)[name].base), ia3_layers(tuned)[name]
        factors = layer.vector[None] if layer.on_input else layer.vector[:, None]
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(change, start * factors - start)
    with with_update(original, total) as model:  # without the biases, which are scaled too
        for name, layer in linear_layers(model).items():
            torch.testing.assert_close(dense_weight(layer), computed(tuned, name), atol=1e-5, rtol=1e-4)
    merge_ia3(tuned)
    again = find_updates(original, tuned)
    assert all(torch.allclose(again[name], update[name], atol=1e-6) for name in update)


def computed(model, name):
    """The weight that a layer computes with, (out, in), found by giving it each unit vector."""
    layer = linear_layers(model)[name]
    n_in = widths(layer.base if isinstance(layer, StandIn) else layer)[0]
    bias = layer(torch.zeros(1, n_in))
    return (layer(torch.eye(n_in)) - bias).T


def test_what_trains_in_full_beside_an_adapter_is_an_update_too(small_llama):
    config = LoRAConfig(r=2, targets=["q_proj"], modules_to_save=["layers.1.mlp"])
    tuned = randomize_B(add_lora(copy.deepcopy(small_llama), config))
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight += 0.5
    found = find_updates(small_llama, tuned)
    assert torch.allclose(found["model.layers.1.mlp.up_proj"], torch.tensor(0.5), atol=1e-6)
    assert len(found) == 3 + 3


@torch.no_grad()
def test_wrappers_around_a_model_change_no_name_and_no_number(small_llama):
    tuned = randomize_B(add_lora(copy.deepcopy(small_llama), LoRAConfig(r=2)))
    want = find_updates(small_llama, tuned)
    found = find_updates(torch.compile(small_llama, backend="eager"), torch.nn.DataParallel(tuned))
    assert list(found) == list(want) and all(torch.equal(found[name], want[name]) for name in want)


@torch.no_grad()
def test_full_fine_tuning_of_gpt2_is_the_difference():
    base, tuned = make_gpt2(), make_gpt2()
    layer = tuned.transformer.h[0].mlp.c_fc
    layer.weight += (change := 0.01 * gaussian(*layer.weight.shape))
    found = find_updates(base, tuned)["transformer.h.0.mlp.c_fc"]
    torch.testing.assert_close(found, change.T, atol=1e-6, rtol=1e-4)


def test_what_has_no_update_in_weights_is_refused_and_not_zero(small_llama):
    tuned = add_prompt(copy.deepcopy(small_llama), PromptConfig(3))
    with pytest.raises(ValueError, match="Prompt changes no weight"):
        find_updates(small_llama, tuned)
    tuned = add_bottleneck(copy.deepcopy(small_llama), BottleneckConfig(4))
    with pytest.raises(ValueError, match="Bottleneck changes no weight"):
        find_updates(small_llama, tuned)
    theirs = peft.get_peft_model(copy.deepcopy(small_llama), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT's adapters, which find_updates does not read"):
        find_updates(small_llama, theirs)
    tuned = randomize_B(add_lora(copy.deepcopy(small_llama), LoRAConfig(r=2)))
    with disabled(tuned), pytest.raises(ValueError, match="put aside"):
        find_updates(small_llama, tuned)
    with pytest.raises(ValueError, match="base has LoRA adapters"):
        find_updates(tuned, tuned)
    with pytest.raises(ValueError, match="has LoRA adapters, which would be frozen"):
        add_subspace(tuned, 4, seed=0)
