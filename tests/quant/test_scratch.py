"""The memory for a dequantized weight that layers share: nothing that is kept lives in it."""

import threading

import torch

from labkit.quant import scratch
from tests.quant.cases import make_layer


def test_results_and_gradients_do_not_live_in_the_shared_memory():
    one, two = make_layer(seed=1), make_layer(seed=2)
    x = torch.randn(20, 96, requires_grad=True)
    y = one(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    y_before, gradient_before = y.clone(), gradient.clone()
    torch.autograd.grad(two(x).sum(), x)
    assert torch.equal(y, y_before) and torch.equal(gradient, gradient_before)


def test_two_layers_in_one_graph_and_backward_in_any_order():
    one, two = make_layer(96, 96, seed=1), make_layer(96, 96, seed=2)
    x = torch.randn(20, 96, requires_grad=True)
    (gradient,) = torch.autograd.grad(two(one(x)).tanh().sum() + one(x).sum(), x)
    a, b = one.to_linear(), two.to_linear()
    (expected,) = torch.autograd.grad(b(a(x)).tanh().sum() + a(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_right_although_other_layers_ran_meanwhile():
    layer, other = make_layer(bias=False), make_layer(bias=False, seed=5)
    x = torch.randn(20, 96, requires_grad=True)

    def second(layer):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        other(torch.randn(20, 96, requires_grad=True)).sum().backward()
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    torch.testing.assert_close(second(layer), second(layer.to_linear()), rtol=1e-4, atol=1e-4)


def test_threads_do_not_share_it():
    layers = [make_layer(512, 512, seed=i) for i in range(4)]
    x = torch.randn(32, 512, requires_grad=True)
    expected = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in layers]
    same = []

    def work(i):
        y = x.detach().clone().requires_grad_()
        for _ in range(30):
            same.append(torch.equal(torch.autograd.grad(layers[i](y).sum(), y)[0], expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(same) == 120 and all(same)


def test_it_is_as_large_as_the_largest_weight_and_bounded(monkeypatch):
    memory = scratch.Scratch()
    monkeypatch.setattr(scratch, "_scratch", memory)
    x = torch.randn(20, 96, requires_grad=True)
    for out in (40, 80, 60):
        make_layer(out)(x).sum().backward()
    assert memory.memory.numel() == 80 * 96 * 4
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 80 * 96 * 4)
    torch.testing.assert_close(make_layer(200)(x), make_layer(200).to_linear()(x), rtol=1e-5, atol=1e-6)
    assert memory.memory.numel() == 80 * 96 * 4


def test_it_can_be_made_in_inference_mode_and_used_outside(monkeypatch):
    monkeypatch.setattr(scratch, "_scratch", scratch.Scratch())
    layer = make_layer()
    with torch.inference_mode():
        layer(torch.randn(20, 96))
    x = torch.randn(20, 96, requires_grad=True)
    torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-5, atol=1e-6)
