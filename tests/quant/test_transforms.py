"""However a 4-bit layer is differentiated, mapped or recorded, it is the linear layer with the dequantized weight."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx

from labkit.hardware import set_fast
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model
from labkit.quant.tensor import quantize
from tests.conftest import make_small_llama
from tests.quant.cases import IDS, assert_same_bits

ROWS = (1, 3, 40)  # few rows have a kernel of their own


def layers(width=96, out=80, seed=0, **settings):
    torch.manual_seed(seed)
    layer = QuantLinear.from_linear(nn.Linear(width, out), **settings)
    return layer, layer.to_linear().requires_grad_(True)


def inputs(rows, width=96):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width, generator=generator), torch.randn(rows, width, generator=generator)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
def test_a_forward_mode_tangent_goes_through_the_layer(rows):
    (x, t), (layer, dense) = inputs(rows), layers()
    with forward_ad.dual_level():
        for residual in (False, True):
            dual = forward_ad.make_dual(x, t)
            ours, theirs = (forward_ad.unpack_dual(dual[:, :80] * residual + f(dual)) for f in (layer, dense))
            assert_close(ours.primal, theirs.primal)
            assert_close(ours.tangent, theirs.tangent)
    with torch.no_grad(), forward_ad.dual_level():  # forward mode does not ask whether gradients are enabled
        assert_close(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent, t @ dense.weight.T)


TRANSFORMS = {
    "grad": lambda f: lambda x, t: grad(lambda z: f(z).pow(3).sum())(x),
    "grad of grad": lambda f: (
        lambda x, t: grad(lambda y: grad(lambda z: f(z).pow(3).sum())(y).pow(2).sum())(x)
    ),
    "vjp": lambda f: lambda x, t: vjp(f, x)[1](f(t))[0],
    "jvp": lambda f: lambda x, t: jvp(f, (x,), (t,)),
    "vmap": lambda f: lambda x, t: vmap(f)(torch.stack([x, t])),
    "vmap of rows": lambda f: lambda x, t: vmap(f)(x),
    "vmap of grad": lambda f: lambda x, t: vmap(grad(lambda z: f(z).pow(3).sum()))(x),
    "jacrev": lambda f: lambda x, t: jacrev(f)(x[:1]),
    "jacfwd": lambda f: lambda x, t: jacfwd(f)(x[:1]),
    "hessian": lambda f: lambda x, t: hessian(lambda z: f(z).pow(3).sum())(x[:1]),
    "functionalize": lambda f: lambda x, t: functionalize(f)(x),
    "functionalize of grad": lambda f: lambda x, t: functionalize(grad(lambda z: f(z).pow(3).sum()))(x),
    "make_fx": lambda f: lambda x, t: make_fx(f)(torch.zeros_like(x))(x),
    "functional_call": lambda f: lambda x, t: functional_call(f, {"bias": torch.ones(80)}, (x,)),
    "per-sample gradient of the bias": lambda f: (
        lambda x, t: vmap(
            grad(lambda b, z: functional_call(f, {"bias": b}, (z,)).pow(3).sum()), in_dims=(None, 0)
        )(torch.ones(80), x)
    ),
    "double backward": lambda f: (
        lambda x, t: torch.autograd.functional.hvp(lambda z: f(z).pow(3).sum(), x, t)[1]
    ),
    "vectorized jacobian": lambda f: (
        lambda x, t: torch.autograd.functional.jacobian(f, x[:1], vectorize=True)
    ),
    "forward jacobian": lambda f: (
        lambda x, t: torch.autograd.functional.jacobian(f, x[:1], vectorize=True, strategy="forward-mode")
    ),
    "inference": lambda f: torch.inference_mode()(lambda x, t: f(x)),
    "autocast": lambda f: torch.autocast("cpu", torch.bfloat16)(lambda x, t: f(x)),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_gives_what_it_gives_of_the_dense_layer(transform, fast, rows):
    (x, t), (layer, dense) = inputs(rows), layers()
    layer.requires_grad_(False)
    dense.requires_grad_(False)
    set_fast(fast)
    try:
        ours = TRANSFORMS[transform](layer)(x, t)
    finally:
        set_fast(True)
    theirs = TRANSFORMS[transform](dense)(x, t)
    if transform == "autocast":
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    else:
        assert_close(ours, theirs)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("rows", ROWS)
def test_a_traced_model_computes_and_can_be_saved(rows):
    net = nn.Sequential(layers(96, 80)[0], nn.Tanh(), layers(80, 96, seed=1)[0])
    with torch.no_grad():
        traced = torch.jit.trace(net, torch.zeros(rows, 96))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        again = torch.jit.load(file)
        layers(512, 512)[0](torch.randn(40, 512))  # memory of the trace is its own
        x = inputs(rows)[0]
        assert_close(traced(x), net(x))
        assert_close(again(x), net(x))


def test_an_ensemble_of_4_bit_layers_is_mapped_over_their_stacked_states():
    members = [layers(seed=i, double_quant=False)[0].requires_grad_(False) for i in range(3)]
    parameters, buffers = stack_module_state(members)
    x = inputs(5)[0]
    shape = copy.deepcopy(members[0])
    ours = vmap(lambda p, b: functional_call(shape, (p, b), (x,)))(parameters, buffers)
    assert_close(ours, torch.stack([member(x) for member in members]))


class Labelled(torch.Tensor):
    """A tensor of another class, as libraries make them."""


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (
            torch.complex(torch.zeros_like(x), x).conj().imag
        ),  # the sign is kept apart from the numbers
        lambda x: torch._efficientzerotensor(x.shape),  # has no memory at all
        lambda x: x.to_sparse(),
        lambda x: x.as_subclass(Labelled),
        lambda x: x[:, ::1].T.contiguous().T,
        lambda x: nn.Parameter(x, requires_grad=False),
    ],
    ids=["negated", "zero", "sparse", "subclass", "transposed", "parameter"],
)
@pytest.mark.parametrize("rows", ROWS)
def test_numbers_that_do_not_lie_as_they_read_are_read_right(make, rows):
    x, (layer, dense) = make(inputs(rows)[0]), layers()
    with torch.no_grad():
        ours, theirs = layer(x), dense(x)
    assert type(ours) is type(theirs)
    assert_close(
        ours.to_dense() if ours.is_sparse else ours, theirs.to_dense() if theirs.is_sparse else theirs
    )


def test_a_negated_weight_is_quantized_by_its_numbers():
    weight = torch.complex(torch.zeros(64, 64), torch.randn(64, 64)).conj().imag
    assert weight.is_neg()
    ours, theirs = quantize(weight), quantize(weight.resolve_neg())
    assert_same_bits(ours.packed, theirs.packed)
    assert_same_bits(ours.dequantize(), theirs.dequantize())


@pytest.mark.parametrize(
    "x", [torch.ones(2, 96).long(), torch.ones(40, 96).bool(), torch.ones(2, 96) * 1j, [1.0] * 96]
)
def test_what_is_no_floating_number_is_refused_in_a_sentence(x):
    with pytest.raises(
        TypeError, match=r"x is .*; a linear layer takes floating numbers, such as x.float\(\)"
    ):
        layers()[0](x)


def test_saved_tensor_hooks_see_no_dense_weight_and_may_change_what_is_saved():
    (x, _), (layer, dense) = inputs(40), layers()
    results = []
    for f in (layer, dense):
        y = x.clone().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            out = f(y).tanh()
        out.sum().backward()
        results.append(y.grad)
    assert_close(*results)


def test_a_4_bit_model_has_the_directional_derivative_of_the_dense_one():
    model = make_small_llama()
    model.set_attn_implementation("eager")  # PyTorch's fused attention has no forward mode
    quantize_model(model, progress=False)
    dense = dequantize_model(copy.deepcopy(model))
    embedded = model.get_input_embeddings()(IDS[:1, :3]).detach()
    direction = torch.randn_like(embedded)
    ours, theirs = (
        jvp(lambda e, m=m: m(inputs_embeds=e, use_cache=False).logits, (embedded,), (direction,))
        for m in (model, dense)
    )
    assert_close(ours, theirs)


@pytest.mark.slow
def test_exported_and_compiled_transforms_compute_the_same():
    (x, _), (layer, dense) = inputs(40), layers()
    layer.requires_grad_(False)
    exported = torch.export.export(layer, (torch.zeros(40, 96),)).module()
    assert_close(exported(x), dense(x))
    torch.compiler.reset()
    derivative = torch.compile(grad(lambda z: layer(z).pow(2).sum()), backend="aot_eager")
    assert_close(derivative(x), grad(lambda z: dense(z).pow(2).sum())(x))
