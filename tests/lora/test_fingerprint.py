"""A fingerprint is of the base, whatever is mounted on it."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, Qwen2Config, Qwen2ForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import check_recorded, differences, fingerprint
from labkit.lora.inject import lora_layers
from labkit.lora.merging import merge
from labkit.lora.qlora import add_qlora
from labkit.models.surgery import untie_embeddings
from labkit.quant.model import quantize_model
from tests.conftest import make_small_llama
from tests.formats.cases import adapted
from tests.lora.cases import make_model, randomize


def test_fingerprint_does_not_see_adapters_merged_or_not():
    model = adapted()
    assert fingerprint(make_small_llama()) == fingerprint(model)
    assert fingerprint(merge(model)) == fingerprint(make_small_llama())


@pytest.mark.parametrize("init", ["default", "pissa", "loftq"])
def test_the_fingerprint_of_a_4_bit_base_is_the_same_before_and_after_a_merge(init):
    model = randomize(add_qlora(make_model(), LoRAConfig(r=4, init=init)))
    before = fingerprint(model)
    merged = merge(model, requantize=True)
    weights = {name: layer.base.weight for name, layer in lora_layers(merged).items()}
    assert fingerprint(merged) == before
    assert all(
        layer.is_merged and layer.base.weight is weights[n] for n, layer in lora_layers(merged).items()
    )
    if init == "default":
        alone = make_model()
        quantize_model(alone, progress=False)
        assert before == fingerprint(alone)


def untied_t5():
    """T5 whose encoder and decoder each have an embedding of their own, with the values of the one they share."""
    model = make_t5()
    for part in (model.encoder, model.decoder, model.lm_head):
        holder = part if part is model.lm_head else part.embed_tokens
        holder.weight = torch.nn.Parameter(holder.weight.detach().clone())
    return model


def make_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5(T5Config(vocab_size=64, tie_word_embeddings=True, **sizes))


TIED = {
    "llama": (lambda: make_model(tie_word_embeddings=True), lambda: untie_embeddings(make_model(tie_word_embeddings=True))),
    "t5": (make_t5, untied_t5),
}  # fmt: skip


@pytest.mark.parametrize("family", TIED)
def test_tied_embeddings_have_the_fingerprint_of_untied_ones_that_are_equal(family):
    tied, untied = (make() for make in TIED[family])
    assert len(list(untied.parameters())) > len(list(tied.parameters()))
    assert fingerprint(untied) == fingerprint(tied)
    untied.get_input_embeddings().weight.data[3, 0] += 1
    assert differences(fingerprint(untied), fingerprint(tied)) == ["rest"]


def test_a_parameter_of_any_kind_that_differs_is_seen():
    model = make_model(Qwen2ForCausalLM, Qwen2Config)  # its q, k and v have biases
    before = fingerprint(model)
    for parameter in model.parameters():
        parameter.data.view(-1)[0] += 1
        now = fingerprint(model)
        assert differences(before, now) != []
        parameter.data.view(-1)[0] -= 1


def test_a_bias_that_two_modules_share_counts_once():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=64, **sizes))
    before = fingerprint(model)
    model.cls.predictions.decoder.bias.data[0] += 1
    assert differences(before, fingerprint(model)) == ["biases"]


def test_what_an_adapter_brings_itself_is_left_out():
    model, other = make_model(), make_model()
    other.lm_head.weight.data += 1
    assert differences(fingerprint(model), fingerprint(other)) == ["linears"]
    assert fingerprint(model, ["lm_head"]) == fingerprint(other, ["lm_head"])
    other.model.layers[0].mlp.up_proj.weight.data += 1
    assert differences(fingerprint(model, ["lm_head"]), fingerprint(other, ["lm_head"])) == ["linears"]
    assert fingerprint(model, ["model.layers.0", "lm_head"]) == fingerprint(
        other, ["model.layers.0", "lm_head"]
    )


def test_a_base_in_other_precision_is_the_same_unless_asked_strictly():
    full, quantized = make_model(), make_model()
    quantize_model(quantized, progress=False)
    assert differences(fingerprint(full), fingerprint(quantized)) == []
    assert differences(fingerprint(full), fingerprint(quantized), strict=True) == ["linears"]


@pytest.mark.parametrize(
    "change",
    [
        {"linears_kind": "torch.float31"},
        {"linears_kind": "nf4/65/double"},
        {"linears_kind": "nf5/64"},
        {"rest_kind": "float32"},
        {"linears": 7},
        {"another": "x"},
    ],
)
def test_a_kind_that_there_is_not_does_not_switch_the_comparison_off(change):
    recorded = fingerprint(make_model())
    check_recorded(recorded)
    with pytest.raises(ValueError, match="fingerprint of the base is not|is not one that there is"):
        check_recorded(recorded | change)
