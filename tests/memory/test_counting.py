"""Exact counts, against published totals, PEFT, bitsandbytes, and quantized tensors."""

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from labkit.memory.counting import constants_bytes, state_tensors
from labkit.memory.formulas import plan
from labkit.memory.setup import Setup
from labkit.models.shapes import config_of, known_models, meta_model
from labkit.quant.tensor import quantize
from tests.memory.conftest import close

PUBLISHED_TOTALS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "gemma-2-9b": 9_241_705_984,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", PUBLISHED_TOTALS)
def test_parameters_equal_the_published_total(name):
    ledger = plan(name, "full", max_length=8)
    assert ledger.counts["parameters"] == ledger.counts["trainable"] == PUBLISHED_TOTALS[name]
    assert ledger["weights/embeddings, bf16"] + ledger["weights/others, bf16"] == 2 * PUBLISHED_TOTALS[name]


def test_every_shipped_config_has_its_total_checked_but_those_of_the_first_llama():
    assert set(known_models()) - set(PUBLISHED_TOTALS) == {"tiny-llama", "llama-33b", "llama-65b"}
    # LLaMA, table 2
    assert close(plan("llama-33b", "full", max_length=8).counts["parameters"], 32.5e9, 0.002)
    assert close(plan("llama-65b", "full", max_length=8).counts["parameters"], 65.2e9, 0.002)


@pytest.mark.parametrize(
    ("model", "rank", "targets"),
    [
        ("qwen2.5-7b", 32, "all-linear"),
        ("llama-2-7b", 32, "attention"),
        ("mistral-7b", 16, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_trainable_parameters_equal_those_that_peft_makes(model, rank, targets):
    from peft import LoraConfig, get_peft_model

    counted = plan(model, "lora", r=rank, targets=targets, max_length=8).counts
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"] if targets == "attention" else targets
    with torch.device("meta"):
        theirs = get_peft_model(meta_model(config_of(model)), LoraConfig(r=rank, target_modules=modules))
    assert counted["trainable"] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_trainable_parameters_are_2_r_d_per_square_matrix():
    assert plan("llama-2-7b", "lora", r=32, targets="attention").counts["trainable"] == 32 * 4 * 2 * 32 * 4096


@given(rows=st.integers(1, 70), columns=st.integers(1, 300), blocksize=st.sampled_from([32, 64, 256]))
@settings(max_examples=25, deadline=None)
def test_constants_equal_those_of_a_quantized_tensor(rows, columns, blocksize):
    for double in (True, False):
        weight = quantize(torch.randn(rows, columns), blocksize=blocksize, double_quant=double)
        assert weight.scales.nbytes == constants_bytes(
            rows * columns, Setup(blocksize=blocksize, double_quant=double)
        )


def test_constants_of_a_70b_model_fall_from_4_to_1_gigabytes_with_double_quantization():
    counts = plan("llama-3-70b", "qlora", max_length=8).counts
    assert counts["constants_bytes_single"] == counts["quantized_parameters"] * 4 // 64
    assert close(counts["constants_bytes_single"], 4.28e9, 0.01)
    assert close(counts["constants_bytes"], counts["quantized_parameters"] * 0.127 / 8, 0.001)


@pytest.mark.parametrize("n", [100, 4095, 4096, 10_000, 65_536])
def test_8_bit_state_has_the_bytes_of_bitsandbytes(n):
    p = nn.Parameter(torch.zeros(n))
    p.grad = torch.zeros(n)
    theirs = bnb.optim.AdamW8bit([p])
    theirs.init_state(theirs.param_groups[0], p, 0, 0)
    state = theirs.state[p]
    moments = [state[key] for key in ("state1", "state2", "absmax1", "absmax2") if key in state]
    ours = state_tensors(n, "fp32", Setup(optimizer="adamw8bit"))
    assert sum(t.nbytes for t in moments) == sum(ours)


@pytest.mark.parametrize(
    ("choices", "each"),
    [
        (dict(dtype="bf16"), 8),  # all of it in bf16
        (dict(dtype="bf16", state_dtype="fp32"), 12),  # 84 GB of a "7B" of 7.0e9
        (dict(dtype="fp32"), 16),  # 112 GB
        (dict(dtype="bf16", master=True), 16),  # 112 GB; 128 GB of the 8.03e9 of Llama-3-8B
        (dict(dtype="bf16", master=True, gradient_dtype="fp32"), 18),  # 126 GB
    ],
)
def test_the_figures_for_full_fine_tuning_are_different_bytes_per_parameter(choices, each):
    ledger = plan("llama-2-7b", "full", **choices)
    n = ledger.counts["parameters"]
    counted = ledger["weights"] + ledger["gradients"] + ledger["optimizer"]
    assert 0 <= counted - each * n < 1e-6 * n  # AdamW's step counts, and the rotary frequencies


def test_embeddings_train_when_asked():
    frozen, trained = (
        plan("qwen2.5-7b", "lora", train_embeddings=t).counts["trainable"] for t in (False, True)
    )
    assert trained - frozen == 2 * 152_064 * 3584
    tied = [plan("smollm2-135m", "lora", train_embeddings=t).counts["trainable"] for t in (False, True)]
    assert tied[1] - tied[0] == 49_152 * 576
