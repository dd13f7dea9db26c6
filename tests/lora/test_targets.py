"""Where adapters go: ranks per layer, Conv1D, embeddings, tied weights, the output layer, modules to save."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unload, unmerge
from labkit.lora.targets import matching_layers
from labkit.models.surgery import untie_embeddings
from labkit.quant.model import quantize_model
from tests.lora.cases import (
    IDS,
    logits,
    make_gpt2,
    make_model,
    randomize,
)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("down_proj", {"down_proj"}),
        (r".*layers\.[01]\.self_attn\.k_proj", {"k_proj"}),
    ],
)
def test_targets_choose_layers_and_never_the_output(small_llama, targets, expected):
    names = matching_layers(small_llama, targets)
    assert {name.rpartition(".")[2] for name in names} == expected
    assert len(names) == (2 if "layers" in targets else 3 * len(expected))


def test_mistyped_target_suggests_the_nearest_and_changes_nothing(small_llama):
    with pytest.raises(
        ValueError, match=r"matches no linear layer of LlamaForCausalLM; did you mean 'q_proj'\?"
    ):
        add_lora(small_llama, LoRAConfig(targets=["q_porj"]))
    assert all(p.requires_grad for p in small_llama.parameters())


def untied(**changes):
    return make_model(tie_word_embeddings=False, **changes)


def test_ranks_and_alphas_per_module_are_those_of_peft():
    patterns = {
        "rank_pattern": {"down_proj": 8, r"layers\.1\.self_attn\..*": 2, "self_attn.v_proj": 6},
        "alpha_pattern": {r"layers\.0\..*": 3, "q_proj": 5},
    }
    ours = add_lora(make_model(), LoRAConfig(r=4, alpha=12, **patterns))
    theirs = get_peft_model(
        make_model(), PeftConfig(r=4, lora_alpha=12, target_modules="all-linear", **patterns)
    )
    modules = dict(theirs.get_base_model().named_modules())
    layers = lora_layers(ours)
    assert {layer.r for layer in layers.values()} == {2, 4, 6, 8}
    for name, layer in layers.items():
        assert (layer.r, layer.scaling) == (modules[name].r["default"], modules[name].scaling["default"]), (
            name
        )


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"pattern 'dwon_proj' matches none of the 14 layers"):
        add_lora(make_model(), LoRAConfig(r=4, rank_pattern={"dwon_proj": 8}))
    with pytest.raises(ValueError, match="down_proj=0: the rank"):
        LoRAConfig(rank_pattern={"down_proj": 0})
    with pytest.raises(ValueError, match="r=65 is above 64"):
        add_lora(make_model(), LoRAConfig(r=4, rank_pattern={"down_proj": 65}))


def gradients_equal(ours, theirs, parts):
    results = []
    for model in (ours, theirs):
        out = model(input_ids=IDS).logits
        results.append(out)
        out.square().mean().backward()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for a, b in parts:
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_adapted_embedding_equals_peft(family):
    def make():
        if family == "llama":
            return untied()
        torch.manual_seed(0)  # its embedding multiplies what it looks up
        sizes = {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "head_dim": 16,
        }
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, **heads, tie_word_embeddings=False, pad_token_id=0)
        ).eval()

    ours = randomize(add_lora(make(), LoRAConfig(r=4, alpha=12, targets=["embed_tokens", "q_proj"])))
    theirs = get_peft_model(
        make(), PeftConfig(r=4, lora_alpha=12, target_modules=["embed_tokens", "q_proj"])
    ).eval()
    modules, parts = dict(theirs.get_base_model().named_modules()), []
    for name, layer in lora_layers(ours).items():
        them = modules[name]
        if "embed" in name:
            pairs = [
                (layer.lora_A, them.lora_embedding_A["default"]),
                (layer.lora_B, them.lora_embedding_B["default"]),
            ]
        else:
            pairs = [
                (layer.lora_A, them.lora_A["default"].weight),
                (layer.lora_B, them.lora_B["default"].weight),
            ]
        for a, b in pairs:
            b.data.copy_(a.data)
        parts += pairs
    gradients_equal(ours, theirs, parts)
    before = logits(ours)
    torch.testing.assert_close(logits(merge(ours)), before, rtol=1e-4, atol=2e-5)
    assert torch.equal(logits(unmerge(ours)), before)


def test_an_embedding_starts_as_it_was():
    assert torch.equal(
        logits(add_lora(untied(), LoRAConfig(r=4, targets=["embed_tokens"]))), logits(untied())
    )


def test_conv1d_is_adapted_by_its_own_width():
    layers = lora_layers(add_lora(make_gpt2(), LoRAConfig(r=4, targets=["c_attn"])))
    layer = layers["transformer.h.0.attn.c_attn"]
    assert (layer.in_features, layer.out_features) == (64, 192)
    assert layer.lora_A.shape == (4, 64) and layer.delta().shape == (192, 64)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_tied_weights_are_refused_until_they_are_untied(name):
    model = make_model(tie_word_embeddings=True)
    before = logits(model)
    with pytest.raises(ValueError, match=r"share one weight.*untie_embeddings"):
        add_lora(model, LoRAConfig(r=4, targets=[name]))
    with pytest.raises(ValueError, match=r"shares its weight.*untie_embeddings"):
        add_lora(model, LoRAConfig(r=4, modules_to_save=[name]))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    total = trainable(model).total
    untie_embeddings(model)
    assert trainable(model).total == total + 128 * 64 and torch.equal(logits(model), before)
    add_lora(model, LoRAConfig(r=4, targets=[name]))
    randomize(model)
    merged = logits(merge(model))
    torch.testing.assert_close(merged, logits(unmerge(model)), rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="nothing to untie"):
        untie_embeddings(model)


def test_an_expression_that_takes_in_the_output_layer_is_refused_and_a_name_is_not():
    model = untied()
    with pytest.raises(ValueError, match=r"also matches lm_head, the output layer.*all-linear"):
        add_lora(model, LoRAConfig(r=4, targets=".*"))
    assert "lm_head" not in matching_layers(model, "all-linear")
    assert matching_layers(model, ["lm_head"]) == ["lm_head"]
    add_lora(model, LoRAConfig(r=4, targets=["lm_head", "q_proj"]))
    model(IDS, labels=IDS).loss.backward()
    assert lora_layers(model)["lm_head"].lora_B.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["input_layernorm"], r"LlamaRMSNorm.*modules_to_save=\['input_layernorm'\]"),
        (["mlp"], "LlamaMLP"),
        (["proj"], "matches no linear layer of LlamaForCausalLM"),
        ("(", "not a regular expression"),
        (r".*nothing.*", "matches no linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_named(targets, message):
    with pytest.raises(ValueError, match=message):
        matching_layers(make_model(), targets)


def test_modules_to_save_train_a_copy_and_are_left_out_of_the_targets():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    model.score = nn.Linear(16, 4)
    model.forward = lambda x: model.score(model[1](model[0](x)))
    head = model.score
    add_lora(model, LoRAConfig(r=2, modules_to_save=["score"]))
    assert list(lora_layers(model)) == ["0"] and type(model.score) is nn.Linear and model.score is not head
    assert trainable(model).trainable == 2 * (8 + 16) + 16 * 4 + 4
    model(torch.randn(3, 8)).square().sum().backward()
    assert model.score.weight.grad.abs().max() > 0 and head.weight.grad is None


@pytest.mark.parametrize(
    ("name", "message"), [("scroe", "matches no module"), ("act_fn", "no weight that could train")]
)
def test_modules_to_save_that_cannot_train_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        add_lora(make_model(), LoRAConfig(r=2, modules_to_save=[name]))


def test_a_quantized_module_cannot_train_in_full():
    model = make_model()
    quantize_model(model, progress=False)
    with pytest.raises(ValueError, match=r"skip=\('down_proj',\)"):
        add_lora(model, LoRAConfig(r=2, targets="attention", modules_to_save=["down_proj"]))


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Named(nn.Linear):
    """As Falcon's linear layer: a forward pass of its own that is W x + b."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.router, self.gain = Named(8, 8), Router(8, 4), Tripled(8, 8)

    def forward(self, x):
        return self.router(self.gain(self.up(x)))[1]


def test_a_linear_layer_that_computes_more_than_its_weight_says_is_passed_by_and_told():
    with pytest.warns(UserWarning, match=r"2 x subclass of linear \(432 bytes: router, …\)"):
        model = add_lora(Mixed(), LoRAConfig(r=2))
    assert list(lora_layers(model)) == ["up"]
    x = torch.randn(3, 8)
    torch.nn.init.normal_(model.up.lora_B)
    before = model(x)
    torch.testing.assert_close(merge(model)(x), before)
    for name, kind in (("router", "Router"), ("gain", "Tripled")):
        with pytest.raises(
            ValueError, match=rf"{name} is a {kind}, .*not W x \+ b.*modules_to_save=\['{name}'\]"
        ):
            add_lora(Mixed(), LoRAConfig(r=2, targets=[name]))


def test_falcon_is_adapted_where_peft_adapts_it():
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    names = list(lora_layers(add_lora(FalconForCausalLM(config), LoRAConfig(r=2))))
    theirs = get_peft_model(FalconForCausalLM(config), PeftConfig(r=2, target_modules="all-linear"))
    assert names == [n for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")]


def test_a_weight_that_is_computed_is_adapted_and_neither_merged_nor_split():
    model = nn.Sequential(nn.Linear(8, 8), torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    add_lora(model, LoRAConfig(r=2))
    torch.nn.init.normal_(model[1].lora_B)
    x = torch.randn(3, 8)
    before = model(x)
    torch.testing.assert_close(
        nn.functional.linear(model[0](x), model[1].weight, model[1].bias), before, rtol=1e-5, atol=1e-5
    )
    for call in (merge, unload):
        with pytest.raises(ValueError, match="the weight of 1 is computed at each call"):
            call(model)
        assert torch.equal(model(x), before) and not model[0].is_merged
    with pytest.raises(ValueError, match="splits the weight of 1, which is computed"):
        add_lora(unload(model, merged=False), LoRAConfig(r=2, init="pissa"))


def test_a_weight_in_one_byte_is_a_packed_one_whatever_its_dtype():
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    add_lora(model, LoRAConfig(r=2))
    assert model[0].lora_A.dtype == torch.float32
    with pytest.raises(ValueError, match="cannot take up a small correction"):
        merge(model)


@pytest.mark.parametrize(
    ("make", "config", "error", "message"),
    [
        (lambda: nn.Linear(8, 8), {}, ValueError, "the model itself is a Linear.*nn.Sequential"),
        (lambda: nn.Sequential(nn.LazyLinear(8)), {}, ValueError, "0 has no weight yet"),
        (
            lambda: with_nan(nn.Sequential(nn.Linear(8, 8))),
            {"init": "pissa"},
            ValueError,
            "weight of 0, which holds NaN",
        ),
        (lambda: (make_model(), None), {}, TypeError, "model is a tuple.*model, tokenizer = models.load"),
        (lambda: "tiny-llama", {}, TypeError, "model is a str, and must be a PyTorch module"),
    ],
)
def test_what_is_no_model_or_no_layer_yet_is_named(make, config, error, message):
    with pytest.raises(error, match=message):
        add_lora(make(), LoRAConfig(r=2, **config))


def with_nan(model):
    model[0].weight.data[0, 0] = float("nan")
    return model


def test_a_configuration_must_be_one_and_a_name_a_name():
    with pytest.raises(TypeError, match=r"config is a dict.*LoRAConfig\(\*\*config\)"):
        add_lora(make_model(), {"r": 2})
    model = make_model()
    for name in ("a.b", "", None):
        with pytest.raises(ValueError, match="a name without dots"):
            add_lora(model, LoRAConfig(r=2), name)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
