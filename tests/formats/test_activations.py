"""llama.cpp rounds activations where weights are quantized: from the same weights, its own logits to the last digits."""

import pytest
import torch

from labkit.formats.activations import multiply, rounded_activations, types_of
from labkit.formats.gguf_model import save_gguf
from labkit.models.gguf import read_gguf
from tests.formats.llama_cpp import answer, engine

TEXT = "The"  # of one token: over a long text, activations that differ in the last bit are rounded apart


@torch.no_grad()
def of_model(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def of_llama_cpp(file, ids, vocabulary):
    said = answer(engine(file), ids, tokens=1, top=vocabulary).top[0]
    return torch.tensor([said[token] for token in range(vocabulary)])


@pytest.mark.parametrize("numbers", ["Q8_0", "Q4_0", "Q4_1"])
def test_the_same_weights_give_llama_cpps_logits_once_activations_are_rounded(numbers, tiny, tmp_path):
    model, tokenizer = tiny
    ids = tokenizer(TEXT)["input_ids"]
    file = save_gguf(model, tokenizer, tmp_path / "quantized.gguf", numbers)
    checkpoint = read_gguf(file)
    same = type(model)(checkpoint.config).eval()
    same.load_state_dict(checkpoint.tensors, strict=False)
    plain, vocabulary = of_model(same, ids), checkpoint.config.vocab_size
    whole = save_gguf(same, tokenizer, tmp_path / "whole.gguf", "F32")
    assert (of_llama_cpp(whole, ids, vocabulary) - plain).abs().max() < 1e-4  # the weights are not it
    said = of_llama_cpp(file, ids, vocabulary)
    assert (said - plain).abs().max() > 0.03
    with rounded_activations(same, types_of(file)):
        assert (said - of_model(same, ids)).abs().max() < 1e-3
    assert torch.equal(of_model(same, ids), plain)


def test_a_type_that_is_not_known_is_named(tiny):
    model, _ = tiny
    types = dict.fromkeys((name for name, _ in model.named_modules()), "Q6_K")
    with pytest.raises(ValueError, match="Q6_K: known are F32"), rounded_activations(model, types):
        pass


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_activations_of_zero_stay_zero(kind):
    assert torch.equal(multiply(torch.zeros(2, 64), torch.randn(3, 64), kind), torch.zeros(2, 3))
