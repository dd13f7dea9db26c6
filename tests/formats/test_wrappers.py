"""Whatever stands around a model, its adapter is saved under the names of the model, and loads into it."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn

from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.alternatives import load_alternative, save_alternative
from labkit.lora.adapters import active_adapter, adapter_configs, use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import fingerprint
from labkit.lora.inject import add_lora
from tests.formats.cases import untied
from tests.lora.cases import logits, make_model, randomize

WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "compiled inside": lambda model: compile_layers(model),
}


@pytest.fixture(autouse=True)
def without_tracing():
    """What counts here is where modules stand; only the last test waits for the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compile_layers(model: nn.Module) -> nn.Module:
    """Each block compiled on its own, as large models are."""
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_adapter_saved_in_a_wrapper_loads_without_it_and_the_other_way_round(tmp_path, wrap):
    config = LoRAConfig(r=4, targets=["q_proj", "up_proj"], modules_to_save=["model.norm"])
    inside = randomize(add_lora(wrap(make_model()), config))  # the wrapper first, then the adapter
    outside = wrap(randomize(add_lora(make_model(), config)))
    expected = logits(inside)
    assert torch.equal(logits(outside), expected)
    first, second = save_adapter(inside, tmp_path / "a"), save_adapter(outside, tmp_path / "b")
    for name in peft_folder.OURS:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert torch.equal(logits(load_adapter(make_model(), first)), expected)
    loaded = load_adapter(wrap(make_model()), first)
    assert torch.equal(logits(loaded), expected)
    assert active_adapter(loaded) == "default" and list(adapter_configs(loaded)) == ["default"]
    theirs = PeftModel.from_pretrained(make_model(), str(first)).eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(use_adapter(loaded, None)), logits(make_model()))


def test_modules_that_train_in_full_are_saved_under_own_names_though_they_are_compiled(tmp_path):
    config = LoRAConfig(r=4, targets=["layers.0.mlp.up_proj"], modules_to_save=["layers.1"])
    model = add_lora(compile_layers(make_model()), config)
    for parameter in model.model.layers[1].parameters():
        parameter.data *= 1.5
    folder = save_adapter(model, tmp_path / "a")
    for base in (make_model(), compile_layers(make_model())):
        assert torch.equal(logits(load_adapter(base, folder)), logits(model))
    theirs = PeftModel.from_pretrained(make_model(), str(folder)).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_fingerprint_does_not_see_wrappers(wrap):
    assert fingerprint(wrap(make_model())) == fingerprint(make_model())
    adapted = add_lora(wrap(untied()), LoRAConfig(r=2, targets=["embed_tokens", "q_proj"], init="gaussian"))
    assert fingerprint(adapted) == fingerprint(untied())


def test_a_fingerprint_does_not_see_adapters_of_peft():
    theirs = get_peft_model(
        make_model(), PeftConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert fingerprint(theirs) == fingerprint(make_model())


def test_a_method_beside_lora_is_saved_and_loaded_in_wrappers(tmp_path):
    wrap = WRAPPERS["compiled"]
    model = add_ia3(wrap(make_model()), IA3Config(outputs=["k_proj"], inputs=["down_proj"]))
    for layer in ia3_layers(model).values():
        nn.init.constant_(layer.vector, 1.5)
    folder = save_alternative(model, tmp_path / "a")
    for base in (make_model(), wrap(make_model())):
        assert torch.equal(logits(load_alternative(base, folder)), logits(model))
    theirs = PeftModel.from_pretrained(make_model(), str(folder)).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    prompt = add_prompt(wrap(make_model()), PromptConfig(3))
    folder = save_alternative(prompt, tmp_path / "b")
    assert torch.equal(logits(load_alternative(wrap(make_model()), folder)), logits(prompt))


def test_a_model_with_pefts_adapters_takes_no_other(tmp_path):
    folder = save_adapter(add_lora(make_model(), LoRAConfig(r=2, targets=["q_proj"])), tmp_path / "a")
    theirs = get_peft_model(make_model(), PeftConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has PEFT's adapters already"):
        load_adapter(theirs, folder)
    with pytest.raises(ValueError, match="has IA3 already, which a LoRA adapter would freeze"):
        load_adapter(add_ia3(make_model(), IA3Config(outputs=["k_proj"], inputs=["down_proj"])), folder)


def test_what_is_loaded_into_a_compiled_model_is_what_it_computes_with(tmp_path):
    model = randomize(add_lora(make_model(num_hidden_layers=1), LoRAConfig(r=2, targets=["q_proj"])))
    compiled = torch.compile(make_model(num_hidden_layers=1), backend="eager")
    with torch.compiler.set_stance("default"):
        base = logits(compiled)
        load_adapter(compiled, save_adapter(model, tmp_path / "a"))
        torch.testing.assert_close(logits(compiled), logits(model))
        assert not torch.equal(logits(compiled), base)
