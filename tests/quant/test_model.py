"""A whole model in four bits and back: which layers, what is left as it was, and how much memory it takes."""

import copy
import os
import subprocess
import sys

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from labkit.alternatives.bottleneck import BottleneckConfig, add_bottleneck
from labkit.alternatives.ia3 import IA3Config, add_ia3, merge_ia3
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.lora.layer import LoRALinear
from labkit.lora.merging import merge, unmerge
from labkit.lora.qlora import add_qlora
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model
from tests.conftest import make_small_llama
from tests.quant.cases import (
    IDS,
    assert_same_bits,
)


@pytest.mark.parametrize(
    ("spoil", "settings", "error", "message"),
    [
        (
            lambda last: last.weight.data[3, 5].fill_(torch.nan),
            {},
            ValueError,
            "^1: 1 of 2048 weights are NaN",
        ),
        (
            lambda last: last.weight.data[3, 5].fill_(-torch.inf),
            {},
            ValueError,
            "^1: 1 of 2048 weights are NaN",
        ),
        (lambda last: last.double(), {}, TypeError, "^1: a weight must be a float32.* not torch.float64"),
        (lambda last: None, {"codebook": "nf5"}, ValueError, "codebook='nf5' is not known"),
        (lambda last: None, {"blocksize": 64.0}, ValueError, "blocksize=64.0 is not known; choose one of"),
        (lambda last: None, {"scale_rounding": "up"}, ValueError, "scale_rounding='up' is not known"),
        (lambda last: None, {"compute_dtype": torch.int8}, ValueError, "is not a floating dtype"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_left_as_it_was(spoil, settings, error, message):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    spoil(model[1])
    before, random = copy.deepcopy(model), torch.get_rng_state()
    with pytest.raises(error, match=message):
        quantize_model(model, progress=False, **settings)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(type(layer) is nn.Linear for layer in model)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert now.requires_grad and torch.equal(now.nan_to_num(), then.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizing_a_model_takes_no_random_numbers(dtype):
    model, random = nn.Sequential(nn.Linear(64, 64)).to(dtype), torch.get_rng_state()
    quantize_model(model, progress=False)
    assert torch.equal(torch.get_rng_state(), random)


def test_model_is_quantized_but_for_output_and_embedding(small_llama):
    before = sum(p.nbytes for n, p in small_llama.named_parameters() if "layers" in n and "norm" not in n)
    report = quantize_model(small_llama, progress=False)
    assert len(report) == 21 and isinstance(small_llama.lm_head, nn.Linear)
    assert report.before == before
    assert report.after == sum(m.weight.nbytes for m in small_llama.modules() if isinstance(m, QuantLinear))
    assert small_llama.lm_head.weight is small_llama.model.embed_tokens.weight
    assert not any(p.requires_grad for p in small_llama.parameters())
    assert "total" in str(report)


def test_dequantized_model_computes_the_same(small_llama):
    quantize_model(small_llama, progress=False)
    with torch.no_grad():
        quantized = small_llama(IDS).logits
        torch.testing.assert_close(dequantize_model(small_llama)(IDS).logits, quantized, rtol=1e-5, atol=1e-6)


def test_skip_leaves_layers_alone(small_llama):
    quantize_model(small_llama, skip=("down_proj", "layers.0.self_attn.q_proj"), progress=False)
    left = [n for n, m in small_llama.named_modules() if isinstance(m, nn.Linear)]
    assert left == [
        "model.layers.0.self_attn.q_proj", *(f"model.layers.{i}.mlp.down_proj" for i in range(3)), "lm_head"
    ]  # fmt: skip


def test_skip_takes_one_name_too(small_llama):
    report = quantize_model(small_llama, skip="down_proj", progress=False)
    assert report and not any("down_proj" in name for name in report)


def test_mistakes_are_named(small_llama):
    with pytest.raises(ValueError, match="skip='down_porj' matches no linear layer"):
        quantize_model(small_llama, skip=("down_porj",), progress=False)
    quantize_model(small_llama, progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(small_llama, progress=False)
    with pytest.raises(TypeError, match="takes an nn.Linear"):
        QuantLinear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="compute_dtype=torch.int8 is not a floating dtype"):
        QuantLinear.from_linear(nn.Linear(4, 4), compute_dtype=torch.int8)


def test_generates_inside_transformers(small_llama):
    quantize_model(small_llama, progress=False)
    dense = dequantize_model(copy.deepcopy(small_llama))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small_llama.generate(IDS, **options), dense.generate(IDS, **options))


def test_real_model_takes_4_13_bits_a_weight(smollm2):
    model = copy.deepcopy(smollm2[0])
    report = quantize_model(model, progress=False)
    weights = report.before / 4
    assert weights == 106_168_320
    assert 8 * report.after / weights == pytest.approx(4.127, abs=0.005)


def test_a_quantized_model_goes_through_safetensors(tmp_path, small_llama):
    quantize_model(small_llama, progress=False)
    other = make_small_llama(seed=1)
    quantize_model(other, progress=False)
    save_model(small_llama, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(IDS).logits, small_llama(IDS).logits)


STREAMING = """
import sys, torch
from pathlib import Path
from torch import nn
from labkit.quant.model import quantize_model

def status(key):
    return 1024 * int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

quantize_model(nn.Sequential(nn.Linear(64, 64)), progress=False)  # kernels are loaded
model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(20)])  # 16 MiB each
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
before = status("VmRSS")
quantize_model(model, progress=False)
print(status("VmHWM") - before, before - status("VmRSS"))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's record of the peak")
def test_quantizing_a_model_takes_at_most_one_layer_more_and_gives_the_rest_back():
    done = subprocess.run([sys.executable, "-c", STREAMING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    above, freed = map(int, done.stdout.split())
    layer = 2048 * 2048 * 4
    assert above <= layer, f"{above / layer:.2f} layers above the model"
    assert freed >= 0.8 * 20 * layer, f"only {freed / layer:.2f} of 20 layers were given back"


MAPPED = """
import gc
from pathlib import Path
from labkit import models
from labkit.quant.model import quantize_model

model, _ = models.load("smollm2-135m")
quantize_model(model, progress=False)
gc.collect()
print(sum("model.safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's list of mapped files")
def test_a_quantized_model_does_not_hold_on_to_the_file_that_it_came_from(smollm2):
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-1] == "0", done.stderr


def every_byte(model):
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def make_mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=100, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def make_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=32)).eval()


def test_the_report_covers_the_whole_model_and_names_in_bytes_what_was_not_reached():
    model = make_mixtral()
    whole = every_byte(model)
    with pytest.warns(
        UserWarning, match=r"cannot reach 91% of the bytes .*2 x fused experts \(1,572,864 bytes: model"
    ):
        report = quantize_model(model, progress=False)
    assert (report.model_before, report.model_after) == (whole, every_byte(model))
    assert whole - every_byte(model) == report.before - report.after
    left = {layer.name: layer.nbytes for layer in report.left}
    rest = [b for name, b in model.named_buffers() if "rotary" in name]  # no weights
    assert sum(left.values()) + report.before == whole - sum(b.nbytes for b in rest)
    assert left["model.layers.0.mlp.experts"] == sum(
        p.nbytes for p in model.model.layers[0].mlp.experts.parameters()
    )
    for said in (
        "whole model",
        "2 x fused experts (1,572,864 bytes",
        "1 x output layer (25,600 bytes: lm_head)",
    ):
        assert said in str(report)


def test_a_model_that_is_reached_gives_no_warning(small_llama, recwarn):
    quantize_model(small_llama, skip="down_proj", progress=False)
    assert not [w for w in recwarn if "cannot reach" in str(w.message)]


def test_conv1d_is_quantized_as_bitsandbytes_quantizes_its_transposed_weight():
    model, dense = make_gpt2(), make_gpt2()
    report = quantize_model(model, progress=False)
    assert len(report) == 8 and not isinstance(model.lm_head, QuantLinear)
    for name in report:
        layer = model.get_submodule(name)
        weight = dense.get_submodule(name).weight.detach().T.contiguous()
        packed, _ = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=64)
        assert_same_bits(layer.packed, packed)
        dense.get_submodule(name).weight.data = layer.weight.dequantize().T
        assert layer.weight.error(weight)["relative_norm"] < 0.12
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            dequantize_model(model)(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5
        )


class Wrapper(nn.Module):
    """What a library puts around a model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: Wrapper(Wrapper(m))],
)
def test_the_output_layer_keeps_its_precision_in_any_wrapper(wrap):
    plain, wrapped = make_small_llama(tie_word_embeddings=False), make_small_llama(tie_word_embeddings=False)
    report = quantize_model(wrap(wrapped), progress=False)
    assert len(report) == len(quantize_model(plain, progress=False)) and type(wrapped.lm_head) is nn.Linear
    with torch.no_grad():
        assert torch.equal(wrapped(IDS).logits, plain(IDS).logits)


def test_a_layer_in_two_places_is_one_4_bit_layer_in_both_and_tied_weights_stay_one():
    torch.manual_seed(0)
    layer, other = nn.Linear(64, 64), nn.Linear(64, 64)
    other.weight = layer.weight
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Sequential(layer), "tied": other})
    report = quantize_model(model, progress=False)
    assert model["a"] is model["b"] is model["c"][0] and isinstance(model["a"], QuantLinear)
    assert model["tied"].packed is model["a"].packed and list(report) == ["a", "tied"]
    dequantize_model(model)
    assert model["a"] is model["b"] is model["c"][0] and type(model["a"]) is nn.Linear


def test_a_layer_tied_to_an_embedding_keeps_its_precision():
    embedding, head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "body": nn.Linear(64, 64), "head": head})
    assert list(quantize_model(model, progress=False)) == ["body"] and head.weight is embedding.weight


class Router(nn.Linear):
    """A linear layer whose forward pass is another, as in some mixtures of experts."""

    def forward(self, x):
        return super().forward(x).softmax(-1), x


def with_forward_of_its_own():
    layer = nn.Linear(64, 64)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)  # as libraries do that move layers about
    return layer


@pytest.mark.filterwarnings("ignore:quantize_model cannot reach")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Router(64, 64),
        with_forward_of_its_own,
        lambda: parametrizations.weight_norm(nn.Linear(64, 64)),
        lambda: parametrizations.spectral_norm(nn.Linear(64, 64)),
        lambda: prune.l1_unstructured(nn.Linear(64, 64), "weight", 10),
        lambda: nn.Bilinear(64, 64, 64),
        lambda: nn.Conv1d(64, 64, 3),
    ],
    ids=["router", "own forward", "weight norm", "spectral norm", "pruned", "bilinear", "convolution"],
)
def test_a_layer_that_is_more_than_a_linear_layer_is_left_and_reported(make):
    layer = make()
    model = nn.Sequential(nn.Linear(64, 64), layer)
    before = copy.deepcopy(layer.state_dict())
    report = quantize_model(model, progress=False)
    assert list(report) == ["0"] and model[1] is layer and layer in [left.module for left in report.left]
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_hooks_of_a_layer_go_on_and_their_handles_still_remove_them():
    layer = nn.Linear(64, 64)
    handles = [
        layer.register_forward_hook(lambda module, args, out: out * 0),
        layer.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True),
    ]
    seen = []
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out))
    model = nn.Sequential(layer)
    quantize_model(model, progress=False)
    x = torch.ones(1, 64, requires_grad=True)
    assert not model(x).any()
    handles[0].remove()
    assert model(x).any()
    model(x).sum().backward()
    assert len(seen) == 1


def test_a_layer_by_itself_and_one_without_a_shape_are_refused():
    with pytest.raises(ValueError, match="nothing to quantize in Linear"):
        quantize_model(nn.Linear(64, 64), progress=False)
    with pytest.raises(ValueError, match="1: the weight has no shape yet; run the model once"):
        quantize_model(nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(64)), progress=False)


def shake(model):
    """Weights of the adapter that make a difference."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


ADAPTERS = {
    "LoRA": lambda m: add_lora(m, LoRAConfig(r=4)),
    "rsLoRA on some": lambda m: add_lora(
        m, LoRAConfig(r=4, variant="rslora", targets=["q_proj", "down_proj"])
    ),
    "with a head in full": lambda m: add_lora(
        m, LoRAConfig(r=4, targets=["q_proj"], modules_to_save=("o_proj",))
    ),
    "bottleneck": lambda m: add_bottleneck(m, BottleneckConfig(size=8)),
    "parallel bottleneck": lambda m: add_bottleneck(
        m, BottleneckConfig(size=8, form="parallel", where=("mlp",))
    ),
    "IA3": lambda m: add_ia3(m, IA3Config()),
    "prompt": lambda m: add_prompt(m, PromptConfig(4)),
    "prefix": lambda m: add_prefix(m, PrefixConfig(4)),
}


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["plain", "compiled"]
)
@pytest.mark.parametrize("method", ADAPTERS)
def test_quantizing_after_an_adapter_equals_the_other_order_and_it_trains_on(method, wrap):
    add = ADAPTERS[method]
    skip = ("o_proj",) if method == "with a head in full" else ()
    after, before = make_small_llama(), make_small_llama()
    torch.manual_seed(1)
    shake(add(after))
    trains = {name: p.clone() for name, p in after.named_parameters() if p.requires_grad}
    report = quantize_model(wrap(after), progress=False)
    quantize_model(before, skip=skip, progress=False)
    torch.manual_seed(1)
    shake(add(before))
    assert trains.keys() == {name for name, p in after.named_parameters() if p.requires_grad} != set()
    assert all(torch.equal(p, trains[name]) for name, p in after.named_parameters() if p.requires_grad)
    assert len(report) == 21 - 3 * len(skip)
    logits = [m(IDS).logits for m in (after, before)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    for y in logits:
        y.pow(2).mean().backward()
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (after, before)]
    assert any(g.any() for g in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["lora", "rslora", "ia3", "two adapters"])
def test_adapters_of_peft_stay_as_they_are_over_a_base_that_is_quantized_under_them(kind, frozen):
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = (
        peft.IA3Config(feedforward_modules=["down_proj"], **settings)
        if kind == "ia3"
        else peft.LoraConfig(r=4, use_rslora=kind == "rslora", **settings)
    )
    model = shake(peft.get_peft_model(make_small_llama(), config))
    if kind == "two adapters":
        model.add_adapter("other", config)
    if frozen:
        model.requires_grad_(False)
    flags = {
        name: p.requires_grad for name, p in model.named_parameters() if "lora_" in name or "ia3_" in name
    }
    values = {name: p.clone() for name, p in model.named_parameters() if name in flags}
    dense = copy.deepcopy(model)
    report = quantize_model(model, progress=False)
    assert len(report) == 21 and report["model.layers.0.self_attn.q_proj"]
    now = dict(model.named_parameters())
    assert all(
        now[name].requires_grad == flag and torch.equal(now[name], values[name])
        for name, flag in flags.items()
    )
    for name, layer in dense.named_modules():  # the oracle: PEFT over the dequantized weights
        if type(layer) is nn.Linear and isinstance(model.get_submodule(name), QuantLinear):
            layer.weight.data = model.get_submodule(name).weight.dequantize()
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


class Beside(nn.Module):
    """An adapter that no library knows."""

    def __init__(self, base):
        super().__init__()
        self.of_the_base, self.down, self.up = (
            base,
            nn.Linear(64, 4, bias=False),
            nn.Linear(4, 64, bias=False),
        )

    def forward(self, x):
        return self.of_the_base(x) + self.up(self.down(x))


def test_an_adapter_that_nobody_knows_is_known_by_its_frozen_base():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    model[0] = Beside(model[0])
    report = quantize_model(model, progress=False)
    assert list(report) == ["0.of_the_base", "1"] and model[0].down.weight.requires_grad
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.down.weight",
        "0.up.weight",
    ]
    with pytest.raises(ValueError, match="the weights of its linear layers train; call model.requires_grad_"):
        quantize_model(model, progress=False)


def test_an_adapter_in_the_weights_or_one_that_keeps_them_is_refused_and_nothing_changes():
    merged = merge(shake(add_lora(make_small_llama(), LoRAConfig(r=4))))
    split = add_lora(make_small_llama(), LoRAConfig(r=4, init="pissa"))
    multiplied = merge_ia3(shake(add_ia3(make_small_llama(), IA3Config())))
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    of_peft = shake(peft.get_peft_model(make_small_llama(), peft.LoraConfig(**settings)))
    of_peft.merge_adapter()
    dora = peft.get_peft_model(make_small_llama(), peft.LoraConfig(use_dora=True, **settings))
    for model, message in (
        (merged, "an adapter is merged into the weights of LlamaForCausalLM.*unmerge it first"),
        (split, r"the adapter 'default' \(init='pissa'\) has split the full weights.*call add_qlora"),
        (multiplied, "an adapter is merged into the weights"),
        (of_peft, "an adapter is merged into the weights of LlamaForCausalLM"),
        (dora, "PEFT's DoRA cannot read the 4-bit weights of other libraries; load the adapter with"),
    ):
        before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            quantize_model(model, progress=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert flags == [p.requires_grad for p in model.parameters()]
        assert not any(isinstance(m, QuantLinear) for m in model.modules())
    assert len(quantize_model(unmerge(merged), progress=False)) == 21


def test_a_start_from_the_weights_is_still_quantized_by_add_qlora():
    model = add_qlora(make_small_llama(), LoRAConfig(r=4, init="pissa"))
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 21 and all(isinstance(layer.base, QuantLinear) for layer in layers)
    assert all(layer.lora_A.requires_grad for layer in layers)


def test_a_frozen_table_among_trained_weights_does_not_make_an_adapted_model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
        )
    )
    model.model.embed_tokens.requires_grad_(False)  # as fixed positions are, in some models
    assert len(quantize_model(model, progress=False)) == 7
    assert not any(p.requires_grad for p in model.parameters())
