"""What a model can take in: its rows and positions are torch's own, which raise (or not) where it is refused here."""

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    OPTForCausalLM,
)

from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.data.encoding import Encoded
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.training.limits import check_fits, check_ids, context_of, padding_id, rows_of
from tests.conftest import make_small_llama
from tests.data.tokenizers import tiny_llama


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=32)).eval()


def opt():
    sizes = dict(
        hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    return OPTForCausalLM(OPTConfig(vocab_size=100, max_position_embeddings=32, **sizes)).eval()


def llama():
    return make_small_llama(vocab_size=100, max_position_embeddings=32, num_hidden_layers=1)


@pytest.mark.parametrize("make", [gpt2, opt])
@pytest.mark.parametrize("adapt", [False, True])
def test_what_fits_is_what_torch_takes_of_a_model_with_a_table_of_positions(make, adapt):
    model = add_lora(make(), LoRAConfig(r=2)) if adapt else make()
    assert (rows_of(model), context_of(model)) == (100, 32)
    for ids in ([99] * 32, [99] * 33, [100], [-1]):
        try:
            model(torch.tensor([ids]))
            fits = True
        except (IndexError, RuntimeError):
            fits = False
        if fits:
            check_fits(model, [Encoded(ids[:1], ids[1:])])
        else:
            with pytest.raises(ValueError, match="record 0 has"):
                check_fits(model, [Encoded(ids[:1], ids[1:])])


def test_a_record_beyond_the_positions_is_named_by_its_own_index_with_what_to_do():
    examples = [Encoded([1], [2]), Encoded([1] * 30, [2] * 10)]
    with pytest.raises(
        ValueError, match=r"record 3 has 40 tokens, and LlamaForCausalLM has 32 positions; set max_length=32"
    ):
        check_fits(llama(), examples, left_out=[0, 2])
    with pytest.raises(
        ValueError, match=r"record 1 has 40 tokens and 5 virtual tokens before them, .* max_length=27"
    ):
        check_fits(add_prompt(llama(), PromptConfig(5)), examples)


def test_an_id_that_the_model_lacks_is_named_with_what_to_do():
    for model in (llama(), torch.compile(llama(), backend="eager")):
        with pytest.raises(
            ValueError, match=r"record 0 has the token id 100, and LlamaForCausalLM has ids 0 to 99: .*resize"
        ):
            check_fits(model, [Encoded([1, 100], [101])])
    check_ids(nn.Linear(1, 1), [10**9], "prompt 0")  # a model that does not say is not judged
    check_ids(llama(), [], "prompt 0")


def test_new_tokens_fit_once_the_model_has_rows_for_them():
    model = llama()
    model.resize_token_embeddings(104)
    check_fits(model, [Encoded([103], [100])])


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (GPT2Config(n_positions=77), 77),
        (MambaConfig(), None),
        (BloomConfig(), None),
        (LlamaConfig(max_position_embeddings=77), 77),
        (Gemma3TextConfig(max_position_embeddings=77), 77),  # a scaling for each kind of layer
        (LlamaConfig(max_position_embeddings=100, rope_scaling={"rope_type": "linear", "factor": 2.0}), 200),
        (
            LlamaConfig(  # as Llama 3.1: the reach after the scaling is stated, and is not multiplied again
                max_position_embeddings=131072,
                rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
            ),
            131072,
        ),
        (
            LlamaConfig(  # as Qwen 2.5's model card says: the reach before it
                max_position_embeddings=32768,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            ),
            131072,
        ),
    ],
)  # fmt: skip
def test_positions_are_those_of_the_config_with_its_scaling(config, positions):
    model = nn.Module()
    model.config = config
    assert context_of(model) == positions


def test_padding_has_an_id_that_the_model_has():
    tokenizer = tiny_llama()
    assert padding_id(tokenizer, make_small_llama(vocab_size=4096)) == tokenizer.pad_token_id == 1
    added = tiny_llama(pad_token="[PAD]")  # and no resize
    assert added.pad_token_id == 4096 and padding_id(added, make_small_llama(vocab_size=4096)) == 0
    tokenizer.pad_token = None
    assert padding_id(tokenizer, make_small_llama(vocab_size=4096)) == 0
