"""Models of random weights: like real ones in everything but the numbers, and never larger than they end up."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.memory.card import restart, usage
from labkit.memory.formulas import plan
from labkit.memory.measurement import storages
from labkit.memory.random_weights import random_model
from labkit.memory.setup import Setup
from labkit.memory.subjects import make_batch
from labkit.memory.tracker import Tracker
from labkit.models.shapes import config_of
from labkit.quant.blockwise import quantize_blocks
from labkit.quant.codebooks import codebook
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from labkit.training.loss import supervised_loss

LIKE_70B = dict(  # a 32nd of Llama-2-70B's widths
    model_type="llama",
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=1,
    vocab_size=1000,
)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def made_under_watch(config, setup, device="cpu"):
    """The model, its bytes, and every tensor of `device` that was there while it was made."""
    tracker = Tracker(nn.Module(), {}, device=device)
    with tracker:
        model = random_model(config, setup, device)
    return model, sum(storages([*model.parameters(), *model.buffers()])), tracker.finish()


def quantized(model) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True, attention_bias=True)])
def test_a_random_model_has_the_tensors_of_a_real_one(method, changes):
    config = LlamaConfig(**{k: v for k, v in LIKE_70B.items() if k != "model_type"} | changes)
    real = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if method == "qlora":
        quantize_model(real, progress=False)
    if method != "full":
        add_lora(real, LoRAConfig(r=8))
    drawn = random_model(config, Setup(method=method, r=8))
    for kind in ("named_parameters", "named_buffers"):
        theirs, ours = dict(getattr(real, kind)()), dict(getattr(drawn, kind)())
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            same = ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype
            assert same and ours[name].requires_grad == tensor.requires_grad, name
    rotary = "model.rotary_emb"
    inv_freq = LlamaForCausalLM(config).get_submodule(rotary).inv_freq
    assert torch.equal(drawn.get_submodule(rotary).inv_freq, inv_freq)
    tied = drawn.get_output_embeddings().weight is drawn.get_input_embeddings().weight
    assert tied == config.tie_word_embeddings and drawn.training


@pytest.mark.parametrize("initializer_range", [0.02, 0.006])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_weight_has_the_standard_deviation_of_the_config(initializer_range, double_quant):
    config = config_of(LIKE_70B | dict(initializer_range=initializer_range))
    model = random_model(config, Setup(dtype="fp32", double_quant=double_quant))
    weights = [layer.weight.dequantize(torch.float32) for layer in quantized(model)]
    weights += [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for weight in weights:
        assert weight.std().item() == pytest.approx(initializer_range, rel=0.02)
        assert abs(weight.mean().item()) < 0.1 * initializer_range
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert norms and all((p == 1).all() for p in norms)


def entropy_of(packed) -> float:
    """Bits per code."""
    codes = torch.cat([packed >> 4, packed & 15]).flatten().long()
    share = torch.bincount(codes, minlength=16) / codes.numel()
    return -(share * share.log2()).sum().item()


def test_codes_and_scales_are_nearly_those_of_gaussian_weights():
    layer = max(quantized(random_model(LIKE_70B, Setup(dtype="fp32"))), key=lambda one: one.packed.numel())
    real = quantize(torch.randn(1024, 1024))
    assert entropy_of(layer.packed) == pytest.approx(4, abs=0.001)
    assert entropy_of(real.packed) == pytest.approx(3.88, abs=0.01)
    largest = torch.randn(200_000, 64).abs().amax(1)  # of real Gaussian blocks
    mine = layer.weight.absmax
    spread = (mine.std() / mine.mean()).item()
    assert spread == pytest.approx((largest.std() / largest.mean()).item(), rel=0.05)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_step_of_a_random_model_has_a_loss_and_gradients(method):
    model = random_model(LIKE_70B, Setup(method=method, dtype="fp32", r=8))
    batch = make_batch(1000, 2, 32)
    loss = supervised_loss(model, batch) / batch.n_supervised
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1000), rel=0.1), "it knows nothing"
    assert 0.05 < model(input_ids=batch.ids).logits.std() < 2
    gradients = [p.grad for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name]
    assert gradients and all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_a_seed_gives_the_same_weights_and_leaves_the_generator():
    before = torch.get_rng_state()
    one, same, other = (random_model(LIKE_70B, Setup(), seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(one[name], same[name]) for name in tensors)
    packed = next(name for name in tensors if name.endswith("packed"))
    assert not torch.equal(one[packed], other[packed])


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_making_a_model_takes_no_more_than_the_model(method):
    _, final, record = made_under_watch(LIKE_70B, Setup(method=method, r=8))
    largest_scales = 4 * 896 * 256 // 64
    assert record.peak()[0] <= final + 8 * largest_scales
    gone = [tensor.bytes for tensor in record.tensors if tensor.died is not None]
    assert max(gone, default=0) <= largest_scales, "nothing as large as a layer is made and dropped"


def making_of_llama_2_70b(layers: int, device: str):
    config = config_of("llama-2-70b")
    config.num_hidden_layers = layers
    quantize_blocks(torch.zeros(256), codebook("dynamic8"), 256)  # tables are made once, of real numbers
    codebook("nf4")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, final, record = made_under_watch(config, Setup(), device)
        assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {device}
    return config, final, record


def assert_never_in_16_bits(config, final, record):
    ledger = plan(config, "qlora")
    of_adapters, in_16_bits = ledger["lora"], ledger["weights"] - ledger["weights/4 bits"]
    assert final == ledger["weights"] + ledger["constants"] + of_adapters
    assert final - of_adapters - in_16_bits == pytest.approx(
        4.127 / 8 * ledger.counts["quantized_parameters"], rel=1e-4
    )
    a_layer = config.hidden_size * config.intermediate_size
    assert record.peak()[0] <= final + a_layer / 2
    of_layers = [
        t.bytes for t in record.tensors if t.bytes not in (2 * config.vocab_size * config.hidden_size,)
    ]
    assert max(of_layers) == a_layer / 2, "the largest tensor but the embeddings is a layer in 4 bits"


def test_layers_of_a_70b_are_made_in_4_bits_and_never_in_more():
    assert_never_in_16_bits(*making_of_llama_2_70b(2, "cpu"))


@pytest.mark.slow
def test_a_whole_70b_is_made_in_4_bits_and_never_held_in_more():
    config, final, record = making_of_llama_2_70b(80, "cpu")
    assert_never_in_16_bits(config, final, record)
    assert record.peak()[0] == final < 0.27 * 2 * 68_976_648_192


def test_a_buffer_that_nobody_initialises_is_refused(monkeypatch):
    forward = LlamaForCausalLM._init_weights

    def forgets(self, module):
        if "Rotary" not in type(module).__name__:
            forward(self, module)

    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", forgets)
    with pytest.raises(
        ValueError, match=r"does not say how to initialise the buffer model\.rotary_emb\.inv_"
    ):
        random_model(LIKE_70B, Setup())


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_on_a_card_making_a_model_takes_no_more_than_the_model(method):
    device = torch.device("cuda", 0)
    config = config_of("llama-2-7b")
    config.num_hidden_layers = 2
    restart(device)
    before = usage(device).allocated
    model = random_model(config, Setup(method=method), device)
    peak, now = usage(device, peak=True).allocated, usage(device).allocated
    final = sum(storages([*model.parameters(), *model.buffers()]))
    assert {t.device for t in [*model.parameters(), *model.buffers()]} == {device}
    assert now - before <= 1.03 * final
    assert peak - now <= 11008 * 4096 / 2, "no more than a layer in 4 bits besides"
    if method == "qlora":
        for layer in quantized(model):
            assert layer.weight.dequantize(torch.float32).std().item() == pytest.approx(0.02, rel=0.02)
