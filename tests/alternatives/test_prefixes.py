"""Prefixes: started from a text they are that text, and fold into themselves without the MLP."""

import pytest
import torch

from labkit.alternatives.cost import cost
from labkit.alternatives.prefixes import PrefixConfig, add_prefix, fold_prefix
from labkit.data.batches import Batch
from labkit.training.loss import supervised_loss
from labkit.training.recompute import checkpoint_blocks
from tests.alternatives.cases import MAKERS, llama, text, with_method


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_a_folded_prefix_needs_no_mlp(make):
    model = with_method(make, "prefix, MLP")
    logits, before = model(text()).logits, cost(model)
    assert torch.equal(fold_prefix(model)(text()).logits, logits)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["virtual_tokens.prefix"]
    assert cost(model).kept == cost(model).trained == before.kept
    with pytest.raises(ValueError, match="no prefix with a projection"):
        fold_prefix(model)


def test_a_prefix_under_gradient_checkpointing_is_an_error_and_not_silently_nothing():
    model = with_method(llama, "prefix").train()
    checkpoint_blocks(model)
    with pytest.raises(ValueError, match="does not train with gradient checkpointing"):
        supervised_loss(model, Batch(text(), text()))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_started_from_a_text_it_is_the_model_with_that_text_before(make):
    config = PrefixConfig(7, None, "text", "a b")

    def tokenizer(_, **options):
        return {"input_ids": [11, 42, 5]}

    seven = torch.tensor([[11, 42, 5, 11, 42, 5, 11]]).expand(3, -1)
    with torch.no_grad():
        expected = make()(torch.cat([seven, text()], 1)).logits[:, 7:]
        model = add_prefix(make(), config, tokenizer)
        torch.testing.assert_close(model(text()).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        add_prefix(make(), config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": True},
        {"projection": 0},
        {"init": "vocab"},
        {"init": "text", "text": "a", "projection": 8},
    ],
    ids=str,
)
def test_config_out_of_range_says_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PrefixConfig(**wrong)
