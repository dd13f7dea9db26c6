"""Starts that use the weight: PiSSA, OLoRA and LoftQ do what their papers say, and give PEFT's numbers."""

import copy
import inspect

import pytest
import torch
from peft.utils import loftq_utils
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.dora import DoRALinear
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.qlora import add_qlora
from labkit.lora.starts import top_factors
from labkit.quant.layer_kinds import dense_weight
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from tests.lora.cases import (
    assert_same_logits_loss_and_gradients,
    make_model,
    peft_model,
    their_parameters,
    with_bitsandbytes,
)


def spectrum_like_a_models(out=128, width=192, seed=0):
    """A weight whose singular values fall off, as a trained one's do."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(out, out, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(width, out, generator=generator))
    return (U * torch.linspace(0, 4, out).neg().exp()) @ V.T


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


def test_starts_from_the_weight_refuse_one_that_is_quantized_already():
    model = make_model()
    quantize_model(model, progress=False)
    with pytest.raises(ValueError, match=r"in 4 bits already.*add_qlora"):
        add_lora(model, LoRAConfig(r=4, init="pissa"))
    with pytest.raises(ValueError, match="packed in a format of its own"):
        DoRALinear(
            with_bitsandbytes(make_model()).model.layers[0].mlp.up_proj, LoRAConfig(r=4, variant="dora")
        )


@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
def test_no_bias_of_the_base_trains_whatever_the_start(init):
    model = add_lora(
        nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), LoRAConfig(r=2, targets=["0"], init=init)
    )
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lora_A", "0.lora_B"]
