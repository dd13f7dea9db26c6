"""A method that does nothing is an error in the first pass; in wrappers, copies and casts it works on."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.cost import cost
from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers, merge_ia3, unmerge_ia3
from labkit.alternatives.methods import base_only, method_of, remove
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.analysis.subspace import add_subspace
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from tests.alternatives import cases
from tests.alternatives.cases import ALL, VOCAB, llama, text, with_method


def passes_by(model, *modules):
    """Let the model compute by other modules than those that stand in it, as a fused kernel does."""
    originals = {module: copy.deepcopy(model.get_submodule(module)) for module in modules}

    class Beside(nn.Module):
        def __init__(self, holder, child):
            super().__init__()
            self.held, self.instead = holder, [originals[child]]

        def forward(self, *args, **kwargs):
            return self.instead[0](*args, **kwargs)

    for module in modules:
        parent, _, child = module.rpartition(".")
        holder = model.get_submodule(module)
        setattr(model.get_submodule(parent), child, Beside(holder, module))
    return model


@pytest.mark.parametrize(
    ("add", "config", "what"),
    [
        (add_ia3, IA3Config(["k_proj", "v_proj"], ["down_proj"]), "every down_proj"),
        (add_bottleneck, BottleneckConfig(4), "every mlp"),
    ],
    ids=["ia3", "bottleneck"],
)
def test_a_layer_that_the_model_passes_by_is_an_error_in_the_first_pass(add, config, what):
    model = llama()
    for i in range(2):
        passes_by(model, f"model.layers.{i}.mlp")
    if add is add_bottleneck:  # the block calls a copy, not the sub-layer that was found
        model = add(llama(), config)
        for i in range(2):
            passes_by(model, f"model.layers.{i}.mlp")
            model.model.layers[i].mlp.instead = [model.model.layers[i].mlp.held.base]
    else:
        add(model, config)
    with pytest.raises(
        ValueError, match=f"has no effect on LlamaForCausalLM: .* went by {what}.*remove\\(model\\)"
    ):
        model(text())


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_that_no_decoder_takes_in_are_an_error_in_the_first_pass(name):
    model = with_method(llama, name)
    twin = llama().model
    model.model.forward = lambda *args, **kwargs: twin(input_ids=text())  # whatever it is given
    with pytest.raises(ValueError, match="has no effect on LlamaForCausalLM: .* the 5 virtual tokens"):
        model(text())


def test_experts_that_a_text_does_not_reach_are_no_error():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, num_local_experts=4, **sizes)).eval()
    assert add_ia3(model, IA3Config(["k_proj"], []))(text()).logits.isfinite().all()
    added = method_of(llama_with := add_ia3(llama()))
    llama_with.model.layers[1].forward = lambda hidden_states, **_: hidden_states  # skipped, as a router may
    assert llama_with(text()).logits.isfinite().all() and added.seen_at_work


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ia3", "prompt", "prefix", "serial"])
def test_a_method_works_inside_torch_compile_and_outside(name):
    def llama():
        return cases.llama(num_hidden_layers=1)

    model = with_method(llama, name)
    with torch.no_grad():
        want = model(text()).logits
        compiled = torch.compile(with_method(llama, name), backend="eager")
        torch.testing.assert_close(compiled(text()).logits, want, rtol=1e-5, atol=1e-5)
        added_inside = ALL[name][0](torch.compile(llama(), backend="eager"), ALL[name][1])
        assert method_of(added_inside) is method_of(added_inside._orig_mod)
        for own, other in zip(
            (p for p in added_inside.parameters() if p.requires_grad),
            (p for p in model.parameters() if p.requires_grad),
            strict=True,
        ):
            own.copy_(other)
        torch.testing.assert_close(added_inside(text()).logits, want, rtol=1e-5, atol=1e-5)
        assert cost(added_inside) == cost(model)
        with base_only(added_inside):
            torch.testing.assert_close(
                added_inside(text()).logits, llama()(text()).logits, rtol=1e-5, atol=1e-5
            )
        assert torch.equal(remove(added_inside)._orig_mod(text()).logits, llama()(text()).logits)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_pickled_model_computes_the_same_and_is_independent(name):
    model, file = with_method(llama, name), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(text()).logits, model(text()).logits)
    assert torch.equal(remove(again)(text()).logits, llama()(text()).logits)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_cast_reaches_all_of_it_whatever_is_put_aside(name):
    model = with_method(llama, name)
    with base_only(model):
        model.bfloat16()
        assert model(text()).logits.dtype == torch.bfloat16
    assert model(text()).logits.dtype == torch.bfloat16
    model.double()
    assert model(text()).logits.dtype == torch.float64


@torch.no_grad()
def test_what_a_merge_keeps_aside_moves_and_is_cast_with_the_model():
    model = merge_ia3(with_method(llama, "ia3")).bfloat16()
    assert all(layer.base_before_merge.weight.dtype == torch.bfloat16 for layer in ia3_layers(model).values())
    want = with_method(lambda: llama().bfloat16(), "ia3")
    unmerge_ia3(model)
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.base.weight, want.model.layers[0].mlp.down_proj.base.weight
    )
    assert model(text()).logits.dtype == torch.bfloat16
    merge_ia3(model).to("meta")
    assert unmerge_ia3(model).model.layers[0].mlp.down_proj.base.weight.is_meta


@pytest.mark.parametrize("name", ["ia3", "serial"])
@torch.no_grad()
def test_a_base_that_changed_while_the_method_was_off_stays_changed(name):
    model = with_method(llama, name)
    want = llama()
    quantize_model(want, progress=False)
    with base_only(model):
        for path, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and path != "lm_head":
                model.set_submodule(path, QuantLinear.from_linear(layer))
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    with base_only(model):
        assert torch.equal(model(text()).logits, want(text()).logits)


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_other_code_adapts_is_refused_and_unchanged(name):
    import peft

    add, config = ALL[name]
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has PEFT's adapters already, so"):
        add(theirs, config)
    assert sum(p.requires_grad for p in theirs.parameters()) == 4
    moved = add_subspace(llama(), 8, seed=0)
    with pytest.raises(ValueError, match="has a parametrization already, so"):
        add(moved, config)
    assert sum(p.requires_grad for p in moved.parameters()) == 1


def test_settings_are_json_and_say_which_method_it_is():
    import json

    seen = [method_of(with_method(llama, name)).settings for name in ALL]
    assert json.loads(json.dumps(seen)) == seen
    assert [s["method"] for s in seen] == ["IA3", "Prompt", "Prefix", "Prefix", "Bottleneck", "Bottleneck"]
    assert seen[0]["outputs"] == ["k_proj", "v_proj"] and seen[4]["form"] == "serial"


def test_a_start_from_words_goes_through_whatever_the_embedding_layer_does():
    class Odd(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids).clamp(-0.05, 0.05) + 0.25

    model = llama()
    odd = Odd(VOCAB, 64, padding_idx=7, max_norm=0.3)
    model.set_input_embeddings(odd)
    want = odd(torch.tensor([11, 42, 7])).detach()
    add_prompt(model, PromptConfig(3, "text", "a"), lambda _, **options: {"input_ids": [11, 42, 7]})
    assert torch.equal(model.virtual_tokens.embedding, want)
    assert not torch.equal(want, odd.weight[[11, 42, 7]])


def test_an_input_per_token_that_a_soft_prompt_lacks_is_named():
    from tests.alternatives.cases import gpt2

    model = with_method(gpt2, "prompt")
    with pytest.raises(ValueError, match="no token_type_ids to put before"):
        model(text(), token_type_ids=torch.zeros_like(text()))


def test_a_prefix_longer_than_a_window_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, sliding_window=8
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 8
    with pytest.raises(ValueError, match="length=8: some layers .* look back over 8 tokens"):
        add_prefix(MistralForCausalLM(config), PrefixConfig(8))
