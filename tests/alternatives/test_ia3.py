"""(IA)^3: merging computes the same, in 4 bits exactly, and can be undone."""

import copy

import pytest
import torch

from labkit.alternatives.cost import cost
from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers, merge_ia3, unmerge_ia3
from labkit.alternatives.methods import base_only, remove
from labkit.lora.count import trainable
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from tests.alternatives.cases import MAKERS, llama, randomize, text


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_merged_ia3_computes_the_same_and_unmerging_is_exact(make):
    base = make()
    for parameter in base.parameters():  # biases too
        parameter.data += 0.05
    model = randomize(add_ia3(copy.deepcopy(base)))
    next(iter(ia3_layers(model).values())).vector[0] = 0  # dividing could not undo this
    expected = model(text()).logits
    torch.testing.assert_close(merge_ia3(model)(text()).logits, expected, rtol=1e-4, atol=1e-5)
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in base.parameters()) + cost(model).trained
    )
    with pytest.raises(ValueError, match="merged already"):
        merge_ia3(model)
    assert torch.equal(unmerge_ia3(model)(text()).logits, expected)
    with pytest.raises(ValueError, match="no merged"):
        unmerge_ia3(model)
    merge_ia3(model)
    assert torch.equal(remove(model)(text()).logits, base(text()).logits)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_the_base_of_a_merged_model_is_the_base_bit_for_bit_also_in_a_copy(make):
    base, model = make(), randomize(add_ia3(make()))
    before = model(text()).logits
    merged = merge_ia3(model)(text()).logits
    twin = copy.deepcopy(model)
    for each in (model, twin):
        with base_only(each):
            assert torch.equal(each(text()).logits, base(text()).logits)
        assert torch.equal(each(text()).logits, merged), "it is merged again after the block"
        assert torch.equal(unmerge_ia3(each)(text()).logits, before)
    assert cost(model).kept == cost(model).trained


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [1, 60])  # one row takes the kernel that never makes the weight
@torch.no_grad()
def test_ia3_on_outputs_merges_into_four_bits_exactly(double_quant, rows):
    model = llama()
    quantize_model(model, double_quant=double_quant, progress=False)
    config = IA3Config(outputs=("k_proj", "v_proj", "up_proj"), inputs=())
    model = randomize(add_ia3(model, config))
    ids = text(1, rows)
    packed = {name: layer.base.packed for name, layer in ia3_layers(model).items()}
    expected = model(ids).logits
    torch.testing.assert_close(merge_ia3(model)(ids).logits, expected, rtol=1e-5, atol=1e-5)
    for name, layer in ia3_layers(model).items():
        assert isinstance(layer.base, QuantLinear) and torch.equal(layer.base.packed, packed[name])
    assert torch.equal(unmerge_ia3(model)(ids).logits, expected)


@torch.no_grad()
def test_in_a_gated_mlp_the_output_of_up_is_the_input_of_down():
    inputs = randomize(add_ia3(llama()))
    outputs = add_ia3(llama(), IA3Config(outputs=("k_proj", "v_proj", "up_proj"), inputs=()))
    own = ia3_layers(inputs)
    for name, layer in ia3_layers(outputs).items():
        layer.vector.copy_(own[name.replace("up_proj", "down_proj")].vector)
    torch.testing.assert_close(outputs(text()).logits, inputs(text()).logits, rtol=1e-5, atol=1e-5)
    assert trainable(outputs).trainable == trainable(inputs).trainable


@torch.no_grad()
def test_what_four_bits_cannot_take_is_refused_and_changes_nothing():
    model = llama()
    quantize_model(model, progress=False)
    randomize(add_ia3(model))
    expected = model(text()).logits
    with pytest.raises(ValueError, match=r"down_proj is a 4-bit layer.*up_proj"):
        merge_ia3(model)
    assert torch.equal(model(text()).logits, expected) and not any(
        layer.is_merged for layer in ia3_layers(model).values()
    )
    odd = llama(hidden_size=96, num_attention_heads=4, num_key_value_heads=2)
    quantize_model(odd, progress=False)
    with pytest.raises(ValueError, match="96 weights, not a whole number of blocks of 64"):
        merge_ia3(add_ia3(odd, IA3Config(outputs=["k_proj"], inputs=[])))


@pytest.mark.parametrize(
    "wrong",
    [
        {"outputs": ["k_proj"]},
        {"outputs": "k_proj", "inputs": []},
        {"outputs": [], "inputs": []},
        {"outputs": ["a"], "inputs": ["a"]},
    ],
    ids=str,
)
def test_config_out_of_range_says_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IA3Config(**wrong)
