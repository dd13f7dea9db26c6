"""Answers to prompts that begin alike are those of `generate`."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from labkit import models
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.data.tickets import load_tickets
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from labkit.training import shared_prefix
from labkit.training.evaluate import generate
from labkit.training.shared_prefix import can_share, common_start, generate_shared, sharing


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny-llama")


@pytest.fixture(scope="module")
def prompts():
    """Three solved tickets, the same for all, and then a message."""
    train, test = load_tickets("train"), load_tickets("test")
    solved = "".join(f"{t['message']}\n{json.dumps(t['label'])}\n\n" for t in train[:3])
    return [f"{solved}{t['message']}\n" for t in test[:5]]


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_tokens_are_those_of_generate_for_every_batch_size(tiny, prompts, batch_size):
    model, tokenizer = tiny
    shared = generate_shared(model, tokenizer, prompts, 14, batch_size, progress=False)
    assert shared == generate(model, tokenizer, prompts, 14, batch_size, progress=False)
    assert len(set(shared)) > 2  # not one answer for all


def test_tokens_are_those_of_generate_through_four_bits_and_an_adapter(prompts):
    model, tokenizer = models.load("tiny-llama")
    quantize_model(model, progress=False)
    add_lora(model, LoRAConfig(r=4))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    assert generate_shared(model, tokenizer, prompts, 10, 4, progress=False) == generate(
        model, tokenizer, prompts, 10, 4, progress=False
    )


def test_the_logits_behind_a_shared_beginning_are_those_of_the_whole_prompt(tiny, prompts):
    model, tokenizer = tiny
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts[:2]]
    shared = common_start(ids)
    assert shared > 100
    for one in ids:
        rest = torch.tensor([one[shared:]])
        with torch.no_grad(), sharing(model, one[:shared]) as step:
            positions = shared + torch.arange(rest.shape[1])[None]
            behind, _ = step(rest, torch.ones_like(rest), positions, None)
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([one])).logits[0, -1]
        torch.testing.assert_close(behind[0], whole, rtol=1e-4, atol=1e-4)


def test_the_model_attends_as_before_afterwards_also_after_an_error(tiny, prompts):
    model, tokenizer = tiny
    before, mode = model.config._attn_implementation, model.training
    ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    logits = model(input_ids=ids).logits
    generate_shared(model, tokenizer, prompts, 2, 4, progress=False)
    with pytest.raises(ZeroDivisionError), sharing(model, ids[0, :20].tolist()):
        raise ZeroDivisionError
    assert (model.config._attn_implementation, model.training) == (before, mode)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_the_common_start_leaves_each_prompt_a_token():
    assert common_start([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == 2
    assert common_start([[1, 2], [1, 2, 3]]) == 1
    assert common_start([[7], [8]]) == common_start([]) == 0


def test_gpt2_counts_its_positions_from_the_end_of_the_shared_beginning(tokenizer, prompts):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=49152, n_positions=512, n_embd=48, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts[:3]]
    assert can_share(model, ids, common_start(ids))
    assert generate_shared(model, tokenizer, prompts, 6, 3, progress=False) == generate(
        model, tokenizer, prompts, 6, 3, progress=False
    )


def test_a_window_that_does_not_reach_the_beginning_or_virtual_tokens_answer_by_generate(
    tokenizer, prompts, monkeypatch
):
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    windowed = MistralForCausalLM(
        MistralConfig(vocab_size=49152, num_key_value_heads=2, sliding_window=32, **sizes)
    ).eval()
    with_prompt, its_tokenizer = models.load("tiny-llama")
    add_prompt(with_prompt, PromptConfig(length=4))
    asked = []
    monkeypatch.setattr(shared_prefix, "generate", lambda *a: asked.append(a) or generate(*a))
    for model, reader in ((windowed, tokenizer), (with_prompt, its_tokenizer)):
        expected = generate(model, reader, prompts, 4, 3, progress=False)
        assert generate_shared(model, reader, prompts, 4, 3, progress=False) == expected
    assert len(asked) == 2
