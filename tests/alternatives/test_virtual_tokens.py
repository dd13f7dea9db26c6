"""Room before the text: what does not fit into the context, the mask or the cache is refused."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BloomConfig, BloomForCausalLM

from labkit.alternatives.virtual_tokens import text_ids
from tests.alternatives.cases import ALL, VOCAB, llama, text, with_method
from tests.data.tokenizers import llama2_with_end, word_piece


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_prompt_that_fills_the_context_is_refused(name):
    add, config = ALL[name]
    with pytest.raises(ValueError, match="length=64 leaves no room for text in this model's context of 64"):
        add(llama(), type(config)(64))
    model = add(llama(), type(config)(60))
    assert model(text(1, 4)).logits.shape == (1, 4, VOCAB)
    with pytest.raises(ValueError, match="5 tokens of text after 60 virtual ones are 65"):
        model(text(1, 5))
    with pytest.raises(ValueError, match="5 tokens of text after 60"):
        model.generate(input_ids=text(1, 2), max_new_tokens=9, min_new_tokens=9, pad_token_id=0)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_masks_of_four_dimensions_and_static_caches_are_refused(name):
    model = with_method(llama, name)
    with pytest.raises(ValueError, match=r"mask of the text as \(batch, time\)"):
        model(text(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="static"):
        model.generate(input_ids=text(1, 4), max_new_tokens=3, cache_implementation="static", pad_token_id=0)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_model_that_sets_no_limit_has_no_context_to_fill(name):
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2)  # positions by ALiBi
    add, method = ALL[name]
    model = add(BloomForCausalLM(config).eval(), type(method)(64))
    assert model(text(1, 9)).logits.shape == (1, 9, VOCAB)


def test_a_text_to_start_from_is_tokenized_as_a_prompt_is():
    """With the tokenizer's BOS token, and without the end that it puts after a text."""
    tokenizer = llama2_with_end()
    begin = tokenizer("Answer: yes")["input_ids"]
    assert begin[0] == tokenizer.bos_token_id and begin[-1] == tokenizer.eos_token_id
    assert text_ids("Answer: yes", 2 * len(begin) - 2, tokenizer).tolist() == 2 * begin[:-1]
    with pytest.raises(ValueError, match=r"text='\\u200b' has no tokens; give a text with words in it"):
        text_ids("\u200b", 4, word_piece_alone())


def word_piece_alone():
    tokenizer = word_piece()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer
