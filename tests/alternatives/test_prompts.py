"""Soft prompts: started from a text they are that text, and a configuration out of range is refused."""

import pytest
import torch

from labkit.alternatives.prompts import PromptConfig, add_prompt
from tests.alternatives.cases import MAKERS, text


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_started_from_a_text_it_is_the_model_with_that_text_before(make):
    config = PromptConfig(7, "text", "a b")

    def tokenizer(_, **options):
        return {"input_ids": [11, 42, 5]}

    seven = torch.tensor([[11, 42, 5, 11, 42, 5, 11]]).expand(3, -1)
    with torch.no_grad():
        expected = make()(torch.cat([seven, text()], 1)).logits[:, 7:]
        model = add_prompt(make(), config, tokenizer)
        torch.testing.assert_close(model(text()).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        add_prompt(make(), config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"length": 0},
        {"length": 2.5},
        {"init": "zeros"},
        {"init": "text"},
        {"text": "only"},
    ],
    ids=str,
)
def test_config_out_of_range_says_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PromptConfig(**wrong)
