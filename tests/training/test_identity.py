"""Which run is this: every part that decides its numbers counts and is named with both values; nothing else
does.
"""

import json
import re

import pytest
import torch

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.ia3 import IA3Config, add_ia3
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.analysis.subspace import add_subspace
from labkit.data.encoding import Encoded
from labkit.models.surgery import untie_embeddings
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig
from labkit.training.identity import differences, identity_of, identity_of_model, in_words
from tests.training.small_runs import tiny_adapted, tiny_llama

EXAMPLES = [Encoded([1, 2], [3]), Encoded([4], [5, 6])]


def recorded(identity):
    """As a file gives it back."""
    return json.loads(json.dumps(identity))


def between(one, other):
    return differences(recorded(identity_of_model(one)), identity_of_model(other))


@pytest.mark.parametrize(
    "make",
    [
        tiny_adapted,
        lambda: tiny_llama().requires_grad_(True),
        lambda: add_prompt(tiny_llama(), PromptConfig(3)),
        lambda: add_prefix(tiny_llama(), PrefixConfig(3, projection=8)),
        lambda: add_ia3(tiny_llama()),
        lambda: add_bottleneck(tiny_llama(), BottleneckConfig(4)),
        lambda: add_subspace(tiny_llama(), 8, seed=1),
    ],
)
def test_a_run_is_the_same_run_whatever_its_trained_parameters_are_by_now(make):
    """Made again; and while it trains: a forward pass, a step, another mode."""
    model, again = make(), make()
    before = recorded(identity_of_model(model))
    model.train()(input_ids=torch.arange(8)[None]).logits.sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    assert (
        differences(before, identity_of_model(model)) == differences(before, identity_of_model(again)) == []
    )


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (lambda: tiny_adapted(alpha=16), lambda: tiny_adapted(alpha=128), "adapter alpha 16 there, 128 here"),
        (tiny_adapted, lambda: tiny_adapted(dropout=0.5), "adapter dropout 0.0 there, 0.5 here"),
        (tiny_adapted, lambda: tiny_adapted(variant="dora"), "adapter variant lora there, dora here"),
        (tiny_adapted, lambda: tiny_adapted(init="gaussian"), "adapter init default there, gaussian here"),
        (tiny_adapted, lambda: tiny_adapted(init="pissa"), "base values"),
        (tiny_adapted, lambda: tiny_adapted({"seed": 1}), "base values"),
        (tiny_adapted, lambda: tiny_adapted().bfloat16(), "base dtypes float32 there, bfloat16 here"),
        (tiny_adapted, lambda: tiny_adapted({"attention_dropout": 0.1}), "config attention_dropout 0.0 there, 0.1 here"),
        (tiny_adapted, lambda: tiny_adapted({"rms_norm_eps": 1e-5}), "config rms_norm_eps 1e-06 there, 1e-05 here"),
        (tiny_adapted, lambda: tiny_adapted({"attn_implementation": "eager"}), "config attention sdpa there, eager here"),
        (
            lambda: add_prompt(tiny_llama(), PromptConfig(3)),
            lambda: add_prompt(tiny_llama(), PromptConfig(4)),
            "adapter length 3 there, 4 here",
        ),
        (
            lambda: add_prompt(tiny_llama(), PromptConfig(3)),
            lambda: add_prefix(tiny_llama(), PrefixConfig(3)),
            "adapter method Prompt there, Prefix here",
        ),
        (
            lambda: add_prefix(tiny_llama(), PrefixConfig(3)),
            lambda: add_prefix(tiny_llama(), PrefixConfig(3, projection=8)),
            "adapter projection None there, 8 here",
        ),
        (
            lambda: add_bottleneck(tiny_llama(), BottleneckConfig(4)),
            lambda: add_bottleneck(tiny_llama(), BottleneckConfig(4, scale=4.0)),
            "adapter scale 1.0 there, 4.0 here",
        ),
        (
            lambda: add_bottleneck(tiny_llama(), BottleneckConfig(4)),
            lambda: add_bottleneck(tiny_llama(), BottleneckConfig(4, form="parallel")),
            "adapter form serial there, parallel here",
        ),
        (
            lambda: add_ia3(tiny_llama(), IA3Config(["k_proj"], ["down_proj"])),
            lambda: add_ia3(tiny_llama(), IA3Config(["k_proj", "down_proj"], [])),
            r"adapter outputs \['k_proj'\] there, \['k_proj', 'down_proj'\] here",
        ),
        (tiny_adapted, lambda: tiny_llama().requires_grad_(True), "adapter method LoRA there, none here"),
        (lambda: add_subspace(tiny_llama(), 8, 0), lambda: add_subspace(tiny_llama(), 8, 1), "base values"),
    ],
)  # fmt: skip
def test_what_decides_the_numbers_of_a_run_is_named_with_both_values(one, other, said):
    assert any(re.fullmatch(said, words) for words in between(one(), other()))


def test_a_base_in_four_bits_is_another_one_and_so_is_one_of_other_blocks():
    def in_four_bits(**settings):
        model = tiny_llama()
        quantize_model(model, progress=False, **settings)
        return model

    name = r"model.layers.*.self_attn.q_proj"
    assert f"class of {name} Linear there, QuantLinear here" in between(tiny_llama(), in_four_bits())
    assert f"blocksize of {name} 64 there, 128 here" in between(in_four_bits(), in_four_bits(blocksize=128))
    assert f"codebook of {name} nf4 there, fp4 here" in between(in_four_bits(), in_four_bits(codebook="fp4"))


def test_a_number_that_was_changed_by_hand_in_one_module_is_seen():
    model = tiny_adapted()
    model.model.layers[1].self_attn.q_proj.dropout.p = 0.5
    (words,) = between(tiny_adapted(), model)
    assert words == "p of model.layers.*.self_attn.q_proj.dropout 0.0 there, [0.0, 0.5] here"


def test_the_same_base_is_the_same_tied_or_untied_compiled_or_not_loaded_from_here_or_there():
    tied = tiny_adapted({"tie_word_embeddings": True})
    untied = tiny_llama(tie_word_embeddings=True)
    untied = tiny_adapted({"tie_word_embeddings": True})
    untie_embeddings(untied)
    assert between(tied, untied) == []
    assert between(tied, torch.compile(tied, backend="eager")) == []
    tied.config.name_or_path, tied.name_or_path = "here", "there"
    tied.config.use_cache, tied.config.eos_token_id = False, 5
    assert between(untied, tied) == []


def test_settings_and_data_are_parts_and_those_that_change_no_number_are_not():
    def identity(examples=EXAMPLES, held_out=(), **settings):
        settings = {"lr": 0.01, "steps": 3, "eval_every": 1} | settings
        return recorded(identity_of(tiny_llama(), TrainConfig(**settings), examples, 3, held_out))

    here = identity()
    assert differences(here, identity(lr=0.1)) == ["lr 0.01 there, 0.1 here"]
    assert differences(here, identity(EXAMPLES[:1])) == ["data"]
    assert differences(here, identity(held_out=EXAMPLES)) == ["held_out"]
    assert differences(here, identity(eval_every=None)) == ["eval_every 1 there, None here", "held_out"]
    with torch.autocast("cpu", torch.bfloat16):
        assert differences(here, identity()) == ["autocast None there, torch.bfloat16 here"]
    free = {"checkpoint_folder": "x", "checkpoint_every": 3, "progress": False, "state_budget_bytes": 9}
    assert differences(here, identity(**free)) == []


def test_an_identity_of_version_0_1_0_is_compared_by_the_parts_that_it_has():
    now = recorded(identity_of(tiny_llama(), TrainConfig(steps=3), EXAMPLES, 3))
    before = {
        key: now[key] for key in now.keys() - {"held_out", "autocast", "base", "adapter", "config", "modules"}
    }
    assert differences(before, now) == []
    assert differences({k: v for k, v in before.items() if k != "lr"}, now) == ["lr None there, 0.001 here"]


def test_a_value_that_only_one_version_of_a_library_knows_is_no_difference_and_a_module_is():
    now = recorded(identity_of_model(tiny_llama()))
    older = recorded(now)
    del older["config"]["rms_norm_eps"], older["modules"]["model"]["vocab_size"]
    assert differences(older, now) == []
    del older["modules"]["lm_head"]
    assert differences(older, now) == ["no module lm_head there, one here"]
    assert differences(now, older) == ["a module lm_head there, none here"]


def test_a_message_shows_the_first_differences_and_counts_the_rest():
    assert in_words(list("abcd")) == "a; b; c; d" and in_words(list("abcdef")) == "a; b; c; d; and 2 more"
