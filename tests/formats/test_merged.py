"""A merged model as a folder: plain transformers loads it, and computes what the adapted model does."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from labkit import models
from labkit.files import writing
from labkit.files.reading import sha256
from labkit.formats.merged import save_merged
from labkit.formats.merged_weights import MergedWeight, merged_weights
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.models.surgery import untie_embeddings
from labkit.quant.model import quantize_model

IDS = torch.arange(40).view(2, 20)


def adapted(untied=False, quantized=False, **config):
    model, tokenizer = models.load("tiny-llama", dtype="float32")
    if untied:
        untie_embeddings(model)
    if quantized:
        quantize_model(model, progress=False)
    add_lora(model, LoRAConfig(**{"r": 4, "alpha": 8} | config))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_A.data.normal_(std=0.1, generator=generator)
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model.eval(), tokenizer


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


VARIANTS = {
    "LoRA": {},
    "rsLoRA": {"variant": "rslora"},
    "DoRA": {"variant": "dora"},
    "PiSSA": {"init": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 2}},
    "embeddings": {"untied": True, "targets": ["embed_tokens", "lm_head", "q_proj"]},
    "whole modules": {"untied": True, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_plain_transformers_computes_what_the_adapted_model_does(settings, tmp_path):
    model, tokenizer = adapted(**settings)
    if "modules_to_save" in settings:
        model.get_output_embeddings().weight.data.mul_(1.5)
    expected = logits(model)
    folder = save_merged(model, tokenizer, tmp_path / "m", max_file=3_000_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and type(loaded).__module__.startswith("transformers.")
    assert (logits(loaded.eval()) - expected).abs().max() < 5e-5 * expected.abs().max()
    assert torch.equal(logits(model), expected) and lora_layers(model)  # the model is as it was
    text = "Mr. Darcy, 1813"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_4_bit_base_is_dequantized_and_the_adapter_is_in_the_16_bit_weights(tmp_path):
    model, tokenizer = adapted(quantized=True)
    folder = save_merged(model, tokenizer, tmp_path / "m", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.0.self_attn.q_proj"
    layer = lora_layers(model)[name]
    expected = (layer.base.weight.dequantize().float() + layer.delta()).detach().bfloat16()
    assert torch.equal(loaded.get_submodule(name).weight, expected)  # one sum in fp32, rounded once
    assert loaded.dtype == torch.bfloat16 and not hasattr(loaded.config, "quantization_config")


def test_the_folder_says_what_it_was_made_from(tmp_path):
    model, tokenizer = adapted()
    folder = save_merged(model, tokenizer, tmp_path / "m", metrics={"loss": 1.25})
    said = json.loads((folder / "labkit.json").read_text())
    assert said["merged"]["config"]["r"] == 4 and said["merged"]["metrics"] == {"loss": 1.25}
    assert said["files"] == {f.name: sha256(f) for f in folder.iterdir() if f.name != "labkit.json"}
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card and "[FILL IN]" in card and "| rank | 4 |" in card


def test_an_earlier_export_is_replaced_and_a_folder_with_anything_else_is_refused(tmp_path):
    model, tokenizer = adapted()
    folder = save_merged(model, tokenizer, tmp_path / "m")
    save_merged(model, tokenizer, folder, dtype="float16")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16
    (folder / "notes.txt").write_text("mine")
    before = sorted(os.listdir(folder))
    with pytest.raises(FileExistsError, match=r"notes\.txt, not part of a merged model"):
        save_merged(model, tokenizer, folder)
    assert sorted(os.listdir(folder)) == before and os.listdir(tmp_path) == ["m"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save_merged(model, tokenizer, tmp_path / "file")


def test_a_disk_that_fills_up_half_way_leaves_the_old_export(tmp_path, monkeypatch):
    model, tokenizer = adapted()
    folder = save_merged(model, tokenizer, tmp_path / "m", max_file=3_000_000)
    before = {f.name: sha256(f) for f in folder.iterdir()}
    from labkit.formats import merged

    real, calls = merged.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(merged, "save_file", full)
    with pytest.raises(writing.CannotWrite, match="the disk is full; what was there before is intact"):
        save_merged(model, tokenizer, folder, max_file=3_000_000)
    assert {f.name: sha256(f) for f in folder.iterdir()} == before and os.listdir(tmp_path) == ["m"]


def test_no_more_than_one_file_of_merged_weights_is_in_memory(tmp_path, monkeypatch):
    model, tokenizer = adapted()
    from labkit.formats import merged

    sizes, real = [], merged.save_file

    def measured(tensors, *args, **kwargs):
        sizes.append(sum(t.nbytes for t in tensors.values()))
        real(tensors, *args, **kwargs)

    monkeypatch.setattr(merged, "save_file", measured)
    save_merged(model, tokenizer, tmp_path / "m", max_file=5_000_000)
    assert len(sizes) > 3 and max(sizes) <= 5_000_000


@pytest.mark.parametrize(
    "value, dtype, says",
    [
        (float("nan"), "float32", "NaN or infinity"),
        (1e5, "float16", "too large for float16; choose bfloat16"),
    ],
    ids=["NaN", "too large"],
)
def test_numbers_that_cannot_be_saved_are_named_and_nothing_is_written(value, dtype, says, tmp_path):
    model, tokenizer = adapted()
    model.model.norm.weight.data[3] = value
    with pytest.raises(ValueError, match=f"model.norm.weight holds .*{says}"):
        save_merged(model, tokenizer, tmp_path / "m", dtype=dtype)
    assert os.listdir(tmp_path) == []


def test_a_model_that_is_not_what_its_config_says_is_refused(tmp_path):
    model, tokenizer = adapted()
    model.config.vocab_size = 4000
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(4096, 256\), not \(4000, 256\)"):
        save_merged(model, tokenizer, tmp_path / "m")


def test_a_token_without_an_embedding_is_refused_and_nothing_is_written(tmp_path):
    model, tokenizer = adapted()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"a token 4,096, and the model's embedding 4,096 rows"):
        save_merged(model, tokenizer, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_a_merged_adapter_is_not_added_twice():
    from labkit.lora.merging import merge

    model, _ = adapted()
    apart = {w.name: w.rounded(torch.float32) for w in merged_weights(model)}
    merge(model)
    together: list[MergedWeight] = merged_weights(model)
    assert all(torch.allclose(w.rounded(torch.float32), apart[w.name], atol=1e-6) for w in together)
