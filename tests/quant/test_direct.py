"""Few tokens without gradients: the product without a dequantized weight, and when it is not taken."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from labkit.hardware import set_fast
from labkit.quant import direct
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model
from tests.quant.cases import (
    directly,
    make_layer,
)


@directly
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (3, 5, 96)])
def test_few_rows_without_gradients_equal_a_dense_layer_to_rounding(shape, bias, double_quant, products):
    layer = make_layer(bias=bias, double_quant=double_quant)
    x = torch.randn(shape)
    y = layer(x)
    assert products == [(x.numel() // 96, 96)] and y.shape == (*shape[:-1], 80)
    torch.testing.assert_close(y, layer.to_linear()(x), rtol=1e-5, atol=1e-6)


@directly
def test_the_other_path_is_taken_for_gradients_many_rows_other_dtypes_widths_and_autocast(
    products, monkeypatch
):
    layer = make_layer()
    layer(torch.randn(2, 96, requires_grad=True))
    layer(torch.randn(direct.FEW_ROWS + 1, 96))
    layer(torch.randn(0, 96))
    copy.deepcopy(layer).bfloat16()(torch.randn(2, 96).bfloat16())
    make_layer(width=97)(torch.randn(2, 97))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 96))
    set_fast(False)
    try:
        layer(torch.randn(2, 96))
    finally:
        set_fast(True)
    monkeypatch.setattr(direct, "FEW_ROWS", 0)
    layer(torch.randn(2, 96))
    assert products == []
    monkeypatch.undo()


@pytest.mark.parametrize("x", [torch.ones(2, 95), torch.ones(2, 96, dtype=torch.long), torch.ones(96)])
def test_few_rows_of_another_width_or_dtype_are_refused(x):
    weight = QuantLinear.from_linear(nn.Linear(96, 64)).weight
    with pytest.raises(ValueError, match=r"this weight needs \(rows, 96\) float32 on a CPU"):
        weight.multiply(x)


class Rows(Dataset):
    """Runs a layer in the worker process, on two threads of its own."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 4

    def __getitem__(self, i):
        torch.set_num_threads(2)
        return self.layer(torch.full((1, 512), float(i)))


@directly
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_worker_uses_a_layer_that_the_parent_used():
    items = Rows(make_layer(512, 512, bias=False))
    expected = [items[i].detach() for i in range(4)]
    loader = DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


@pytest.mark.slow
def test_generated_tokens_are_those_of_the_dense_model(smollm2, monkeypatch):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    quantize_model(model, progress=False)
    inputs = tokenizer(["Low-rank adaptation is", "Paris is"], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(**inputs, **options)
    monkeypatch.setattr(direct, "FEW_ROWS", 0)
    assert torch.equal(ours, model.generate(**inputs, **options))
    assert torch.equal(ours, dequantize_model(model).generate(**inputs, **options))
