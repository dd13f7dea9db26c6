"""The section `ledger`: what it takes, in which order, and what it makes of it."""

import json

import pytest
import torch
from gpu import ledger, simulated_steps
from gpu.ledger_steps import OF_A_REHEARSAL, STEPS, Step
from gpu.measurement import Skipped, Stage
from gpu.simulated_steps import known, simulate_blocks

from labkit.models.shapes import known_models

BY_KEY = {step.key: step for step in STEPS}
REQUIRED = {"model", "method", "batch_size", "max_length", "checkpointing", "settings", "plan_bytes"}
REQUIRED |= {"simulated_bytes", "simulated_tensors_bytes", "simulated_reserved_bytes", "allocated_bytes"}
REQUIRED |= {"reserved_bytes", "requested_bytes", "workspace_bytes", "plan_error", "simulation_error"}
REQUIRED |= {"seconds_to_make", "step_seconds", "static_bytes", "attention"}


@pytest.fixture
def card(tmp_path):
    """A stage with a GPU, of which nothing is asked."""
    return Stage(torch.device("cuda", 0), torch.bfloat16, False, tmp_path)


def test_every_step_has_a_name_of_its_own_and_they_fit_the_time():
    assert len(BY_KEY) == len(STEPS)
    assert {step.name for step in STEPS} <= set(known_models())
    assert sum(step.seconds for step in STEPS) <= 170


def test_every_method_and_size_is_there_with_and_without_checkpointing_and_of_two_lengths():
    of = {(step.method, step.name) for step in STEPS}
    for name in ("llama-2-7b", "llama-2-13b", "llama-33b", "llama-2-70b"):
        assert ("qlora", name) in of
    assert {
        ("lora", "llama-2-7b"),
        ("lora", "llama-2-13b"),
        ("full", "smollm2-1.7b"),
        ("full", "llama-2-7b"),
    } <= of
    for method in ("full", "lora", "qlora"):
        setups = [step.setup() for step in STEPS if step.method == method]
        assert {setup.checkpointing for setup in setups} == {True, False}
        assert {512, 2048} <= {setup.max_length for setup in setups}


def test_the_first_steps_are_of_each_method_and_of_the_smallest_and_the_largest_model():
    first = STEPS[:4]
    assert {step.method for step in first} == {"full", "lora", "qlora"}
    assert {"llama-2-7b", "llama-3-70b"} <= {step.name for step in first}


def test_every_step_was_simulated_and_each_needs_what_it_would_reserve(card):
    simulated = known()
    assert simulated.keys() == BY_KEY.keys()
    for measurement in ledger.measurements(card):
        mine = simulated[measurement.key]
        assert mine["tensors_bytes"] <= mine["bytes"] <= mine["reserved_bytes"] < measurement.needs_bytes
        qlora = BY_KEY[measurement.key].method == "qlora"
        assert measurement.packages == (("triton",) if qlora else ())
    smallest = min(m.needs_bytes for m in ledger.measurements(card))
    assert smallest < 6e9, "a card of 8 GB has something to measure"


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in BY_KEY if "70b" not in key])
def test_a_plan_is_within_2_percent_of_the_blocks_of_the_recorded_simulation(key):
    step = BY_KEY[key]
    assert ledger.plan_of(step, step.setup()).peak == pytest.approx(known()[key]["bytes"], rel=0.02)


@pytest.mark.slow
def test_the_recorded_simulation_is_what_the_code_simulates_now():
    step = next(step for step in STEPS if step.name == "smollm2-1.7b" and step.setup().checkpointing)
    assert simulate_blocks(step, step.setup()) == known()[step.key]


def test_only_steps_that_are_not_in_the_file_are_simulated(tmp_path, monkeypatch):
    file = tmp_path / "steps.json"
    old, new = Step("small", "lora", {"max_length": 8}), Step("small", "qlora", {"max_length": 8})
    file.write_text(json.dumps({old.key: {"bytes": 1}}))
    monkeypatch.setattr(simulated_steps, "FILE", file)
    monkeypatch.setattr(simulated_steps, "STEPS", [old, new])
    simulated_steps.main()
    found = known()
    assert found[old.key] == {"bytes": 1}
    mine = found[new.key]
    assert 0 < mine["tensors_bytes"] <= mine["bytes"] <= mine["reserved_bytes"]


def test_without_a_recorded_simulation_a_step_needs_what_is_planned():
    step = Step("smollm2-135m", "lora")
    assert ledger.room_for(step, None) > ledger.plan_of(step, step.setup()).peak


@pytest.mark.parametrize("step", [OF_A_REHEARSAL[0], OF_A_REHEARSAL[3]], ids=lambda step: step.key)
def test_a_rehearsal_takes_the_step_and_finds_what_was_planned(stage, step):
    numbers = ledger.take(step, stage)
    assert numbers.keys() >= REQUIRED
    assert abs(numbers["simulation_error"]) < 0.001
    assert abs(numbers["plan_error"]) < 0.05
    assert numbers["measure_bytes"] == numbers["allocated_bytes"]
    assert numbers["settings"]["dtype"] == "fp32" and numbers["attention"] == "cpu"
    assert numbers["reserved_over_allocated"] == 0


def test_a_gpu_for_which_triton_has_no_kernels_skips_what_is_in_4_bits(card, monkeypatch):
    monkeypatch.setattr(ledger, "has_kernels", lambda tensor: False)
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(0))
    with pytest.raises(Skipped, match="Triton has no kernels for this GPU"):
        ledger.take(STEPS[0], card)


def test_a_gpu_without_bf16_gets_16_bits_of_the_other_kind_everywhere():
    step = next(step for step in STEPS if step.as_in == "torchtune")
    setup = step.setup(torch.float16)
    assert setup.dtype == setup.adapter_dtype == "fp16"


def row(method, allocated, plan_error=0.01, **more):
    base = dict(
        method=method, allocated_bytes=allocated, reserved_bytes=int(1.1 * allocated), plan_error=plan_error
    )
    base |= dict(
        plan_error_without_workspaces=plan_error / 2, simulation_error=-0.003, workspace_bytes=70_000_000
    )
    return base | dict(reserved_over_allocated=0.1, attention="flash") | more


def test_conclusions_say_whether_the_goal_is_met_what_reserved_adds_and_which_figure_agrees():
    rows = {
        "QLoRA m 1×512": row("qlora", 5_000_000_000, published="a table, 5.5 GB", over_published=0.0),
        "LoRA m 1×512": row("lora", 15_000_000_000, plan_error=-0.05),
        "full m 1×512": row("full", 60_000_000_000),
    }
    said = "\n".join(ledger.conclude(rows))
    assert "plan is within 2% of allocated in 2 of 3 steps; the worst is -5.0%, LoRA m 1×512" in said
    assert "simulate is within 2% of allocated in 3 of 3 steps" in said
    assert "70 to 70 MB" in said and "reserved is 10.0% to 10.0% above allocated" in said
    assert "QLoRA m 1×512: 5.50 GB reserved, 5.00 GB allocated; published: a table, 5.5 GB (+0%)" in said
    assert "QLoRA m 1×512 takes 3.0 times less than LoRA and 12.0 times less than full" in said


def test_conclusions_say_where_attention_keeps_all_scores():
    rows = {
        "QLoRA m 1×512": row("qlora", 5_000_000_000),
        "LoRA m 1×512": row("lora", 10**10, attention="math"),
    }
    said = [sentence for sentence in ledger.conclude(rows) if "fused" in sentence]
    assert (
        len(said) == 1
        and "1 of 2 steps ran without a fused kernel for attention, such as LoRA m 1×512" in said[0]
    )
