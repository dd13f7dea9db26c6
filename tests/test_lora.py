"""LoRA: what it adds where, that it starts as nothing, and that PEFT computes the same."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.layer import LoRALinear
from labkit.lora.merging import adapter_strength, merge, unmerge
from labkit.lora.targets import matching_layers
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from tests.conftest import make_small_llama

IDS = torch.arange(40).view(2, 20)


def randomize_B(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("quantized", [False, True])
def test_output_before_training_equals_the_base_bit_for_bit(small_llama, quantized):
    if quantized:
        quantize_model(small_llama, progress=False)
    with torch.no_grad():
        before = small_llama(IDS).logits
        assert torch.equal(add_lora(small_llama, LoRAConfig(r=8)).eval()(IDS).logits, before)


def test_gradient_of_A_is_zero_at_the_start_and_that_of_B_is_not(small_llama):
    add_lora(small_llama, LoRAConfig(r=4))
    small_llama(IDS).logits.square().mean().backward()
    layer = next(iter(lora_layers(small_llama).values()))
    assert torch.all(layer.lora_A.grad == 0) and torch.any(layer.lora_B.grad != 0)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_logits_and_gradients_equal_peft(variant):
    """In double precision, where the order of a processor's additions does not hide anything."""
    ours = add_lora(make_small_llama().double(), LoRAConfig(r=4, alpha=12, variant=variant))
    randomize_B(ours)
    config = PeftConfig(
        r=4, lora_alpha=12, target_modules="all-linear", use_rslora=variant == "rslora", task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(make_small_llama(), config).double()
    modules = dict(theirs.get_base_model().named_modules())
    for name, layer in lora_layers(ours).items():
        modules[name].lora_A["default"].weight.data.copy_(layer.lora_A.data)
        modules[name].lora_B["default"].weight.data.copy_(layer.lora_B.data)
    out, reference = ours(IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(out, reference, rtol=1e-6, atol=1e-6)
    out.square().mean().backward()
    reference.square().mean().backward()
    for name, layer in lora_layers(ours).items():
        torch.testing.assert_close(
            layer.lora_A.grad, modules[name].lora_A["default"].weight.grad, rtol=1e-6, atol=1e-12
        )
        torch.testing.assert_close(
            layer.lora_B.grad, modules[name].lora_B["default"].weight.grad, rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_sum_in_place_changes_no_value_and_no_gradient_of_the_base_or_the_input(variant, shape):
    """Also where the base trains, has a bias, and something else reads the same x."""
    torch.manual_seed(0)
    model = add_lora(nn.Sequential(nn.Linear(6, 4)), LoRAConfig(r=2, variant=variant)).double()
    randomize_B(model)
    layer = model[0].requires_grad_(True)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    inputs, before = (x, *layer.parameters()), x.detach().clone()
    y = layer(x)
    W, b = layer.base.weight, layer.base.bias
    V = W + layer.scaling * layer.lora_B @ layer.lora_A
    stretch = (layer.lora_magnitude / V.norm(dim=1).detach())[:, None] if variant == "dora" else 1
    expected = x @ (stretch * V).T + b
    assert y.shape == (*shape[:-1], 4) and torch.equal(x, before)
    torch.testing.assert_close(y, expected)
    got, wanted = (torch.autograd.grad((out.sin() + x.sum()).sum(), inputs) for out in (y, expected))
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other)


def test_operations_of_a_layer_are_counted_whole():
    layer = add_lora(nn.Sequential(nn.Linear(64, 48, bias=False)), LoRAConfig(r=4))[0]
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(10, 64))
    assert counter.get_total_flops() == 2 * 10 * (64 * 48 + 4 * 64 + 4 * 48)


def test_known_answer_of_torchtune():
    """torchtune's test of its LoRALinear: every parameter is arange(n) / n, and the mean output is 1.1252."""
    torch.manual_seed(16)
    x = torch.randn(2, 32, 64)
    layer = LoRALinear(nn.Linear(64, 128), LoRAConfig(r=4, alpha=1.0))
    for p in layer.parameters():
        p.data = (torch.arange(p.numel(), dtype=torch.float32) / p.numel()).view(p.shape)
    assert layer(x).mean().item() == pytest.approx(1.1252, abs=1e-4)


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


def test_rank_above_a_layers_width_changes_nothing(small_llama):
    with pytest.raises(ValueError, match="r=33 is above 32"):
        add_lora(small_llama, LoRAConfig(r=33))
    assert not lora_layers(small_llama)


@pytest.mark.parametrize(
    "wrong",
    [{"r": 0}, {"r": -4}, {"r": 2.5}, {"r": True}, {"alpha": 0}, {"alpha": -1}, {"alpha": float("nan")}, {"dropout": 1},
     {"dropout": -0.1}, {"targets": []}, {"variant": "adora"}, {"init": "zeros"},
     {"init": "pissa_niter_0"}],
)  # fmt: skip
def test_config_out_of_range_says_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRAConfig(**wrong)


def test_injecting_twice_is_an_error(small_llama):
    add_lora(small_llama, LoRAConfig(r=4))
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(small_llama, LoRAConfig(r=4))


def test_merge_computes_the_same_and_unmerge_is_exact(small_llama):
    add_lora(small_llama, LoRAConfig(r=4))
    randomize_B(small_llama)
    before = {name: layer.base.weight.clone() for name, layer in lora_layers(small_llama).items()}
    with torch.no_grad():
        unmerged = small_llama(IDS).logits
        torch.testing.assert_close(merge(small_llama)(IDS).logits, unmerged, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="merged already"):
            merge(small_llama)
        assert torch.equal(unmerge(small_llama)(IDS).logits, unmerged)
    assert all(
        torch.equal(layer.base.weight, before[name]) for name, layer in lora_layers(small_llama).items()
    )


def test_merging_into_four_bits_is_refused(small_llama):
    quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4))
    with pytest.raises(ValueError, match="4-bit layer.*dequantize_model"):
        merge(small_llama)


def test_merging_into_four_bits_can_be_asked_for_and_undone(small_llama):
    quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4))
    randomize_B(small_llama)
    with torch.no_grad():
        adapted = small_llama(IDS).logits
        merged = merge(small_llama, requantize=True)(IDS).logits
        assert not torch.equal(merged, adapted), "the sixteen levels took their part"
        for layer in lora_layers(small_llama).values():
            whole = layer.base_before_merge.dequantize() + layer.delta()
            again = quantize(whole).dequantize()
            assert torch.equal(layer.base.weight.dequantize(), again)
        assert torch.equal(unmerge(small_llama)(IDS).logits, adapted)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_train_and_eval_never_merge(small_llama, variant):
    add_lora(small_llama, LoRAConfig(r=4, variant=variant))
    randomize_B(small_llama)
    before = {name: layer.base.weight.clone() for name, layer in lora_layers(small_llama).items()}
    with torch.no_grad():
        results = [small_llama.train(mode)(IDS).logits for mode in (True, False, True)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    layers = lora_layers(small_llama)
    assert all(torch.equal(layers[name].base.weight, before[name]) for name in before)
    assert all(not layer.is_merged for layer in layers.values())


def test_strength_of_what_is_no_sum_is_refused(small_llama):
    add_lora(small_llama, LoRAConfig(r=4, variant="dora"))
    with pytest.raises(ValueError, match="not of that form"), adapter_strength(small_llama, 0.5):
        pass


def test_strength_zero_is_the_base(small_llama):
    with torch.no_grad():
        base = small_llama(IDS).logits
        add_lora(small_llama, LoRAConfig(r=4))
        randomize_B(small_llama)
        adapted = small_llama(IDS).logits
        with adapter_strength(small_llama, 0):
            assert torch.equal(small_llama(IDS).logits, base)
        assert torch.equal(small_llama(IDS).logits, adapted)
        assert not torch.equal(adapted, base)


def test_counts_are_r_times_in_plus_out_and_quantization_does_not_halve_them(small_llama):
    shapes = [
        (m.in_features, m.out_features)
        for n, m in small_llama.named_modules()
        if isinstance(m, nn.Linear) and "layers" in n
    ]
    total = sum(p.numel() for p in small_llama.parameters())
    quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4))
    counted = trainable(small_llama)
    assert counted.trainable == sum(4 * (i + o) for i, o in shapes) == sum(counted.per_module.values())
    assert counted.total == total + counted.trainable


def test_any_module_with_linears_can_be_adapted():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    add_lora(model, LoRAConfig(r=2))
    assert set(lora_layers(model)) == {"0", "2"}
    model(torch.randn(3, 8)).sum().backward()
