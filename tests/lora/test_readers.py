"""Layers whose weight other code reads: what it computes is what the adapter means, PEFT's merged model.

PEFT gives the base's weight to a reader, so unmerged its adapter is passed over there; `merge_and_unload` is the
model that the adapter describes. Where PEFT calls every layer, its unmerged model is compared too.
"""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unmerge
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from tests.lora.cases import give, make_gpt2, make_model, randomize

IDS = torch.arange(24).view(2, 12)


def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config).eval()


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=128, hidden_size=64, state_size=8, num_hidden_layers=2)
    ).eval()


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()


def attention():
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4, batch_first=True)}).eval()


def run_t5(model):
    return model(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits


def run_encoder(model):
    return model(src=torch.linspace(-1, 1, 640).view(2, 5, 64))


def run_attention(model):
    x = torch.linspace(-1, 1, 640).view(2, 5, 64)
    return model["attention"](x, x, x, need_weights=False)[0]


READERS = {
    "T5 asks for a dtype": (t5, run_t5, "all-linear"),
    "Mamba multiplies by itself": (mamba, lambda m: m(input_ids=IDS).logits, ["dt_proj", "x_proj"]),
    "attention reads its output layer": (encoder, run_encoder, ["out_proj"]),
    "an encoder layer has one kernel for all": (encoder, run_encoder, ["linear1", "linear2", "out_proj"]),
    "attention alone": (attention, run_attention, ["out_proj"]),
}


def theirs_merged(make, targets, ours, variant="lora"):
    theirs = get_peft_model(
        make(), PeftConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=variant == "dora")
    )
    give(ours, theirs)
    return theirs.eval().merge_and_unload()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", READERS)
def test_a_reader_of_the_weight_computes_with_the_adapter(name, variant, grad):
    make, run, targets = READERS[name]
    ours = randomize(add_lora(make(), LoRAConfig(r=4, alpha=12, targets=targets, variant=variant))).eval()
    with torch.set_grad_enabled(grad):
        expected = run(theirs_merged(make, targets, ours, variant))
        out = run(ours)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert (out - run(make())).abs().max() > 1e-3, "the adapter counts"
    if grad:
        out.square().mean().backward()
        for layer in lora_layers(ours).values():
            assert layer.lora_B.grad.abs().max() > 0 and layer.base.weight.grad is None
    before = run(ours)
    torch.testing.assert_close(run(merge(ours)), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(unmerge(ours)), before)


def test_the_same_in_training_where_peft_calls_the_layers():
    ours = randomize(add_lora(encoder(), LoRAConfig(r=4, alpha=12, targets=["linear1", "linear2"]))).train()
    theirs = get_peft_model(encoder(), PeftConfig(r=4, lora_alpha=12, target_modules=["linear1", "linear2"]))
    give(ours, theirs.train())
    results = []
    for model in (ours, theirs):
        torch.manual_seed(7)  # its dropout
        results.append(run_encoder(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [make_model, make_gpt2])
def test_the_weight_of_an_adapted_layer_is_what_merging_makes_of_it(make):
    model = randomize(add_lora(make(), LoRAConfig(r=4)))
    read = {name: layer.weight.detach() for name, layer in lora_layers(model).items()}
    merge(model)
    for name, layer in lora_layers(model).items():
        assert layer.weight is layer.base.weight and torch.equal(layer.weight, read[name])
        assert layer.bias is layer.base.bias


def test_the_weight_over_four_bits_is_the_dequantized_one_with_the_correction():
    model = make_model()
    quantize_model(model, progress=False)
    layer = next(iter(lora_layers(randomize(add_lora(model, LoRAConfig(r=4)))).values()))
    assert isinstance(layer.base, QuantLinear)
    assert torch.equal(layer.weight, layer.base.weight.dequantize() + layer.delta())
    theirs = nn.Sequential(Linear4bit(64, 64, quant_type="nf4").to("cpu"))
    add_lora(theirs, LoRAConfig(r=4))
    assert theirs[0].weight is theirs[0].base.weight, "bytes, of which nobody can take a part for a matrix"


def test_an_adapted_embedding_is_read_as_one():
    model = make_model(tie_word_embeddings=False)
    randomize(add_lora(model, LoRAConfig(r=4, targets=["embed_tokens"])))
    embedding = model.get_input_embeddings()
    assert (embedding.num_embeddings, embedding.embedding_dim) == (128, 64)
    torch.testing.assert_close(embedding.weight[IDS], embedding(IDS))
