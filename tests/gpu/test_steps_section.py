"""Section steps: what a step computes, what is counted, which ways fit, and what follows from the rows."""

import json
from dataclasses import replace

import pytest
import torch
from gpu import steps
from gpu.measurement import Skipped
from gpu.steps import METHODS, STAND_IN, conclude, first_from, time_of_steps, what_fits

from labkit.memory import Setup, make_batch
from labkit.memory.random_weights import random_model

FIELDS = {
    *("model", "tokens", "full_s", "lora_s", "qlora_s", "peer_s", "lora_over_full", "qlora_over_lora"),
    "dequantize_share",
}
LAYER = {
    "q": (64, 64),
    "k": (64, 32),
    "v": (64, 32),
    "o": (64, 64),
    "gate": (64, 176),
    "up": (64, 176),
    "down": (176, 64),
}
HEAD = 64 * 512


@pytest.fixture
def alone(monkeypatch):
    """No peers are installed."""
    monkeypatch.setattr(steps, "has", lambda package: False)


def setups(tokens: int = 32, **changes) -> dict[str, Setup]:
    made = Setup(max_length=tokens, dtype="fp32", device="cpu", **changes)
    return {way: replace(made, method=method) for way, (method, _) in METHODS.items()}


def step_of(way: str, checkpointing: bool = False):
    batch = make_batch(STAND_IN.vocab_size, 1, 32)
    return steps.make_step(random_model(STAND_IN, setups()[way]), batch, way, checkpointing)


def test_a_row_has_what_lessons_read_and_names_the_peers_that_are_missing(stage, alone):
    row = time_of_steps(stage, "stand-in", 32, False)
    assert row.keys() >= FIELDS
    assert row["peer_s"] is None and row["qlora_over_peer"] is None
    assert row["left_out"] == {
        "peft_qlora": "peft and bitsandbytes not installed",
        "peft_lora": "peft not installed",
    }
    assert row["qlora_over_lora"] == row["qlora_s"] / row["lora_s"]
    assert row["laps"] == 7 and row["lora_min_s"] <= row["lora_s"] <= row["lora_max_s"]
    json.dumps(row, allow_nan=False)


def test_the_operations_of_full_fine_tuning_are_six_for_each_weight_and_token():
    step = step_of("full")
    step()
    in_layers = 2 * sum(n_in * n_out for n_in, n_out in LAYER.values())
    assert steps.count_operations(step) == 6 * (in_layers * 32 + HEAD * 31)  # the last token has no next


def test_lora_leaves_out_the_weights_gradients_and_adds_two_small_products():
    """4 P T, without the gradients of the first layer's inputs, which nothing before it trains with."""
    step = step_of("lora")
    step()
    first = [LAYER[name] for name in ("q", "k", "v")]
    base = 4 * (2 * sum(a * b for a, b in LAYER.values()) * 32 + HEAD * 31) - 2 * 32 * sum(
        a * b for a, b in first
    )
    small = 6 * 16 * 32 * 2 * sum(a + b for a, b in LAYER.values()) - 2 * 16 * 32 * sum(a for a, _ in first)
    assert steps.count_operations(step) == base + small


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_dequantizes_each_weight_forward_and_backward_and_again_under_checkpointing(checkpointing):
    calls = steps.dequantizations(step_of("qlora", checkpointing))
    # under checkpointing transformers lets the embedding's output require a gradient
    assert len(calls) == (3 * 14 if checkpointing else 14 + 11)
    assert {dtype for _, dtype in calls} == {torch.float32}


def test_a_step_changes_nothing_that_the_next_computes_with():
    for way in ("full", "lora", "qlora"):
        step = step_of(way)
        assert step().item() == step().item()


def test_what_does_not_fit_beside_the_others_is_left_out_with_its_figure(stage, alone, monkeypatch):
    monkeypatch.setattr(steps, "free_bytes", lambda device: 3_000_000)
    fitting, left_out = what_fits(STAND_IN, setups(), stage)
    assert fitting == ["lora", "qlora"]
    assert left_out["full"].startswith("needs 0.0 GB beside the others")
    monkeypatch.setattr(steps, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(Skipped, match="LoRA and QLoRA do not fit together"):
        what_fits(STAND_IN, setups(), stage)


def test_the_models_of_the_day_fit_where_they_should(stage, alone, monkeypatch):
    """By the plan, in bf16: all on 139 GiB, not the full fine-tuning of 7B on 24 GB."""
    from labkit.models.shapes import config_of

    made = {way: replace(s, dtype="bf16", device="cuda") for way, s in setups(512).items()}
    for gigabytes, expected in ((140, ["lora", "qlora", "full"]), (24, ["lora", "qlora"])):
        monkeypatch.setattr(steps, "free_bytes", lambda device, size=gigabytes: size * 10**9)
        assert what_fits(config_of("llama-2-7b"), made, stage)[0] == expected


@pytest.mark.slow
def test_the_peer_has_bitsandbytes_layers_with_bitsandbytes_own_codes():
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    from gpu import peers

    setup = setups()["qlora"]
    dense = peers.dense(STAND_IN, setup, "cpu")
    weight = dense.model.layers[0].mlp.up_proj.weight.clone()
    model = peers.peft_qlora(STAND_IN, setup, torch.device("cpu"))
    assert isinstance(model, peft.PeftModel)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.base_layer.weight.quant_state.absmax, state.absmax)


def row(model, tokens, qlora_over_lora, lora_over_full=None, **more):
    """A row of the record, with what the conclusions read."""
    made = {
        "model": model,
        "tokens": tokens,
        "qlora_over_lora": qlora_over_lora,
        "lora_over_full": lora_over_full,
    }
    return made | {"checkpointing": False, "dequantize_share": 0.2, "qlora_over_peer": None} | more


def test_the_conclusions_name_the_tokens_from_which_qlora_is_cheap_and_where_full_is_faster():
    taken = [row("m", 4096, 1.04, 0.75), row("m", 256, 1.3, 1.2), row("m", 1024, 1.08, 0.9)]
    taken.append(row("m", 16384, 1.5, checkpointing=True))
    assert conclude({str(i): one for i, one in enumerate(taken)}) == [
        "m, QLoRA's step over LoRA's: 1.30× at 256 tokens, 1.08× at 1,024 tokens, 1.04× at 4,096 tokens; below 1.1× from "
        "1,024 tokens on (C61)",
        "m, dequantizing alone over QLoRA's step: 20% at 256 tokens, 20% at 1,024 tokens, 20% at 4,096 tokens",
        "m, LoRA's step over full fine-tuning's: 1.20× at 256 tokens, 0.90× at 1,024 tokens, 0.75× at 4,096 tokens; full is "
        "the faster at 256 tokens (C66)",
    ]
    expensive = conclude({"a": row("m", 256, 1.3, qlora_over_peer=0.9)})
    assert "nowhere below 1.1×" in expensive[0]
    assert expensive[-1] == "m, QLoRA's step over that of PEFT + bitsandbytes: 0.90× at 256 tokens"


def test_from_so_many_tokens_on_means_at_all_larger_ones_too():
    ratios = [row("m", 1, 1.05), row("m", 2, 1.2), row("m", 3, 1.01)]
    assert first_from(ratios, "qlora_over_lora", lambda ratio: ratio < 1.1) == 3
    assert first_from(ratios[:2], "qlora_over_lora", lambda ratio: ratio < 1.1) is None
