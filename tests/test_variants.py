"""The LoRA family: each variant gives PEFT's numbers and gradients, on dense and 4-bit bases, and does what its paper says."""

import copy
import inspect
import json

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils import loftq_utils
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from labkit.lora.adapters import base_only
from labkit.lora.config import LoRAConfig
from labkit.lora.dora import DoRALinear
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.layer import LoRALinear
from labkit.lora.merging import merge, unmerge
from labkit.lora.mounting import mounted_adapter
from labkit.lora.plain import plain_factors, to_plain_lora
from labkit.lora.qlora import add_qlora
from labkit.lora.starts import top_factors
from labkit.models.surgery import is_output_layer, replace_module
from labkit.paths import data_folder
from labkit.quant.linear import QuantLinear
from labkit.quant.linears import dense_weight
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from labkit.sweeps.config import RunConfig
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from labkit.training.optimizer import parameter_groups
from tests.conftest import make_small_llama

IDS = torch.arange(24).view(2, 12)
# widths of whole blocks of 64: bitsandbytes 0.50 dequantizes others wrongly on a CPU (see test_quant.py)
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_model(kind=LlamaForCausalLM, config=LlamaConfig, seed=0, **changes):
    torch.manual_seed(seed)
    return kind(config(**SIZES | changes)).eval()


def make_gpt2(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


FAMILIES = {
    "gpt2": make_gpt2,
    "bert": lambda: make_model(BertModel, BertConfig),
    "qwen2": lambda: make_model(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": lambda: make_model(Qwen3ForCausalLM, Qwen3Config, head_dim=16),
    "gemma": lambda: make_model(GemmaForCausalLM, GemmaConfig, head_dim=16),
    "gemma2": lambda: make_model(Gemma2ForCausalLM, Gemma2Config, head_dim=16),
    "mistral": lambda: make_model(MistralForCausalLM, MistralConfig),
}


def with_bitsandbytes(model):
    """Every linear layer but the output in bitsandbytes' NF4, as transformers' load_in_4bit leaves it."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and not is_output_layer(model, linear):
            theirs = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            theirs.load_state_dict(linear.state_dict())
            replace_module(model, name, theirs.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def peft_model(model, variant="lora", **settings):
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings
    kinds = {"use_rslora": variant.startswith("rs"), "use_dora": variant.endswith("dora")}
    return get_peft_model(model, PeftConfig(**settings, **kinds)).train()


def randomize(model, seed=1):
    """An adapter as after training: no B is zero, no magnitude is a norm."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def their_parameters(layer):
    parts = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if layer.lora_magnitude_vector:
        parts["lora_magnitude"] = layer.lora_magnitude_vector["default"].weight
    return parts


def give(ours, theirs):
    """Copy our adapter into PEFT's."""
    modules = dict(theirs.get_base_model().named_modules())
    for name, layer in lora_layers(ours).items():
        for part, tensor in their_parameters(modules[name]).items():
            tensor.data.copy_(getattr(layer, part).data)


def assert_same_logits_loss_and_gradients(ours, theirs):
    results = []
    for model in (ours, theirs):
        out = model(input_ids=IDS)
        if hasattr(out, "logits"):
            loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            results.append((out.logits, loss))
        else:
            results.append(
                (out.last_hidden_state, out.last_hidden_state.pow(3).mean() + out.pooler_output.mean())
            )
        results[-1][1].backward()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    modules = dict(theirs.get_base_model().named_modules())
    layers = lora_layers(ours)
    assert layers and any(layer.lora_B.grad.abs().max() > 1e-5 for layer in layers.values())
    for name, layer in layers.items():
        for part, tensor in their_parameters(modules[name]).items():
            gradient = getattr(layer, part).grad
            assert (gradient - tensor.grad).norm() <= 1e-5 * max(1, tensor.grad.norm()), f"{name}.{part}"
            torch.testing.assert_close(gradient, tensor.grad, rtol=1e-4, atol=1e-6)


# -- against PEFT


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "rsdora"])
def test_logits_loss_and_gradients_equal_peft(variant, quantized):
    ours, base = make_model(), make_model()
    if quantized:
        quantize_model(ours, progress=False, scale_rounding="lookup")  # bitsandbytes' own on a CPU
        with_bitsandbytes(base)
    add_lora(ours.train(), LoRAConfig(r=4, alpha=12, variant=variant))
    theirs = peft_model(base, variant)
    give(randomize(ours), theirs)
    assert_same_logits_loss_and_gradients(ours, theirs)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight_equal_peft(init, variant):
    ours = add_lora(make_model().train(), LoRAConfig(r=4, alpha=12, init=init, variant=variant))
    theirs = peft_model(make_model(), variant, init_lora_weights=init)
    modules = dict(theirs.get_base_model().named_modules())
    for name, layer in lora_layers(ours).items():
        for part, tensor in their_parameters(modules[name]).items():
            torch.testing.assert_close(getattr(layer, part), tensor, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.base.weight, modules[name].base_layer.weight, rtol=1e-5, atol=1e-6)
    assert_same_logits_loss_and_gradients(ours, theirs)


def test_qpissa_equals_peft_over_bitsandbytes():
    """PEFT's recipe: PiSSA in full precision, quantize the residual, and the adapter on top."""
    ours = add_qlora(make_model().train(), LoRAConfig(r=4, alpha=12, init="pissa"), scale_rounding="lookup")
    residual = peft_model(make_model(), init_lora_weights="pissa").unload()
    theirs = peft_model(with_bitsandbytes(residual))
    give(ours, theirs)
    assert_same_logits_loss_and_gradients(ours, theirs)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_adapted_where_peft_adapts_it_and_computes_the_same(family, variant):
    ours = add_lora(FAMILIES[family]().train(), LoRAConfig(r=4, alpha=12, variant=variant))
    theirs = peft_model(FAMILIES[family](), variant)
    modules = dict(theirs.get_base_model().named_modules())
    assert set(lora_layers(ours)) == {name for name, module in modules.items() if hasattr(module, "lora_A")}
    give(randomize(ours), theirs)
    ours.eval(), theirs.eval()
    assert_same_logits_loss_and_gradients(ours, theirs)
    with torch.no_grad():
        before = ours(input_ids=IDS)[0]
        torch.testing.assert_close(merge(ours)(input_ids=IDS)[0], before, rtol=1e-4, atol=2e-5)
        assert torch.equal(unmerge(ours)(input_ids=IDS)[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_what_it_learns_with_peft(family):
    """Language models by heart what they read; the BERT type to tell two sentences apart by its pooled output."""
    ours = add_lora(FAMILIES[family]().train(), LoRAConfig(r=4, alpha=12))
    theirs = peft_model(FAMILIES[family]())
    give(randomize(ours), theirs)
    losses = []
    for model in (ours.eval(), theirs.eval()):  # no dropout: the same numbers for both
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, eps=1e-4)
        losses.append([])
        for _ in range(20):
            out = model(input_ids=IDS)
            if hasattr(out, "logits"):
                loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            else:
                loss = F.cross_entropy(4 * out.pooler_output[:, :2], torch.tensor([0, 1]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.95 * losses[0][0]


# -- DoRA


def test_dora_gives_the_known_answer_of_torchtune():
    """torchtune's test of its DoRALinear: every parameter is arange(n) / n, and the mean output is 0.05201."""
    torch.manual_seed(16)
    x = torch.randn(2, 32, 64)
    ramp = lambda p: (torch.arange(p.numel(), dtype=torch.float32) / p.numel()).view(p.shape)  # noqa: E731
    base = nn.Linear(64, 128, bias=False)
    base.weight.data = ramp(base.weight)
    layer = DoRALinear(base, LoRAConfig(r=4, alpha=1.0, variant="dora"))
    for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude):
        p.data = ramp(p)
    assert layer(x).mean().item() == pytest.approx(0.05201, abs=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_starts_as_the_base_bit_for_bit(bias, quantized):
    torch.manual_seed(0)
    base = nn.Linear(96, 80, bias)
    base.weight.data[7] = 0  # a dead row has no direction, and must not become NaN
    if quantized:
        base = QuantLinear.from_linear(base)
    layer = DoRALinear(base, LoRAConfig(r=8, variant="dora"))
    x = torch.randn(5, 96)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", ["dense", "quantized", "bfloat16"])
def test_doras_norms_are_those_of_the_whole_weight(kind):
    torch.manual_seed(0)
    base = nn.Linear(96, 80)
    if kind == "quantized":
        base = QuantLinear.from_linear(base)
    layer = DoRALinear(
        base.bfloat16() if kind == "bfloat16" else base, LoRAConfig(r=8, alpha=24, variant="dora")
    )
    nn.init.normal_(layer.lora_B, std=0.1)
    whole = dense_weight(base).double() + 3 * (layer.lora_B.double() @ layer.lora_A.double())
    tolerance = 2e-3 if kind == "bfloat16" else 1e-6
    torch.testing.assert_close(layer.row_norms().double(), whole.norm(dim=1), rtol=tolerance, atol=0)
    torch.testing.assert_close(
        layer.delta() + dense_weight(base),
        (layer.lora_magnitude[:, None].double() * whole / whole.norm(dim=1, keepdim=True)).to(
            base.weight.dtype
        ),
        rtol=1e-2 if kind == "bfloat16" else 1e-5,
        atol=1e-2 if kind == "bfloat16" else 1e-6,
    )


def test_doras_norms_follow_a_base_that_is_quantized_under_it():
    model = randomize(add_lora(nn.Sequential(nn.Linear(96, 80)), LoRAConfig(r=4, variant="dora")))
    quantize_model(model, progress=False)
    layer = lora_layers(model)["0"]
    whole = dense_weight(layer.base) + layer.scaling * (layer.lora_B @ layer.lora_A)
    assert isinstance(layer.base, QuantLinear)
    torch.testing.assert_close(layer.row_norms(), whole.norm(dim=1), rtol=1e-5, atol=0)


def test_doras_dropout_falls_on_the_correction_only():
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(64, 64), LoRAConfig(r=4, dropout=0.5, variant="dora")).train()
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), layer.base(x)), "B = 0: nothing to drop"
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# -- PiSSA, OLoRA, LoftQ


def spectrum_like_a_models(out=128, width=192, seed=0):
    """A weight whose singular values fall off, as a trained one's do."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(out, out, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(width, out, generator=generator))
    return (U * torch.linspace(0, 4, out).neg().exp()) @ V.T


def test_pissa_moves_the_largest_singular_parts_into_the_adapter():
    layer = nn.Linear(192, 128, bias=False)
    layer.weight.data = spectrum_like_a_models()
    S = torch.linalg.svdvals(layer.weight.detach())
    model = add_lora(nn.Sequential(copy.deepcopy(layer)), LoRAConfig(r=16, alpha=8, init="pissa"))
    adapted = lora_layers(model)["0"]
    torch.testing.assert_close(
        torch.linalg.svdvals(adapted.delta().detach())[:16], S[:16], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        torch.linalg.svdvals(adapted.base.weight)[:100], S[16:116], rtol=1e-3, atol=1e-5
    )
    x = torch.randn(4, 192)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_fast_start_is_close_to_the_exact_one():
    W = spectrum_like_a_models()
    exact, fast = (A.T @ B.T for A, B in (top_factors(W, 16, 1.0), top_factors(W, 16, 1.0, niter=4)))
    best, got = (W - exact.T).norm(), (W - fast.T).norm()
    assert best <= got * (1 + 1e-5) and got < 1.001 * best


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_a_trained_start_becomes_plain_lora_of_twice_the_rank_on_the_original_base(init, variant):
    base = make_model()
    model = add_lora(
        make_model(), LoRAConfig(r=4, alpha=12, init=init, variant=variant, rank_pattern={"down_proj": 2})
    )
    randomize(model)
    with torch.no_grad():
        before = model(IDS).logits
        to_plain_lora(model)
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
        with base_only(model):
            assert torch.equal(model(IDS).logits, base(IDS).logits)
    ranks = {name.rpartition(".")[2]: layer.r for name, layer in lora_layers(model).items()}
    assert ranks["q_proj"] == 8 and ranks["down_proj"] == 4 and mounted_adapter(model).config.init == "default"


def test_qpissa_cuts_the_quantization_error_that_qlora_starts_with():
    """PiSSA, table 4: the residual quantizes better than the weight, in the nuclear norm of the error."""
    W = spectrum_like_a_models(seed=3)
    model = nn.Sequential(nn.Linear(192, 128, bias=False))
    model[0].weight.data = W.clone()
    add_qlora(model, LoRAConfig(r=32, alpha=32, init="pissa"))
    layer = lora_layers(model)["0"]
    assert isinstance(layer.base, QuantLinear)
    now = torch.linalg.svdvals(W - (dense_weight(layer.base) + layer.delta().detach())).sum()
    qlora = torch.linalg.svdvals(W - quantize(W).dequantize()).sum()
    assert now < 0.85 * qlora


def loftq_layer(W, init, alpha=32):
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    model[0].weight.data = W.clone()
    return lora_layers(add_qlora(model, LoRAConfig(r=16, alpha=alpha, init=init), double_quant=False))["0"]


def test_loftqs_first_iteration_is_the_best_fit_to_the_error_of_quantization():
    W = spectrum_like_a_models()
    layer = loftq_layer(W, "loftq_iter_1")
    Q = quantize(W, double_quant=False)
    assert torch.equal(layer.base.packed, Q.packed)
    error = W - Q.dequantize()
    left = error - layer.delta().detach()
    S = torch.linalg.svdvals(error)
    torch.testing.assert_close(left.norm() ** 2, (S[16:] ** 2).sum(), rtol=1e-4, atol=0)  # Eckart and Young


@pytest.mark.parametrize("iterations", [1, 5])
def test_loftq_equals_pefts(iterations):
    """PEFT's own code, but for the device: it runs on CUDA alone."""
    theirs = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), theirs)
    W = spectrum_like_a_models()
    dequantized, A, B = theirs["loftq_init"](W, num_bits=4, reduced_rank=16, num_iter=iterations)
    layer = loftq_layer(W, f"loftq_iter_{iterations}")
    # a weight on the edge between two levels may go either way after a rounding in the SVD
    same = torch.isclose(dense_weight(layer.base), dequantized, rtol=1e-5, atol=1e-7).float().mean()
    assert same == 1 if iterations == 1 else same > 0.999
    assert (layer.delta().detach() - B @ A).norm() < (1e-4 if iterations == 1 else 1e-2) * (B @ A).norm()


def test_more_iterations_of_loftq_leave_less_and_the_scaling_does_not_matter():
    W = spectrum_like_a_models()

    def left(init, alpha=32):
        layer = loftq_layer(W, init, alpha)
        return (W - dense_weight(layer.base) - layer.delta().detach()).norm()

    one, five = left("loftq_iter_1"), left("loftq")
    assert five < 0.97 * one < (W - quantize(W, double_quant=False).dequantize()).norm()
    torch.testing.assert_close(left("loftq", alpha=8), five, rtol=1e-3, atol=0)


@pytest.mark.parametrize("init", ["default", "pissa", "olora", "loftq"])
def test_add_qlora_quantizes_all_linear_layers_and_trains_the_adapter_only(init):
    torch.manual_seed(0)
    model = add_qlora(
        make_model().train(), LoRAConfig(r=4, targets="attention", init=init), compute_dtype=torch.float32
    )
    quantized = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(quantized) == 14 and all(m.compute_dtype == torch.float32 for m in quantized)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in lora_layers(model).values())


def test_add_qlora_with_a_random_start_is_quantizing_and_adding():
    results = []
    for make in (
        lambda m, c: add_qlora(m, c),
        lambda m, c: (quantize_model(m, progress=False), add_lora(m, c))[1],
    ):
        model = make_model()
        torch.manual_seed(5)
        results.append(make(model, LoRAConfig(r=4)).state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


# -- which of A and B starts at zero, LoRA+


@pytest.mark.parametrize("init, fan_in", [("b_random", 4), ("b_random_small", 64)])
def test_with_b_random_the_output_is_the_bases_and_the_first_gradient_goes_to_a(init, fan_in):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 256), LoRAConfig(r=4, init=init))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).sum().backward()
    assert layer.lora_A.grad.any() and not layer.lora_B.grad.any()
    assert layer.lora_B.std().item() == pytest.approx(1 / (3 * fan_in) ** 0.5, rel=0.1), (
        "uniform, by its fan-in"
    )


def test_lora_plus_gives_the_rates_of_peft():
    ours, theirs = add_lora(make_model(), LoRAConfig(r=4)), peft_model(make_model())
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {n.split("lora_")[1][0]: rates[id(p)] for n, p in theirs.named_parameters() if id(p) in rates}
    groups = parameter_groups(ours, 1e-3, 16)
    names = {id(p): n for n, p in ours.named_parameters()}
    got = {names[id(p)][-1]: group["lr"] for group in groups for p in group["params"]}
    assert got == expected == {"A": 1e-3, "B": 16e-3}
    assert sum(len(group["params"]) for group in groups) == 2 * 14
    assert not any("weight_decay" in group for group in groups)


def test_a_training_step_moves_b_at_its_own_rate(tokenizer, records):
    for ratio in (1, 16):
        model = add_lora(make_small_llama(num_hidden_layers=1), LoRAConfig(r=4))
        config = TrainConfig(
            lr=1e-4, lora_plus=ratio, steps=1, batch_size=1, schedule="constant", warmup=0, progress=False
        )
        history = train(model, tokenizer, records[:1], config)
        B = torch.cat([layer.lora_B.abs().flatten() for layer in lora_layers(model).values()])
        assert B.max().item() == pytest.approx(ratio * 1e-4, rel=1e-3)  # Adam's first step is the rate
        assert history.steps[0]["lr"] == 1e-4


def test_runs_know_the_family_and_recorded_lines_keep_their_meaning():
    for path in (data_folder() / "results").glob("*.jsonl"):
        old = RunConfig.from_dict(json.loads(path.read_text().splitlines()[0])["config"])
        assert old.lora_plus == 1 and old.training().lora_plus == 1
    config = RunConfig(variant="dora", lora_plus=16)
    assert config.training().lora_plus == 16 and config.adapter().variant == "dora"
    with pytest.raises(ValueError, match="method='full' has none"):
        RunConfig(method="full", lora_plus=16)
    with pytest.raises(ValueError, match="goes with method='qlora'"):
        RunConfig(init="loftq")


# -- what cannot be


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (make_model, {"init": "loftq"}, "add_qlora"),
        (make_model, {"init": "pissa", "variant": "dora"}, "row norms"),
        (
            lambda: make_model(tie_word_embeddings=False),
            {"targets": ["embed_tokens"], "variant": "dora"},
            "looked up",
        ),
        (
            lambda: make_model(tie_word_embeddings=False),
            {"targets": ["embed_tokens"], "init": "pissa"},
            "looked up",
        ),
    ],
)
def test_a_variant_on_a_layer_that_it_cannot_adapt_says_so_and_changes_nothing(make, config, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(r=4, **config))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_starts_from_the_weight_refuse_one_that_is_quantized_already():
    model = make_model()
    quantize_model(model, progress=False)
    with pytest.raises(ValueError, match=r"in 4 bits already.*add_qlora"):
        add_lora(model, LoRAConfig(r=4, init="pissa"))
    with pytest.raises(ValueError, match="packed in a format of its own"):
        DoRALinear(
            with_bitsandbytes(make_model()).model.layers[0].mlp.up_proj, LoRAConfig(r=4, variant="dora")
        )


def test_to_plain_lora_and_lora_plus_refuse_what_they_cannot_do():
    plain = add_lora(make_model(), LoRAConfig(r=4))
    with pytest.raises(ValueError, match="PiSSA or OLoRA"):
        to_plain_lora(plain)
    with pytest.raises(ValueError, match="not at hand"):
        to_plain_lora(add_qlora(make_model(), LoRAConfig(r=4, init="pissa")))
    with pytest.raises(ValueError, match="this model has none"):
        parameter_groups(make_model(), 1e-3, 16)
    with pytest.raises(ValueError, match="positive"):
        parameter_groups(plain, 1e-3, 0)


def test_the_forward_of_dora_differs_from_loras_in_one_line():
    import difflib
    import inspect

    lora, dora = (inspect.getsource(c.forward).splitlines() for c in (LoRALinear, DoRALinear))
    changed = [
        line
        for line in difflib.unified_diff(lora, dora, n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert len(lora) <= 12 and len(changed) == 2


def test_plain_factors_of_a_plain_adapter_are_its_own():
    layer = next(iter(lora_layers(add_lora(make_model(), LoRAConfig(r=4))).values()))
    A, B = plain_factors(layer)
    assert A.shape[0] == 4 and torch.equal(A, layer.lora_A) and torch.equal(B, layer.lora_B)
