"""Every family of decoders alike: virtual tokens made from a text are that text, whatever embeds and caches it."""

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers
from labkit.alternatives.methods import method_of
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.formats.alternatives import load_alternative, save_alternative
from tests.alternatives.cases import VOCAB, N, randomize, text

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.1, "vocab_size": VOCAB}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GQA = {"num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},  # calls model.decoder, never model
    "opt, narrow embeddings": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma": GQA,  # scaled embeddings, this and the next two
    "gemma2": GQA | {"sliding_window": 32},
    "gemma3_text": GQA | {"sliding_window": 8},
    "mistral": GQA | {"sliding_window": 8},
    "qwen3": GQA,
    "granite": GQA | {"embedding_multiplier": 12.0},
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi from the mask
    "falcon": {},  # one head of keys and values
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},  # ALiBi from places in the cache
    "gpt_neox": {},
    "qwen3_next": GQA
    | {"num_experts": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    | {"num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"]}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},  # a recurrent state in every other layer
}
WITHOUT_PREFIX = {"qwen3_next": "1 of them keep any"}
PADDING_COUNTS = ("gemma3_text", "mistral", "mpt")  # for a prefix: a window, or places in the cache


def make(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.partition(",")[0], **SIZES | FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer(_, **options):
    return {"input_ids": [11, 42, 5]}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_virtual_tokens_made_from_a_text_are_that_text(family):
    five = torch.tensor([[11, 42, 5, 11, 42]]).expand(3, -1)
    want = make(family)(torch.cat([five, text()], 1)).logits[:, 5:]
    model = add_prompt(make(family), PromptConfig(5, "text", "a"), tokenizer)
    torch.testing.assert_close(model(text()).logits, want, rtol=1e-5, atol=1e-5)
    if family in WITHOUT_PREFIX:
        return
    model = add_prefix(make(family), PrefixConfig(5, None, "text", "a"), tokenizer)
    torch.testing.assert_close(model(text()).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("add", [add_prompt, add_prefix], ids=["prompt", "prefix"])
def test_cache_and_padding_change_no_written_token(family, add):
    if add is add_prefix and family in WITHOUT_PREFIX:
        with pytest.raises(ValueError, match=WITHOUT_PREFIX[family]):
            add_prefix(model := make(family), PrefixConfig(N))
        assert all(p.requires_grad for p in model.parameters()), "nothing is changed"
        return
    config = PromptConfig(N) if add is add_prompt else PrefixConfig(N)
    torch.manual_seed(1)
    model = randomize(add(make(family), config))
    ids, mask, gap = text(2, 6), torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    written = model.generate(input_ids=ids, attention_mask=mask, **options)
    again = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(written, again)
    padded = {"input_ids": torch.cat([gap, ids], 1), "attention_mask": torch.cat([gap, mask], 1)}
    if add is add_prefix and family in PADDING_COUNTS:
        with pytest.raises(ValueError, match="padding on the left stands between a prefix and the text"):
            model.generate(**padded, **options)
    else:
        assert torch.equal(model.generate(**padded, **options)[:, 5:], written)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["opt", "gemma", "gemma3_text", "qwen3", "bloom", "falcon", "gpt_neox"])
@torch.no_grad()
def test_logits_equal_pefts(family):
    common = dict(task_type="CAUSAL_LM")
    virtual = {"num_virtual_tokens": N}
    cases = [(add_prompt, PromptConfig(N, "random"), peft.PromptTuningConfig(**common, **virtual))]
    if family != "falcon":  # PEFT's prefix has the heads of the queries there, which do not fit
        cases.append((add_prefix, PrefixConfig(N), peft.PrefixTuningConfig(**common, **virtual)))
    for add, config, theirs in cases:
        ours, other = randomize(add(make(family), config)), peft.get_peft_model(make(family), theirs).eval()
        tokens = method_of(ours).tokens
        own = tokens.embedding if add is add_prompt else tokens.prefix
        other.prompt_encoder["default"].embedding.weight.copy_(own)
        logits = other(input_ids=text()).logits[:, -9:]
        torch.testing.assert_close(ours(text()).logits, logits, rtol=1e-5, atol=1e-5)

    ours = randomize(add_ia3(make(family)))
    config = method_of(ours).config
    names = dict(
        target_modules=[*config.outputs, *config.inputs], feedforward_modules=[*config.inputs], **common
    )
    other = peft.get_peft_model(make(family), peft.IA3Config(**names)).eval()
    modules = dict(other.get_base_model().named_modules())
    for name, layer in ia3_layers(ours).items():
        modules[name].ia3_l["default"].copy_(layer.vector.view_as(modules[name].ia3_l["default"]))
    torch.testing.assert_close(ours(text()).logits, other(input_ids=text()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "mamba", "rwkv"])
def test_a_model_before_whose_text_nothing_can_stand_is_refused_and_unchanged(kind):
    from transformers import AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, vocab_size=VOCAB, hidden_size=64, d_kv=16, d_ff=96, num_layers=2)
    make_it = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    config.num_hidden_layers = 2
    model = make_it.from_config(config)
    for add, method in ((add_prompt, PromptConfig(N)), (add_prefix, PrefixConfig(N))):
        with pytest.raises(ValueError, match=r"use LoRA"):
            add(model, method)
    assert all(p.requires_grad for p in model.parameters()) and method_of(model) is None


class Attention(nn.Module):
    """PyTorch's attention reads the weight of `out_proj` and multiplies by itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(["out_proj"], []), ([], ["linear2"]), (["linear1"], ["out_proj"])]
)
@pytest.mark.parametrize("training", [True, False])
def test_who_reads_a_weight_finds_the_factors_in_it(outputs, inputs, training):
    torch.manual_seed(0)
    model, x = Attention().train(training), torch.randn(2, 5, 32)
    before = model(x)
    randomize(add_ia3(model, IA3Config(outputs, inputs)))
    reference = Attention().train(training)
    plain = dict(reference.named_modules())
    reference.load_state_dict(Attention().state_dict())
    for name, own in reference.named_parameters():
        module, _, last = name.rpartition(".")
        layer = ia3_layers(model).get(module)
        source = model.get_submodule(module) if layer is None else layer.base
        own.data = getattr(source, last).data.clone()
    for name, layer in ia3_layers(model).items():
        own, factors = plain[name], layer.vector.data
        own.weight.data *= factors[None, :] if layer.on_input else factors[:, None]
        if not layer.on_input:
            own.bias.data *= factors
    torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), before, atol=1e-3)
    if training:
        (model(x) * x.flip(0)).sum().backward()
        assert all(layer.vector.grad.abs().max() > 1e-5 for layer in ia3_layers(model).values())


@pytest.mark.parametrize("family", ["opt, narrow embeddings", "falcon", "gemma3_text"])
@pytest.mark.parametrize(("add", "config"), [(add_prompt, PromptConfig(N)), (add_prefix, PrefixConfig(N))])
@torch.no_grad()
def test_what_is_saved_loads_with_the_shape_that_the_family_has(tmp_path, family, add, config):
    model = randomize(add(make(family), config))
    folder = save_alternative(model, tmp_path / "a")
    assert torch.equal(load_alternative(make(family), folder)(text()).logits, model(text()).logits)
    if (family, add) != ("opt, narrow embeddings", add_prompt):  # which PEFT does not run at all
        theirs = peft.PeftModel.from_pretrained(make(family), folder).eval()
        torch.testing.assert_close(
            theirs(input_ids=text()).logits[:, -9:], model(text()).logits, rtol=1e-5, atol=1e-5
        )
