"""llama.cpp rounds activations where weights are quantized: from the same weights, its own logits to the last digits."""

import pytest
import torch

from labkit.formats.activations import multiply, rounded_activations, types_of
from labkit.formats.gguf_model import save_gguf
from labkit.models.gguf import read_gguf
from tests.formats.llama_cpp import answer, engine

# a text each: where an activation is at the edge of a code, a last bit rounds it apart
TOKENS = range(300, 308)


@torch.no_grad()
def of_model(model):
    return torch.stack([model(torch.tensor([[t]])).logits[0, -1].log_softmax(-1) for t in TOKENS])


def of_llama_cpp(file, vocabulary):
    server = engine(file)
    said = [answer(server, [t], tokens=1, top=vocabulary).top[0] for t in TOKENS]
    return torch.tensor([[one[token] for token in range(vocabulary)] for one in said])


@pytest.mark.parametrize("numbers", ["Q8_0", "Q4_0", "Q4_1"])
def test_the_same_weights_give_llama_cpps_logits_once_activations_are_rounded(numbers, tiny, tmp_path):
    model, tokenizer = tiny
    file = save_gguf(model, tokenizer, tmp_path / "quantized.gguf", numbers)
    checkpoint = read_gguf(file)
    same = type(model)(checkpoint.config).eval()
    same.load_state_dict(checkpoint.tensors, strict=False)
    plain, vocabulary = of_model(same), checkpoint.config.vocab_size
    whole = save_gguf(same, tokenizer, tmp_path / "whole.gguf", "F32")
    assert (of_llama_cpp(whole, vocabulary) - plain).abs().max() < 1e-4  # the weights are not it
    said = of_llama_cpp(file, vocabulary)
    assert (said - plain).abs().amax(1).min() > 0.03
    with rounded_activations(same, types_of(file)):
        assert (said - of_model(same)).abs().amax(1).median() < 1e-3
    assert torch.equal(of_model(same), plain)


def test_a_type_that_is_not_known_is_named(tiny):
    model, _ = tiny
    types = dict.fromkeys((name for name, _ in model.named_modules()), "Q6_K")
    with pytest.raises(ValueError, match="Q6_K: known are F32"), rounded_activations(model, types):
        pass


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_activations_of_zero_stay_zero(kind):
    assert torch.equal(multiply(torch.zeros(2, 64), torch.randn(3, 64), kind), torch.zeros(2, 3))
