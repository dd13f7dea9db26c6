"""Measuring: losses per token, and greedy generation in batches."""

import json

import pytest
import torch
from torch.nn import functional as F

from labkit.alternatives.methods import base_only
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.data.passages import load_austen
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.training.evaluate import chat_prompts, generate, held_out_loss, text_loss
from tests.conftest import make_small_llama


def test_held_out_loss_does_not_depend_on_the_batch_size_and_counts_its_tokens(
    small_llama, tokenizer, records
):
    losses = [held_out_loss(small_llama, tokenizer, records, batch_size=b) for b in (1, 3, 16)]
    expected = sum(len(tokenizer(r["messages"][-1]["content"] + "<|im_end|>")["input_ids"]) for r in records)
    assert [tokens for _, tokens in losses] == [expected] * 3
    assert [loss for loss, _ in losses] == pytest.approx([losses[0][0]] * 3, rel=1e-5)


@pytest.mark.slow
def test_batched_generation_equals_transformers_one_prompt_at_a_time(smollm2):
    model, tokenizer = smollm2
    chats = [
        [{"role": "user", "content": q}]
        for q in ("Hi!", "Count from one to five.", "What is the capital of Peru?")
    ]
    prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    together = generate(model, tokenizer, prompts, max_new_tokens=16, batch_size=3, progress=False)
    for prompt, answer in zip(prompts, together):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=2)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_generation_leaves_the_model_as_it_was_and_refuses_prompts_that_do_not_fit(small_llama, tokenizer):
    small_llama.train()
    generate(small_llama, tokenizer, ["a b c"], max_new_tokens=2, progress=False)
    assert small_llama.training
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        generate(small_llama, tokenizer, ["a", ""], max_new_tokens=2, progress=False)
    with pytest.raises(ValueError, match="1 to 1948 fit"):
        generate(small_llama, tokenizer, ["word " * 2000], max_new_tokens=100, progress=False)


@pytest.mark.parametrize(("add", "config"), [(add_prompt, PromptConfig(30)), (add_prefix, PrefixConfig(30))])
def test_virtual_tokens_take_their_part_of_the_context_and_are_said(add, config, tokenizer):
    model = make_small_llama(max_position_embeddings=64)
    prompts = ["a", "word " * 20]
    longest = len(tokenizer(prompts[1], add_special_tokens=False)["input_ids"])
    assert longest == 21
    generate(model, tokenizer, prompts, max_new_tokens=14, progress=False)
    add(model, config)
    generate(model, tokenizer, prompts, max_new_tokens=64 - 30 - longest, progress=False)  # just fits
    with pytest.raises(ValueError, match=r"prompt 1 .* and 30 virtual tokens before the text, 1 to 20 fit"):
        generate(model, tokenizer, prompts, max_new_tokens=14, progress=False)
    with pytest.raises(ValueError, match="prompt 0 has .* none fits"):
        generate(model, tokenizer, prompts, max_new_tokens=34, progress=False)
    with base_only(model):
        generate(model, tokenizer, prompts, max_new_tokens=14, progress=False)


def test_prompts_end_where_the_assistant_begins(tokenizer):
    ticket = load_tickets("test")[0]
    prompt = chat_prompts([ticket_chat(ticket)], tokenizer)[0]
    assert prompt.endswith("<|im_start|>assistant\n") and ticket["message"] in prompt
    assert json.dumps(ticket["label"], ensure_ascii=False) not in prompt


def test_text_loss_is_torchs_cross_entropy_of_the_text_without_its_end(tiny):
    model, tokenizer = tiny
    records = load_austen("test")[:5]
    total, n = 0.0, 0
    for record in records:
        ids = torch.tensor([0, *tokenizer(record["completion"], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        total += F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
        n += len(ids) - 1
    loss, tokens = text_loss(model, tokenizer, records, batch_size=2)
    assert tokens == n and loss == pytest.approx(total / n, rel=1e-4)
