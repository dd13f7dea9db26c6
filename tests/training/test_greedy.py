"""Greedy generation: a plain loop over argmax, whatever a generation_config says, and it stops as training teaches."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from labkit.data.encoding import encode
from labkit.training import evaluate
from labkit.training.config import TrainConfig
from labkit.training.evaluate import chat_prompts, generate
from labkit.training.greedy import stops_of, with_generation_config
from labkit.training.loop import train
from tests.conftest import make_small_llama
from tests.data.tokenizers import CHATS, FAMILIES, chat, tiny_llama

PROMPTS = ["There was a number of rows and a number of", "The king", "def __init__(self, name):\n    self."]
SETTINGS = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 5.0, "top_k": 3},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
    {"suppress_tokens": list(range(200, 400)), "begin_suppress_tokens": list(range(400, 4096))},
    {"bad_words_ids": [[i] for i in range(250, 300)]},
    {"sequence_bias": [[[300], 50.0]]},
    {"min_length": 500},
    {"min_new_tokens": 400, "max_new_tokens": 500},
    {"max_length": 3},
    {"max_time": 1e-9},
    {"stop_strings": ["e"]},
    {"exponential_decay_length_penalty": (1, 9.0)},
    {"guidance_scale": 3.0},
    {"return_dict_in_generate": True, "output_scores": True},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 3},
    {"eos_token_id": list(range(200, 1000))},
    {"pad_token_id": 999_999},
    {"custom_entry": "from a newer version"},
]


def plain(model, tokenizer, prompt: str, limit: int) -> str:
    """The oracle: token by token, without a cache, without padding."""
    ids, new = tokenizer(prompt)["input_ids"], []
    while len(new) < limit:
        with torch.no_grad():
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def expected(tiny):
    return [plain(*tiny, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_each_token_is_the_argmax_whatever_the_generation_config_says(tiny, expected, monkeypatch, settings):
    model, tokenizer = tiny
    config = GenerationConfig(**{"eos_token_id": 0, "pad_token_id": 1} | settings)
    before = config.to_dict()
    monkeypatch.setattr(model, "generation_config", config)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=10, progress=False) == expected
    assert model.generation_config is config and config.to_dict() == before


def test_a_generation_config_is_put_back_after_an_error_and_in_every_wrapper(tiny):
    _, tokenizer = tiny
    model = get_peft_model(make_small_llama(vocab_size=4096), LoraConfig(r=2, task_type="CAUSAL_LM"))
    holders = with_generation_config(model)
    before = [holder.generation_config for holder in holders]
    before[0].repetition_penalty = 1.5
    generate(model, tokenizer, ["a"], max_new_tokens=2, progress=False)
    assert [holder.generation_config for holder in holders] == before

    def stop(*_):
        raise RuntimeError("stop")

    handle = model.base_model.model.model.norm.register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, tokenizer, ["a"], max_new_tokens=2, progress=False)
    handle.remove()
    assert all(holder.generation_config is config for holder, config in zip(holders, before))


class Rehearsed(torch.nn.Module):
    """Makes a model say given tokens, one after the other, whatever the prompt: a hook on its output layer."""

    def __init__(self, model, tokens: list[int]):
        super().__init__()
        self.model, self.tokens, self.said = model, tokens, 0
        evaluate._causal.add(model)  # what a model is asked once, it has been
        evaluate._needs_solitude[model] = False
        model.get_output_embeddings().register_forward_hook(self.say)

    def say(self, _, __, logits):
        logits = torch.zeros_like(logits)
        logits[:, -1, self.tokens[min(self.said, len(self.tokens) - 1)]] = 9.0
        self.said += 1
        return logits


@pytest.mark.parametrize("name", CHATS)
def test_an_answer_ends_at_the_mark_that_encoding_supervises(name):
    tokenizer = CHATS[name]()
    record = chat("2+2?", "It is 4.")
    learned = encode(record, tokenizer).completion
    more = tokenizer(" and so on and so on", add_special_tokens=False)["input_ids"]
    model = make_small_llama(vocab_size=len(tokenizer), eos_token_id=5, bos_token_id=0)
    rehearsed = Rehearsed(model, learned + more)
    assert generate(model, tokenizer, chat_prompts([record], tokenizer), 40, progress=False) == ["It is 4."]
    assert rehearsed.said <= len(learned)  # and it was not written for longer than that


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_answer_ends_at_the_mark_that_encoding_supervises(name):
    tokenizer = FAMILIES[name]()
    record = {"prompt": "a\n", "completion": "yes no"}
    model = make_small_llama(vocab_size=len(tokenizer), eos_token_id=5, bos_token_id=0)
    rehearsed = Rehearsed(model, [*encode(record, tokenizer).completion, 5, 6, 7])
    assert generate(model, tokenizer, [record["prompt"]], 40, progress=False) == ["yes no"]
    assert rehearsed.said <= len(encode(record, tokenizer).completion)


def test_special_tokens_that_the_config_names_end_an_answer_too_and_ordinary_ones_do_not():
    tokenizer = tiny_llama("<|eom|>")
    model = make_small_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [4096, 300]
    assert stops_of(model, tokenizer).ids == {tokenizer.eos_token_id, 4096}
    model.generation_config.eos_token_id = None
    assert stops_of(model, tokenizer).ids == {tokenizer.eos_token_id}


def test_a_model_that_learned_its_chats_says_them_and_stops():
    """A base model's generation_config stops at <|endoftext|>; what was taught is <|im_end|>."""
    tokenizer = CHATS["chatml"]()
    torch.manual_seed(0)
    model = make_small_llama(vocab_size=len(tokenizer), num_hidden_layers=2, eos_token_id=0, bos_token_id=0)
    chats = [chat(q, a) for q, a in (("one", "1"), ("two", "2"), ("six", "6"), ("ten", "10"))]
    config = TrainConfig(lr=5e-3, steps=60, batch_size=4, progress=False)
    assert train(model, tokenizer, chats, config).losses[-1] < 0.1
    say = partial(
        generate, model, tokenizer, chat_prompts(chats, tokenizer), max_new_tokens=12, progress=False
    )
    assert say() == ["1", "2", "6", "10"]
    assert model.generation_config.eos_token_id == 0


def rwkv():
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=4096, hidden_size=64, num_hidden_layers=2, intermediate_size=64)
    )


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=4096, hidden_size=64, state_size=8, num_hidden_layers=2))


def roberta():
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    return RobertaForCausalLM(
        RobertaConfig(vocab_size=4096, is_decoder=True, max_position_embeddings=64, **sizes)
    )


def loud(model):
    """With weights so large that its tokens differ."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "alone"), [(rwkv, True), (mamba, False), (partial(make_small_llama, vocab_size=4096), False)]
)
def test_prompts_share_a_batch_only_where_the_model_writes_the_same_in_company(tiny, make, alone):
    model, tokenizer, prompts = loud(make()), tiny[1], [*PROMPTS, "The king", "def f(a):"]
    said = generate(model, tokenizer, prompts, max_new_tokens=6, progress=False)
    assert said == [plain(model, tokenizer, prompt, 6) for prompt in prompts]
    assert evaluate._needs_solitude[model] is alone


def test_a_model_that_generates_otherwise_than_it_is_trained_is_refused():
    """transformers' generate counts RoBERTa's positions from 0, its forward pass from 2."""
    with pytest.raises(ValueError, match="does not compute with RobertaForCausalLM what training does"):
        generate(loud(roberta()), tiny_llama(), ["The king of the land"], max_new_tokens=2, progress=False)


def test_logits_that_are_not_finite_give_no_answer():
    model = make_small_llama(vocab_size=4096)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="the logits of LlamaForCausalLM are not finite"):
        generate(model, tiny_llama(), ["a"], max_new_tokens=2, progress=False)


def test_wrappers_generate_what_their_model_does(tiny):
    model, tokenizer = make_small_llama(vocab_size=4096), tiny[1]
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=4, progress=False)
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert generate(wrapped, tokenizer, PROMPTS, max_new_tokens=4, progress=False) == answers
