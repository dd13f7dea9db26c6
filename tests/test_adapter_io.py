"""Adapters on disk: exact, at home in PEFT, and never loaded where they do not belong."""

import json
import os

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from labkit import adapter_io
from labkit.adapter_io import AdapterMismatch, load_adapter, save_adapter
from labkit.lora import LoRAConfig, add_lora, lora_layers, merge
from labkit.quant_linear import dequantize_model, quantize_model
from tests.conftest import make_small_llama

IDS = torch.arange(40).view(2, 20)


def adapted(seed=0, quantized=False, **config):
    model = make_small_llama(seed)
    if quantized:
        quantize_model(model, progress=False)
    add_lora(model, LoRAConfig(**{"r": 4, "alpha": 8} | config))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("quantized", [False, True])
def test_reloaded_adapter_equals_the_live_one_bit_for_bit(tmp_path, quantized):
    model = adapted(quantized=quantized)
    save_adapter(model, tmp_path / "a")
    fresh = make_small_llama()
    if quantized:
        quantize_model(fresh, progress=False)
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "a").eval()), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variant": "rslora"},
        {"targets": "attention"},
        {"targets": [f"layers.{i}.mlp.up_proj" for i in (0, 2)]},
    ],
)
def test_peft_loads_what_is_saved_here(tmp_path, config):
    model = adapted(**config)
    save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(make_small_llama(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_a_quantized_models_adapter_works_in_peft_on_the_dequantized_base(tmp_path):
    model = adapted(quantized=True)
    save_adapter(model, tmp_path / "a")
    base = make_small_llama()
    quantize_model(base, progress=False)
    theirs = PeftModel.from_pretrained(dequantize_model(base), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_loads_here(tmp_path, rslora):
    config = PeftConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=rslora, init_lora_weights=False
    )
    theirs = get_peft_model(make_small_llama(), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    ours = load_adapter(make_small_llama(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def change_tensors(folder, change):
    tensors = load_file(folder / adapter_io.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / adapter_io.WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"),
            r"up_proj.lora_A.weight is missing",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}
            ),
            "layers.9.*no such",
        ),
        (lambda t: t.update({"base_model.model.extra": torch.ones(1)}), "extra"),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 65)}
            ),
            r"has shape \(4, 65\), not \(4, 64\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_change_nothing(tmp_path, change, message):
    save_adapter(adapted(), tmp_path / "a")
    change_tensors(tmp_path / "a", change)
    fresh = make_small_llama()
    with pytest.raises(AdapterMismatch, match=message):
        load_adapter(fresh, tmp_path / "a")
    assert not lora_layers(fresh)


@pytest.mark.parametrize("quantized", [False, True])
def test_adapter_of_another_base_is_refused(tmp_path, quantized):
    save_adapter(adapted(quantized=quantized), tmp_path / "a")
    other = make_small_llama(seed=1)
    if quantized:
        quantize_model(other, progress=False)
    with pytest.raises(AdapterMismatch, match="same shape but with other weights"):
        load_adapter(other, tmp_path / "a")


def test_adapter_of_another_size_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(AdapterMismatch, match="other layers or sizes"):
        load_adapter(make_small_llama(intermediate_size=160), tmp_path / "a")


def test_the_same_base_in_other_precision_is_the_same_base(tmp_path):
    save_adapter(adapted(quantized=True), tmp_path / "a")
    load_adapter(make_small_llama(), tmp_path / "a")
    load_adapter(make_small_llama().bfloat16(), tmp_path / "a")


def test_fingerprint_does_not_see_adapters_merged_or_not():
    model = adapted()
    assert adapter_io.fingerprint(make_small_llama()) == adapter_io.fingerprint(model)
    assert adapter_io.fingerprint(merge(model)) == adapter_io.fingerprint(make_small_llama())


def test_pickle_truncated_and_foreign_folders_are_refused(tmp_path):
    model = make_small_llama()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickle"):
        load_adapter(model, tmp_path)
    folder = save_adapter(adapted(), tmp_path / "a")
    weights = folder / adapter_io.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_adapter(model, folder)
    folder = save_adapter(adapted(), tmp_path / "b")
    config = json.loads((folder / adapter_io.CONFIG).read_text())
    (folder / adapter_io.CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora=True"):
        load_adapter(model, folder)
    assert not lora_layers(model)


def test_saving_replaces_an_adapter_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = save_adapter(adapted(), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(
        adapter_io,
        "save_file",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(seed=2), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["a"], "temporary files are gone"
    monkeypatch.undo()
    save_adapter(adapted(r=2), folder)
    assert json.loads((folder / adapter_io.CONFIG).read_text())["r"] == 2
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_to_save_or_nan_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no LoRA adapter to save"):
        save_adapter(make_small_llama(), tmp_path / "a")
    model = adapted()
    next(iter(lora_layers(model).values())).lora_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
