"""GGUF files of a merged Llama and of adapters: read back, refused, and replaced whole or not at all."""

import gguf
import numpy as np
import pytest
import torch

from labkit import models
from labkit.files import writing
from labkit.formats import gguf_file
from labkit.formats.gguf_adapter import save_gguf_adapter
from labkit.formats.gguf_model import save_gguf
from labkit.formats.merged_weights import merged_weights
from labkit.formats.modelfile import save_modelfile
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.models.gguf import read_gguf
from tests.formats.test_merged import adapted


def fields_of(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def arrays_of(path):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_our_own_reader_gets_the_merged_weights_back_bit_for_bit(tmp_path):
    model, tokenizer = adapted(variant="rslora")
    read = read_gguf(save_gguf(model, tokenizer, tmp_path / "m.gguf", "F32"))
    weights = {w.name: w.rounded(torch.float32) for w in merged_weights(model)}
    assert read.tensors.keys() == weights.keys()
    assert all(torch.equal(read.tensors[name], weights[name]) for name in weights)
    text = "It is 1813, and  they'd <|endoftext|> 42½"
    assert read.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("numbers", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_matrices_are_stored_as_asked_and_norms_in_32_bits(numbers, tmp_path):
    model, tokenizer = adapted()
    reader = gguf.GGUFReader(save_gguf(model, tokenizer, tmp_path / "m.gguf", numbers))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == numbers
    assert kinds["token_embd.weight"] == ("Q8_0" if numbers.startswith("Q4") else numbers)


def test_b_of_q_and_k_has_its_rows_in_pairs_and_everything_else_is_as_it_was(tmp_path):
    model, _ = adapted()
    arrays = arrays_of(save_gguf_adapter(model, tmp_path / "a.gguf"))
    heads = {"q_proj": ("attn_q", 4), "k_proj": ("attn_k", 2), "v_proj": ("attn_v", None)}
    for part, (short, n) in heads.items():
        layer = lora_layers(model)[f"model.layers.1.self_attn.{part}"]
        B = layer.lora_B.detach().numpy()
        if n:  # as llama.cpp's converter does it
            B = B.reshape(n, 2, B.shape[0] // n // 2, *B.shape[1:]).swapaxes(1, 2).reshape(B.shape)
        assert np.array_equal(arrays[f"blk.1.{short}.weight.lora_b"], B)
        assert np.array_equal(arrays[f"blk.1.{short}.weight.lora_a"], layer.lora_A.detach().numpy())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variant": "rslora"},
        {"init": "pissa"},
        {"variant": "rslora", "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=["LoRA", "rsLoRA", "PiSSA", "patterns"],
)
def test_what_llama_cpp_computes_from_the_file_is_the_correction_of_each_layer(settings, tmp_path):
    model, _ = adapted(**settings)
    path = save_gguf_adapter(model, tmp_path / "a.gguf")
    arrays, alpha = arrays_of(path), fields_of(path)["adapter.lora.alpha"]
    for name, layer in lora_layers(model).items():
        if "v_proj" not in name and "mlp" not in name:
            continue  # their rows have another order
        short = {"v_proj": "attn_v", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
        there = f"blk.{name.split('.')[2]}.{short[name.split('.')[-1]]}.weight"
        a, b = arrays[f"{there}.lora_a"], arrays[f"{there}.lora_b"]
        expected = layer.delta()
        if layer.has_own_base:
            expected = expected - layer.scaling * layer.start_B @ layer.start_A
        assert np.allclose(alpha / b.shape[1] * b @ a, expected.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"variant": "dora"}, "no place for DoRA's magnitudes. Merge it instead"),
        (
            {"untied": True, "modules_to_save": ["lm_head"]},
            "no place for lm_head, which trained in full. Merge",
        ),
    ],
    ids=["DoRA", "modules_to_save"],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused_with_the_way_out(settings, says, tmp_path):
    model, _ = adapted(**settings)
    with pytest.raises(ValueError, match=says):
        save_gguf_adapter(model, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_another_architecture_is_refused_with_the_way_out(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="this is a GPT2LMHeadModel .*save_merged"):
        save_gguf(model, None, tmp_path / "m.gguf")
    add_lora(model, LoRAConfig(r=2, alpha=4))
    with pytest.raises(ValueError, match="this is a GPT2LMHeadModel"):
        save_gguf_adapter(model, tmp_path / "a.gguf")


def test_another_number_of_tokens_than_rows_is_refused(tmp_path):
    model, tokenizer = models.load("tiny-llama")
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"has 4,097 tokens and the model's embedding 4,096 rows"):
        save_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_what_is_no_gguf_file_is_not_replaced(tmp_path):
    model, tokenizer = adapted()
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="is no GGUF file"):
        save_gguf(model, tokenizer, tmp_path / "m.gguf")
    with pytest.raises(FileExistsError, match="is a folder; give the name of a file"):
        save_gguf_adapter(model, tmp_path)
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_disk_that_fills_up_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    model, tokenizer = adapted()
    path = save_gguf(model, tokenizer, tmp_path / "m.gguf")
    before = path.read_bytes()

    def full(self):
        if "blk.2" in self.name:
            raise OSError(28, "No space left on device")
        return real(self)

    real = gguf_file.GGUFTensor.encoded
    monkeypatch.setattr(gguf_file.GGUFTensor, "encoded", full)
    with pytest.raises(writing.CannotWrite, match="the disk is full; what was there before is intact"):
        save_gguf(model, tokenizer, path, "F32")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_modelfile_names_the_files_and_the_end_of_an_answer(tmp_path):
    model, tokenizer = adapted()
    base, adapter = tmp_path / "m.gguf", save_gguf_adapter(model, tmp_path / "a.gguf")
    save_gguf(models.load("tiny-llama")[0], tokenizer, base, "F32")
    text = save_modelfile(base, tokenizer, adapter).read_text()
    for line in (
        "FROM ./m.gguf",
        "ADAPTER ./a.gguf",
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 512",
    ):
        assert line in text.split("\n")
    assert 'TEMPLATE """{{ .Prompt }}"""' in text  # tiny-llama has no chat template
    assert "lms import m.gguf" in (tmp_path / "LM_STUDIO.md").read_text()
    (tmp_path / "Modelfile").write_text("FROM mine")
    with pytest.raises(FileExistsError, match="was not written here"):
        save_modelfile(base, tokenizer)


CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_chatml_becomes_ollamas_template_with_its_system_message_and_another_template_does_not(tmp_path):
    model, tokenizer = models.load("tiny-llama")
    path = save_gguf(model, tokenizer, tmp_path / "m.gguf")
    tokenizer.chat_template = CHATML
    text = save_modelfile(path, tokenizer).read_text()
    assert 'SYSTEM """Be brief."""' in text and "<|im_start|>{{ .Role }}" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert (
        'TEMPLATE "' not in (other := save_modelfile(path, tokenizer).read_text()) and "TEMPLATE …" in other
    )
