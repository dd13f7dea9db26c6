"""GGUF files: the weights, logits and tokens that transformers reads from them, or that they were written from."""

import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from labkit import models
from labkit.models.gguf import convert, read_gguf
from tests.models.small_gguf import NUMBERS, TEXT, WORDS, make_llama, merges_of, train_bpe, write_gguf

NAME = "smollm2-135m"
IDS = torch.arange(240).view(2, 120)
THETA = {"rope_theta": 10000.0}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def reference():
    """The same GGUF through transformers' own reader: half a minute, and not our code."""
    return AutoModelForCausalLM.from_pretrained(
        models.fetch(NAME), gguf_file="source.gguf", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def reference_tokenizer():
    """Its tokenizer through transformers' own reader."""
    return AutoTokenizer.from_pretrained(models.fetch(NAME), gguf_file="source.gguf")


@pytest.mark.slow
def test_weights_equal_transformers_own_gguf_reader_bit_for_bit(smollm2, reference):
    ours, theirs = smollm2[0].state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_logits_and_generated_tokens_equal_transformers_own_gguf_reader(smollm2, reference):
    (model, tokenizer), other = smollm2, reference
    chat = [{"role": "user", "content": "Name three rivers of Europe, with their lengths in km."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 2}
        assert torch.equal(model.generate(ids, **options), other.generate(ids, **options))


@pytest.mark.parametrize(
    "text", ["Hello, world!", "order 48213, 3 pieces", "  two  spaces\n\ttab", "Größe 42½ — naïve 日本", ""]
)
def test_tokenizer_equals_transformers_own_gguf_reader(tokenizer, reference_tokenizer, text):
    assert tokenizer(text)["input_ids"] == reference_tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token_of_its_own_as_smollm_was_trained(tokenizer):
    assert tokenizer.tokenize("2048") == ["2", "0", "4", "8"]


def test_chat_template_marks_the_turns(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], tokenize=False
    )
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"


# small files, against the model that they were written from


def read_back(folder, *arguments, **written):
    """(model, tokenizer) of a file written to `folder` and converted."""
    convert(write_gguf(folder / "small.gguf", *arguments, **written), folder / "out")
    model = LlamaForCausalLM.from_pretrained(folder / "out")
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
)
def test_logits_are_those_of_the_model_that_was_written(tmp_path, changes):
    model = make_llama(**changes)
    keys = {"llama.attention.key_length": model.config.head_dim}
    assert torch.equal(read_back(tmp_path, model, changes=keys)[0](IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("scaling", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),  # llama.cpp takes it for linear
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True},
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
            {"type": "yarn", "factor": 2.0, "original_context_length": 128, "yarn_beta_fast": 16.0},
        ),
    ],
)
def test_scaled_positions_give_the_logits_of_the_model_that_was_written(tmp_path, scaling, keys):
    model = make_llama(rope_parameters=THETA | scaling)
    changes = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    want = model(IDS).logits
    assert (make_llama()(IDS).logits - want).abs().max() > 0.1, "the scaling must show"
    assert torch.equal(read_back(tmp_path, model, changes=changes)[0](IDS).logits, want)


def test_a_scaling_of_none_or_of_factor_one_changes_nothing(tmp_path):
    want = make_llama()(IDS).logits
    for keys in ({"type": "none", "factor": 4.0}, {"type": "linear", "factor": 1.0}, {"finetuned": False}):
        changes = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
        assert torch.equal(read_back(tmp_path, changes=changes)[0](IDS).logits, want)


def test_a_divisor_for_each_frequency_gives_the_logits_of_llama_3_1(tmp_path):
    model = make_llama(rope_parameters=THETA | LLAMA_3_1)
    divisors = make_llama().model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert divisors.max() == 8 and divisors.min() == 1
    again, _ = read_back(tmp_path, model, tensors={"rope_freqs.weight": divisors.numpy()})
    with torch.no_grad():
        want = model(IDS).logits
        assert (make_llama()(IDS).logits - want).abs().max() > 0.1, "the scaling must show"
        torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["attn_v", "attn_q", "attn_output", "ffn_up"])
def test_a_bias_that_only_some_layers_have_is_zero_in_the_others(tmp_path, part):
    model = make_llama()
    width = 96 if part == "ffn_up" else 32 if part == "attn_v" else 64
    bias = torch.linspace(-1, 1, width)
    biased = make_llama(attention_bias="attn" in part, mlp_bias="ffn" in part)
    biased.load_state_dict(model.state_dict(), strict=False)
    for name, p in biased.named_parameters():
        if name.endswith(".bias"):
            p.data.zero_()
    layer = biased.model.layers[1]
    own = {"attn_v": layer.self_attn.v_proj, "attn_q": layer.self_attn.q_proj}
    own |= {"attn_output": layer.self_attn.o_proj, "ffn_up": layer.mlp.up_proj}
    own[part].bias.data.copy_(bias)
    written = bias.numpy()
    if part == "attn_q":  # llama.cpp's converter puts the bias of q and k in the order of their rows
        written = written.reshape(4, 2, 8).swapaxes(1, 2).reshape(64)
    again, _ = read_back(tmp_path, model, tensors={f"blk.1.{part}.bias": written})
    want = biased(IDS).logits
    assert (model(IDS).logits - want).abs().max() > 0.1 and torch.equal(again(IDS).logits, want)


@pytest.mark.parametrize(
    "numbers",
    [NUMBERS.F16, NUMBERS.BF16, NUMBERS.Q8_0, NUMBERS.Q4_0, NUMBERS.Q4_1, NUMBERS.Q5_0, NUMBERS.Q5_1],
)
def test_each_type_of_numbers_is_read_as_transformers_reads_it(tmp_path, numbers):
    write_gguf(tmp_path / "small.gguf", numbers=numbers)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    ours = read_gguf(tmp_path / "small.gguf").tensors
    assert ours.keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours[name], weight), name
    assert not torch.equal(ours["lm_head.weight"], make_llama().lm_head.weight)


# tokenizers

DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])
LLAMA_3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
TEXTS = (*TEXT, "order 48213, 3 pieces", "  two  spaces\n\ttab", "DON'T we'll", "")


@pytest.mark.parametrize(("name", "words"), [("gpt-2", WORDS), ("smollm", DIGITS), ("llama-bpe", LLAMA_3)])
def test_texts_are_cut_as_the_file_names_it(tmp_path, name, words):
    bpe, other = train_bpe(), train_bpe()
    bpe.pre_tokenizer = words
    other.pre_tokenizer = {"gpt-2": DIGITS, "smollm": LLAMA_3, "llama-bpe": WORDS}[name]
    changes = {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False}
    tokenizer = read_back(tmp_path, None, bpe, changes=changes)[1]
    for text in TEXTS:
        assert tokenizer(text).input_ids == bpe.encode(text).ids, text
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert any(other.encode(text).ids != bpe.encode(text).ids for text in TEXTS), "the cut must show"


def test_tokens_of_llama_3_are_those_of_transformers_own_reader(tmp_path):
    changes = {"tokenizer.ggml.pre": "llama-bpe"}
    tokenizer = read_back(tmp_path, None, train_bpe(), changes=changes)[1]
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")
    for text in TEXTS:
        assert (
            tokenizer(text, add_special_tokens=False).input_ids
            == theirs(text, add_special_tokens=False).input_ids
        )
        assert tokenizer(text).input_ids == [1, *theirs(text, add_special_tokens=False).input_ids]


def test_user_defined_tokens_stay_whole_and_are_kept_in_the_text(tmp_path):
    bpe = train_bpe()
    tokens = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    tokens[390] = "<think>"
    merges = [
        " ".join(merge) for merge in merges_of(bpe) if bpe.id_to_token(390) not in (*merge, "".join(merge))
    ]
    kinds = [3] * 4 + [1] * 396
    kinds[390] = 4
    changes = {
        "tokens": tokens,
        "merges": merges,
        "token_type": kinds,
        "pre": "llama-bpe",
        "add_bos_token": False,
    }
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    tokenizer = read_back(tmp_path, None, bpe, changes=changes)[1]
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")
    ids = tokenizer("a<think>42</think></s>").input_ids
    assert 390 in ids and ids == theirs("a<think>42</think></s>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>42</think>"


@pytest.mark.parametrize(("begin", "end"), [(True, False), (False, True), (True, True), (None, None)])
def test_texts_get_the_marks_that_the_file_says(tmp_path, begin, end):
    changes = {"tokenizer.ggml.add_bos_token": begin, "tokenizer.ggml.add_eos_token": end}
    tokenizer = read_back(tmp_path, changes=changes)[1]
    want = train_bpe().encode("a text").ids
    assert tokenizer("a text").input_ids == [1] * bool(begin) + want + [2] * bool(end)
    assert tokenizer("a", "text").input_ids.count(1) == 2 * bool(begin)


def test_generation_ends_at_each_of_the_ends_that_the_file_names(tmp_path):
    model, _ = read_back(
        tmp_path, changes={"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    )
    assert model.generation_config.eos_token_id == [2, 7]
    assert read_back(tmp_path)[0].generation_config.eos_token_id == 2


# what is left out, and what is refused


@pytest.mark.parametrize(
    "key",
    [
        "llama.attention.head_count_kv",
        "llama.rope.freq_base",
        "llama.rope.dimension_count",
        "llama.vocab_size",
        "tokenizer.chat_template",
        "tokenizer.ggml.token_type",
        *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "unknown", "padding")),
    ],
)
def test_a_key_that_may_be_left_out_is_what_llama_cpp_takes_it_for(tmp_path, key):
    model = make_llama(num_key_value_heads=4)
    again, tokenizer = read_back(tmp_path, model, changes={key: None})
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert tokenizer("a text").input_ids == train_bpe().encode("a text").ids
    for word in ("bos", "eos", "pad"):
        absent = key == f"tokenizer.ggml.{'padding' if word == 'pad' else word}_token_id"
        assert (getattr(again.config, f"{word}_token_id") is None) == absent
        assert (getattr(tokenizer, f"{word}_token") is None) == absent


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    ],
)
def test_a_key_that_must_be_there_is_named(tmp_path, key):
    with pytest.raises(ValueError, match=f"small.gguf cannot be read: it has no '{key}'"):
        read_gguf(write_gguf(tmp_path / "small.gguf", changes={key: None}))


REFUSED_KEYS = [
    ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type='longrope' is not known"),
    ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor=1.5: a factor on the attention"),
    ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "sets llama.rope.scaling.yarn_log_multiplier"),
    ({"llama.rope.dimension_count": 8}, "dimension_count=8: positions in a part of each head"),
    ({"llama.attention.value_length": 8}, "value_length=8: keys and values of different sizes"),
    ({"llama.attention.sliding_window": 64}, "sets llama.attention.sliding_window"),
    ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv=\[2, 1\] must be a whole number"),
    ({"llama.block_count": 0}, "llama.block_count=0 must be a whole number of at least 1"),
    ({"llama.block_count": 3}, "it lacks model.layers.2"),
    ({"llama.block_count": 1}, "no place for model.layers.1"),
    ({"llama.feed_forward_length": 32}, "gives another shape to model.layers.0.mlp.down_proj.weight"),
    ({"llama.vocab_size": 401}, "another shape to lm_head.weight, model.embed_tokens.weight"),
    ({"llama.expert_count": 8}, "expert_count=8: a mixture of experts"),
    ({"llama.logit_scale": 0.5}, "sets llama.logit_scale, of which this reader does not know the meaning"),
    ({"general.type": "adapter"}, "general.type='adapter': only a whole model"),
    ({"split.count": 2}, "split.count=2: it is one of several files"),
    ({"tokenizer.ggml.model": "llama"}, "kind 'llama'; only 'gpt2' .byte-level BPE. can be read"),
    (
        {"tokenizer.ggml.pre": "tekken"},
        "tokenizer.ggml.pre='tekken' says; known are gpt-2, smollm, llama-bpe",
    ),
    ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre=None says; known are"),
    ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix=True: a space before every text"),
    ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "sets tokenizer.ggml.precompiled_charsmap"),
    ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "its tokenizer has a token twice"),
    ({"tokenizer.ggml.merges": ["no such"]}, "its merges do not fit its tokens"),
    ({"tokenizer.ggml.bos_token_id": 400}, "not all are among its 400 tokens"),
    (
        {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
        "does not say which that is",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_KEYS)
def test_what_is_not_understood_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"small.gguf cannot be read: .*{message}"):
        read_gguf(write_gguf(tmp_path / "small.gguf", changes=changes))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.attn_norm.weight": None}, "it lacks model.layers.0.input_layernorm.weight"),
        ({"blk.0.attn_norm.bias": np.ones(64, "f")}, "no place for model.layers.0.input_layernorm.bias"),
        (
            {"blk.0.attn_sinks.weight": np.ones(4, "f")},
            "tensor 'blk.0.attn_sinks.weight', for which Llama has no place",
        ),
        ({"output.bias": np.ones(400, "f")}, "tensor 'output.bias', for which Llama has no place"),
        ({"output_norm.weight": np.ones(32, "f")}, "gives another shape to model.norm.weight"),
        (
            {"output_norm.weight": np.full(64, np.nan, "f")},
            "output_norm.weight holds numbers that are infinite",
        ),
        ({"blk.0.attn_q.bias": np.ones(32, "f")}, "another shape to model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_tensors_that_are_not_the_model_s_are_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        read_gguf(write_gguf(tmp_path / "small.gguf", tensors=tensors))


def test_positions_scaled_twice_are_refused(tmp_path):
    changes = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    tensors = {"rope_freqs.weight": np.ones(8, "f")}
    with pytest.raises(ValueError, match="scales positions twice, by rope_freqs.weight and as 'yarn'"):
        read_gguf(write_gguf(tmp_path / "small.gguf", changes=changes, tensors=tensors))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "llama4"])
def test_another_architecture_is_refused(tmp_path, architecture):
    with pytest.raises(ValueError, match=f"holds a '{architecture}' model; only 'llama' can be read"):
        convert(write_gguf(tmp_path / "other.gguf", architecture=architecture), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 3, 100, 20_000, 300_000])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = write_gguf(tmp_path / "small.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="small.gguf is not a readable GGUF file"):
        read_gguf(path)
