"""A 4-bit weight stands in for the tensor that it approximates, whoever reads it."""

import copy
import pickle

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from labkit.quant.layer_kinds import is_four_bit
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model
from labkit.quant.tensor import quantize

torch.manual_seed(0)
Q = quantize(torch.randn(64, 96).bfloat16())
W = Q.dequantize()
IDS = torch.arange(24).view(2, 12)

QUESTIONS = [
    *(lambda w, name=name: getattr(w, name) for name in (
        "device", "dtype", "shape", "ndim", "T", "mT", "itemsize", "requires_grad", "grad", "grad_fn", "is_leaf",
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "layout", "is_nested",
    )),
    *(lambda w, name=name: getattr(w, name)() for name in (
        "numel", "dim", "size", "element_size", "is_floating_point", "is_complex", "stride", "is_contiguous", "float",
        "half", "double", "t", "norm", "sum", "abs", "isfinite", "clone", "contiguous", "tolist", "nelement",
        "ndimension", "get_device", "is_signed", "detach", "cpu", "flatten",
    )),
    lambda w: w.size(0), lambda w: w.size(-1), lambda w: w.data, lambda w: w.to(torch.float32), lambda w: w.to("cpu"),
    lambda w: w.to("cpu", torch.float64), lambda w: w.to(dtype=torch.bfloat16), lambda w: w.view(-1), lambda w: w[3],
    lambda w: w[:, 2:5], lambda w: len(w), lambda w: next(row.sum() for row in w), lambda w: w @ torch.ones(96, 2).bfloat16(),
    lambda w: torch.ones(2, 64).bfloat16() @ w, lambda w: w + 1, lambda w: 1 - w, lambda w: 2 * w, lambda w: w / 3,
    lambda w: -w, lambda w: w > 0, lambda w: w**2, lambda w: torch.cat([w, w]), lambda w: torch.stack([w, w]),
    lambda w: F.linear(torch.ones(3, 96).bfloat16(), w), lambda w: torch.matmul(w, torch.ones(96).bfloat16()),
    lambda w: torch.einsum("oi,i->o", w, torch.ones(96).bfloat16()), lambda w: torch.linalg.norm(w.float()),
    lambda w: torch.ones(64, 96).bfloat16().copy_(w), lambda w: torch.zeros(64, 96).add_(w), lambda w: torch.isnan(w).any(),
    lambda w: torch.allclose(w, W), lambda w: torch.equal(w, W), lambda w: torch.empty_like(w).shape, lambda w: torch.overrides.is_tensor_like(w),
    lambda w: np.asarray(w.float()), lambda w: w.float().numpy(), lambda w: torch.nn.utils.parameters_to_vector([w]).sum(),
]  # fmt: skip


def plain(answer):
    return answer.dequantize() if isinstance(answer, type(Q)) else answer


@pytest.mark.parametrize("ask", QUESTIONS)
def test_every_question_gets_the_answer_of_the_dequantized_weight(ask):
    ours, theirs = plain(ask(Q)), ask(W)
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(ours, np.ndarray):
        assert (ours == theirs).all()
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.zero_(), lambda w: w.copy_(W), lambda w: w.add_(1), lambda w: w.requires_grad_(),
        lambda w: nn.init.normal_(w), lambda w: nn.init.xavier_uniform_(w), lambda w: torch.add(W, W, out=w),
        lambda w: torch.relu_(w), lambda w: w.data_ptr(), lambda w: w.untyped_storage(), lambda w: w.share_memory_(),
        lambda w: torch._foreach_add_([w], 1),
    ],
)  # fmt: skip
def test_what_would_change_a_temporary_tensor_is_refused(change):
    with pytest.raises(TypeError, match="a 4-bit weight cannot be changed in place, nor trained"):
        change(Q)
    assert torch.equal(Q.dequantize(), W)


def test_it_has_no_attribute_that_a_tensor_lacks():
    for name in ("quant_state", "ds_numel", "SCB", "no_such"):
        assert not hasattr(Q, name)
    with pytest.raises(TypeError):
        Q[0] = 1
    with pytest.raises(AttributeError):
        Q.data = W


def test_freezing_it_is_nothing_and_moving_it_keeps_it_packed():
    assert Q.requires_grad_(False) is Q and Q.to("cpu").packed.device.type == "cpu"
    assert Q.to("meta").packed.is_meta and Q.to("meta").device.type == "meta"
    assert Q.to(torch.float32).dtype == torch.float32 and torch.equal(Q.to(torch.float32), W.float())
    for other in (copy.copy(Q), copy.deepcopy(Q), pickle.loads(pickle.dumps(Q))):
        assert type(other) is type(Q) and torch.equal(other.dequantize(), W)


def test_a_product_with_it_has_the_gradient_of_the_dense_product():
    q = quantize(torch.randn(64, 96))
    x, y = (torch.ones(3, 96, requires_grad=True) for _ in range(2))
    F.linear(x, q).pow(2).sum().backward()
    F.linear(y, q.dequantize()).pow(2).sum().backward()
    assert torch.equal(x.grad, y.grad)


def encoder(**kwargs):
    return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, **kwargs)


READERS = {
    "Mamba reads dt_proj.weight": (
        lambda: MambaForCausalLM(
            MambaConfig(vocab_size=128, hidden_size=64, state_size=8, num_hidden_layers=2)
        ),
        lambda m: m(input_ids=IDS).logits,
    ),
    "T5 reads wo.weight.dtype": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        ),
        lambda m: m(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits,
    ),
    "T5 in bfloat16": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
        ).bfloat16(),
        lambda m: m(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits,
    ),
    "TransformerEncoderLayer": (encoder, lambda m: m(torch.randn(2, 5, 64, generator=torch.manual_seed(3)))),
    "TransformerEncoder with padding": (
        lambda: nn.TransformerEncoder(encoder(), 2),
        lambda m: m(torch.ones(2, 5, 64), src_key_padding_mask=torch.arange(5) > torch.tensor([[4], [2]]))[
            :, :3
        ],
    ),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(64, 4, batch_first=True),
        lambda m: m(*[torch.randn(2, 5, 64, generator=torch.manual_seed(4))] * 3, need_weights=False)[0],
    ),
    "a fused product": (
        lambda: nn.ModuleDict({"a": nn.Linear(64, 96), "b": nn.Linear(64, 32)}),
        lambda m: F.linear(torch.ones(3, 64), torch.cat([m["a"].weight, m["b"].weight])),
    ),
}


@pytest.mark.filterwarnings("ignore:quantize_model cannot reach")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("gradients", [True, False])
def test_models_that_read_the_weight_compute_with_it_as_the_dense_model_does(reader, gradients):
    make, run = READERS[reader]
    torch.manual_seed(0)
    model = make().eval()
    quantize_model(model, progress=False)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    dense = dequantize_model(copy.deepcopy(model))
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(run(model), run(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_layers_of_bitsandbytes_are_in_four_bits_however_they_store_them(storage):
    theirs = bnb.nn.Linear4bit(128, 64, bias=False, quant_storage=storage, quant_type="nf4").to("cpu")
    assert is_four_bit(theirs)
    model = nn.Sequential(theirs, nn.Linear(64, 64)).requires_grad_(False)
    report = quantize_model(model, progress=False)
    assert list(report) == ["1"] and model[0] is theirs
