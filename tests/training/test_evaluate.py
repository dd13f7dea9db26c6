"""Measuring: losses per token, and greedy generation in batches."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from labkit.alternatives.methods import base_only
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.data.encoding import Encoded, encode
from labkit.data.passages import load_austen
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.training.evaluate import (
    chat_prompts,
    generate,
    held_out_loss,
    loss_of_examples,
    text_after,
    text_loss,
)
from tests.conftest import make_small_llama
from tests.data.tokenizers import CHATS, chat, llama2_without_bytes, tiny_llama, word_piece


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


def test_text_loss_leaves_out_the_mark_of_a_chat_template_too():
    tokenizer, record = CHATS["chatml"](), chat("2+2?", "It is 4.")
    model = make_small_llama(vocab_size=len(tokenizer))
    one = encode(record, tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([one.prompt + one.completion])).logits[0, len(one.prompt) - 1 : -1]
    each = F.cross_entropy(logits, torch.tensor(one.completion), reduction="none")
    loss, tokens = text_loss(model, tokenizer, [record])
    assert tokens == len(one.completion) - 1 and loss == pytest.approx(each[:-1].mean().item(), rel=1e-5)
    assert held_out_loss(model, tokenizer, [record])[0] == pytest.approx(each.mean().item(), rel=1e-5)


def test_records_above_max_length_are_left_out_of_the_loss_and_told():
    tokenizer, model = tiny_llama(), make_small_llama(vocab_size=4096)
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "word " * 30, "completion": "b"}
    for measure in (held_out_loss, text_loss):
        with pytest.warns(
            UserWarning, match=r"2 of 3 records are longer than max_length=20 .* of the loss: \[0, 2\]"
        ):
            assert measure(model, tokenizer, [long, short, long], max_length=20) == measure(
                model, tokenizer, [short]
            )


def bert():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertForMaskedLM(BertConfig(vocab_size=4096, **sizes)).eval()


def t5():
    sizes = dict(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(vocab_size=4096, **sizes)).eval()


@pytest.mark.parametrize(("make", "message"), [(bert, "is not causal"), (t5, "has an encoder and a decoder")])
def test_what_is_no_causal_model_is_not_measured(make, message):
    model, tokenizer, records = make(), tiny_llama(), [{"prompt": "two and two is", "completion": " four"}]
    for attempt in (
        lambda: held_out_loss(model, tokenizer, records),
        lambda: text_loss(model, tokenizer, records),
        lambda: generate(model, tokenizer, ["two and two is"], progress=False),
    ):
        for _ in range(2):  # also the second time
            with pytest.raises(ValueError, match=message):
                attempt()


def test_ids_and_positions_that_the_model_lacks_are_refused_before_anything_is_computed():
    tokenizer = tiny_llama("<|new|>")
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=4096, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    long, new = {"prompt": "word " * 40, "completion": "x"}, {"prompt": "a", "completion": "<|new|>"}
    with pytest.raises(ValueError, match="record 1 has 43 tokens, and GPT2LMHeadModel has 32 positions"):
        held_out_loss(model, tokenizer, [new | {"completion": "b"}, long])
    with pytest.raises(
        ValueError, match="record 0 has the token id 4096, and GPT2LMHeadModel has ids 0 to 4095"
    ):
        held_out_loss(model, tokenizer, [new])
    with pytest.raises(ValueError, match="prompt 0 has the token id 4096"):
        generate(model, tokenizer, ["<|new|>"], max_new_tokens=2, progress=False)
    with pytest.raises(ValueError, match="prompt 1 has 41 tokens; with max_new_tokens=2, 1 to 30 fit"):
        generate(model, tokenizer, ["a", long["prompt"]], max_new_tokens=2, progress=False)


def test_padding_that_the_model_has_no_row_for_changes_nothing():
    """A tokenizer that was given [PAD] without a resize: what is padded is never read."""
    model, prompts = make_small_llama(vocab_size=4096), ["a", "a longer prompt"]
    records = [{"prompt": prompt, "completion": " b"} for prompt in prompts]
    plain, added = tiny_llama(), tiny_llama(pad_token="[PAD]")
    assert held_out_loss(model, added, records) == held_out_loss(model, plain, records)
    answers = [generate(model, t, prompts, max_new_tokens=3, progress=False) for t in (plain, added)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": "a text"},
            r"prompts='a text' must be a list of texts; .* a single prompt goes into a list",
        ),
        (
            {"prompts": [chat("a", "b")]},
            r"must be a list of texts; of chat records, chat_prompts\(records, tokenizer\)",
        ),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
        ({"prompts": ["a"], "batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
    ],
)
def test_what_is_no_prompt_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(make_small_llama(vocab_size=4096), tiny_llama(), **{"progress": False} | changes)
    assert generate(make_small_llama(vocab_size=4096), tiny_llama(), [], progress=False) == []


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], r"record 0 is no chat: it has \['completion', 'prompt'\]"),
        ([chat("a", "b"), {"messages": []}], "record 1: 'messages' must be a list"),
        ("chats.jsonl", "records='chats.jsonl' is a text"),
    ],
)
def test_what_is_no_chat_has_no_prompt(records, message):
    with pytest.raises(ValueError, match=message):
        chat_prompts(records, CHATS["chatml"]())


def test_each_module_keeps_its_own_mode_also_after_an_error():
    model, tokenizer = make_small_llama(vocab_size=4096).train(), tiny_llama()
    model.model.layers[1].eval()  # a part that its owner keeps out of training
    modes = [module.training for module in model.modules()]
    record = {"prompt": "a", "completion": " b"}
    generate(model, tokenizer, ["a"], max_new_tokens=2, progress=False)
    held_out_loss(model, tokenizer, [record])
    assert [module.training for module in model.modules()] == modes

    def stop(*_):
        raise RuntimeError("stop")

    model.model.norm.register_forward_hook(stop)
    for attempt in (
        lambda: held_out_loss(model, tokenizer, [record]),
        lambda: generate(model, tokenizer, ["a"], max_new_tokens=2, progress=False),
    ):
        with pytest.raises(RuntimeError, match="stop"):
            attempt()
        assert [module.training for module in model.modules()] == modes


def test_a_mean_over_no_token_is_an_error(small_llama):
    with pytest.raises(ValueError, match="none of the 2 examples has a supervised token"):
        loss_of_examples(small_llama, [Encoded([1], []), Encoded([], [2])], 0, 2)


@pytest.mark.parametrize(
    ("make", "prompt", "completion"), [(word_piece, "play", "ing"), (llama2_without_bytes, "Answer:", " yes")]
)
def test_an_answer_reads_as_it_does_behind_its_prompt(make, prompt, completion):
    tokenizer = make()
    one = encode({"prompt": prompt, "completion": completion}, tokenizer)
    assert text_after(one.prompt, one.without_end().completion, tokenizer) == completion
