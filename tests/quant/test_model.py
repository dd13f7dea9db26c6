"""A whole model in four bits and back: which layers, what is left as it was, and how much memory it takes."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model
from tests.conftest import make_small_llama
from tests.quant.cases import (
    IDS,
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
