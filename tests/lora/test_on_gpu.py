"""On a GPU: an adapter merges, comes off, is saved and loaded as on the CPU. Needs one; imports nothing optional."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import labkit
from labkit.lora.inject import lora_layers
from labkit.quant.linear import QuantLinear

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
CONFIG = labkit.LoRAConfig(r=4, alpha=8)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits in fp32, summed in another order


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """No TF32 in products of fp32, whatever the session has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Of `IDS`, on the CPU."""
    device = next(model.parameters()).device
    return model.eval()(input_ids=IDS.to(device), use_cache=False).logits.cpu()


def trained(model: nn.Module) -> nn.Module:
    """`model` with an adapter as if trained: B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        B = torch.randn(layer.lora_B.shape, generator=generator) * 0.05
        layer.lora_B.data = B.to(layer.lora_B.device)
    return model


def with_lora(tiny, device: str) -> nn.Module:
    """tiny-llama with an adapter; the same numbers on every device."""
    torch.manual_seed(3)
    return trained(labkit.add_lora(copy.deepcopy(tiny[0]), CONFIG)).to(device)


def with_qlora(tiny, device: str) -> nn.Module:
    """tiny-llama in 4 bits, quantized on `device`, with an adapter of the same numbers on every device."""
    model = copy.deepcopy(tiny[0]).to(device)
    labkit.add_qlora(model, CONFIG)
    start = with_lora(tiny, "cpu")
    for layer, same in zip(lora_layers(model).values(), lora_layers(start).values()):
        layer.lora_A.data = same.lora_A.detach().clone().to(device)
    return trained(model)


def adapter_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """A and B of every layer, on the CPU."""
    return {name: p.detach().cpu() for name, p in model.named_parameters() if "lora_" in name}


def test_quantizing_on_the_gpu_gives_the_codes_of_the_cpu_and_what_the_cpu_quantized_can_be_moved(tiny):
    """Only the mean of the scales is a sum, whose order each device has for itself."""
    on_cpu, on_gpu = with_qlora(tiny, "cpu"), with_qlora(tiny, DEVICE)
    expected, moved = logits(on_cpu), copy.deepcopy(on_cpu).to(DEVICE)
    four_bit = [
        [m for m in model.modules() if isinstance(m, QuantLinear)] for model in (on_cpu, on_gpu, moved)
    ]
    assert len(four_bit[0]) == len(four_bit[1]) > 0
    for ours, quantized_there, carried_there in zip(*four_bit):
        assert torch.equal(quantized_there.packed.cpu(), ours.packed)
        dense = ours.weight.dequantize()
        assert (quantized_there.weight.dequantize().cpu() - dense).norm() < 1e-4 * dense.norm()
        assert torch.equal(carried_there.weight.dequantize().cpu(), dense)
    torch.testing.assert_close(logits(on_gpu), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(moved), expected, **CLOSE)


def test_a_merged_adapter_does_what_the_mounted_one_does(tiny):
    model = with_lora(tiny, DEVICE)
    base, mounted = logits(copy.deepcopy(tiny[0]).to(DEVICE)), logits(model)
    assert (mounted - base).abs().max() > 0.1, "the adapter does something"
    torch.testing.assert_close(logits(labkit.merge(model)), mounted, **CLOSE)
    assert torch.equal(logits(labkit.unmerge(model)), mounted), "the very weights are back"
    torch.testing.assert_close(mounted, logits(with_lora(tiny, "cpu")), **CLOSE)


@pytest.mark.parametrize("make", [with_lora, with_qlora])
def test_unload_gives_a_plain_model_on_the_gpu(tiny, make):
    mounted = logits(make(tiny, DEVICE))
    plain = labkit.unload(make(tiny, DEVICE), dequantize=True)
    assert not lora_layers(plain) and not any(isinstance(m, QuantLinear) for m in plain.modules())
    assert {p.device.type for p in plain.parameters()} == {torch.device(DEVICE).type}
    torch.testing.assert_close(logits(plain), mounted, **CLOSE)
    base = labkit.unload(make(tiny, DEVICE), merged=False)
    expected = copy.deepcopy(tiny[0]).to(DEVICE)
    if make is with_qlora:
        labkit.quantize_model(expected, progress=False)
    assert torch.equal(logits(base), logits(expected))


@pytest.mark.parametrize("make", [with_lora, with_qlora])
@pytest.mark.parametrize("places", [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_an_adapter_that_one_device_saved_loads_on_the_other_with_the_same_bits(tiny, tmp_path, make, places):
    saved, read = (make(tiny, place) for place in places)
    folder = labkit.save_adapter(saved, tmp_path / "adapter")
    base = labkit.unload(read, merged=False)
    loaded = labkit.load_adapter(base, folder)  # also compares the fingerprint of the base
    expected, found = adapter_bits(saved), adapter_bits(loaded)
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert {p.device.type for p in loaded.parameters()} == {torch.device(places[1]).type}
    torch.testing.assert_close(logits(loaded), logits(saved), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_starts_that_use_the_weight_leave_the_model_on_the_gpu_what_it_was(tiny, init):
    model = copy.deepcopy(tiny[0]).to(DEVICE)
    config = labkit.LoRAConfig(r=4, init=init)
    if init == "loftq":
        before = logits(labkit.add_qlora(copy.deepcopy(model), CONFIG))
        after = logits(labkit.add_qlora(model, config))
        expected = logits(copy.deepcopy(tiny[0]).to(DEVICE))
        assert (after - expected).norm() < (before - expected).norm(), "nearer to the model in full precision"
    else:
        expected = logits(model)
        torch.testing.assert_close(logits(labkit.add_lora(model, config)), expected, rtol=1e-3, atol=1e-3)


def test_adapters_are_switched_and_turned_off_on_the_gpu(tiny):
    model = with_lora(tiny, DEVICE)
    first, base = logits(model), logits(copy.deepcopy(tiny[0]).to(DEVICE))
    labkit.add_adapter(model, "other", CONFIG)
    labkit.use_adapter(model, "other")
    assert torch.equal(logits(model), base), "B of a new adapter is zero"
    assert {p.device.type for p in model.parameters()} == {torch.device(DEVICE).type}
    labkit.use_adapter(model, "default")
    assert torch.equal(logits(model), first)
    with labkit.disabled(model):
        assert torch.equal(logits(model), base)
