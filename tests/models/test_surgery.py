"""Finding and replacing modules: names by whole parts, ties by the tensor, the output unchanged."""

import pytest
import torch
from torch import nn

from labkit.models.surgery import (
    detach_from_file,
    ends_with,
    inside,
    is_output_layer,
    replace_module,
    tied_partner,
    untie_embeddings,
    weight_holders,
)
from tests.conftest import make_small_llama


def test_a_name_ends_with_whole_parts_only():
    assert ends_with("layers.0.q_proj", "q_proj") and ends_with("layers.0.q_proj", "0.q_proj")
    assert ends_with("q_proj", "q_proj") and not ends_with("my_q_proj", "q_proj")
    assert not ends_with("layers.10.q_proj", "0.q_proj")


def test_a_module_is_inside_itself_and_its_parents_and_nothing_else():
    name = "model.layers.0.mlp.up_proj"
    assert inside(name, ["mlp"]) and inside(name, ["up_proj"]) and inside(name, ["x", "layers.0"])
    assert inside("lm_head", ["lm_head"])
    assert not inside(name, ["proj"]) and not inside(name, ["layers.0.up_proj"]) and not inside(name, [])


def test_the_output_layer_is_the_one_that_makes_logits(small_llama):
    assert is_output_layer(small_llama, small_llama.lm_head)
    assert not is_output_layer(small_llama, small_llama.model.embed_tokens)
    assert not is_output_layer(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)), "a model may have none"


def test_a_replaced_module_is_called_in_place_of_the_old_one(small_llama):
    new = nn.Linear(64, 176, bias=False)
    replace_module(small_llama, "model.layers.1.mlp.up_proj", new)
    assert small_llama.model.layers[1].mlp.up_proj is new
    replace_module(small_llama, "lm_head", head := nn.Linear(64, 10, bias=False))
    assert small_llama(torch.tensor([[1, 2]])).logits.shape == (1, 2, 10) and small_llama.lm_head is head
    with pytest.raises(AttributeError):
        replace_module(small_llama, "model.nothing.up_proj", new)


def test_tied_layers_name_each_other_until_they_are_untied(small_llama):
    head, embedding = small_llama.lm_head, small_llama.model.embed_tokens
    assert tied_partner(small_llama, head) == "model.embed_tokens"
    assert tied_partner(small_llama, embedding, weight_holders(small_llama)) == "lm_head"
    assert tied_partner(small_llama, small_llama.model.layers[0].mlp.up_proj) is None
    ids = torch.tensor([[5, 6, 7]])
    before, count = small_llama(ids).logits, sum(p.numel() for p in small_llama.parameters())
    assert untie_embeddings(small_llama) is small_llama
    assert tied_partner(small_llama, head) is None
    assert torch.equal(small_llama(ids).logits, before) and not small_llama.config.tie_word_embeddings
    assert sum(p.numel() for p in small_llama.parameters()) == count + embedding.weight.numel()
    with pytest.raises(ValueError, match="share no weight; nothing to untie"):
        untie_embeddings(small_llama)
    with pytest.raises(ValueError, match="Sequential share no weight"):
        untie_embeddings(nn.Sequential(nn.Linear(2, 2)))


def test_an_untied_layer_trains_if_the_tied_one_did():
    for trains in (False, True):
        model = make_small_llama().requires_grad_(trains)
        assert untie_embeddings(model).lm_head.weight.requires_grad is trains


def test_what_is_detached_from_its_file_has_the_same_numbers_in_memory_of_its_own(small_llama):
    leave = small_llama.model.layers[0].mlp.up_proj.weight
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in small_llama.named_parameters()}
    detach_from_file(small_llama, {id(leave)})
    for name, p in small_llama.named_parameters():
        assert torch.equal(p, before[name][1])
        assert (p.data_ptr() == before[name][0]) == (p is leave), name
    assert tied_partner(small_llama, small_llama.lm_head) == "model.embed_tokens"
