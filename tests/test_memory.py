"""The memory ledger: exact counts, closed forms, and the prediction held against the simulated and the measured step."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora
from labkit.memory import subjects
from labkit.memory.activations import saved_tensors
from labkit.memory.counting import constants_bytes, shapes_of, state_tensors
from labkit.memory.formulas import block_of, crossover, plan
from labkit.memory.ledger import COMPONENTS, Ledger, Row, size
from labkit.memory.measurement import measure
from labkit.memory.resident import measure_resident
from labkit.memory.setup import PUBLISHED, Setup
from labkit.memory.simulation import simulate
from labkit.models.shapes import config_of, known_models, meta_model
from labkit.quant.tensor import quantize

EXACT = ("weights", "constants", "lora", "gradients", "optimizer")
SMALL = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    tie_word_embeddings=True,
)
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


def close(a: float, b: float, share: float) -> bool:
    return abs(a - b) <= share * abs(b)


# -- exact counts


@pytest.mark.parametrize("name", PUBLISHED_TOTALS)
def test_parameters_equal_the_published_total(name):
    ledger = plan(name, "full", sequence=8)
    assert ledger.counts["parameters"] == ledger.counts["trainable"] == PUBLISHED_TOTALS[name]
    assert ledger["weights/embeddings, bf16"] + ledger["weights/others, bf16"] == 2 * PUBLISHED_TOTALS[name]


def test_every_shipped_config_has_its_total_checked_but_those_of_the_first_llama():
    assert set(known_models()) - set(PUBLISHED_TOTALS) == {"tiny-llama", "llama-33b", "llama-65b"}
    assert close(plan("llama-33b", "full", sequence=8).counts["parameters"], 32.5e9, 0.002)  # LLaMA, table 2
    assert close(plan("llama-65b", "full", sequence=8).counts["parameters"], 65.2e9, 0.002)


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

    counted = plan(model, "lora", rank=rank, targets=targets, sequence=8).counts
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"] if targets == "attention" else targets
    with torch.device("meta"):
        theirs = get_peft_model(meta_model(config_of(model)), LoraConfig(r=rank, target_modules=modules))
    assert counted["trainable"] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_trainable_parameters_are_2_r_d_a_square_matrix():
    assert (
        plan("llama-2-7b", "lora", rank=32, targets="attention").counts["trainable"] == 32 * 4 * 2 * 32 * 4096
    )


@given(rows=st.integers(1, 70), columns=st.integers(1, 300), blocksize=st.sampled_from([32, 64, 256]))
@settings(max_examples=25, deadline=None)
def test_constants_equal_those_of_a_quantized_tensor(rows, columns, blocksize):
    for double in (True, False):
        weight = quantize(torch.randn(rows, columns), blocksize=blocksize, double_quant=double)
        assert weight.scales.nbytes == constants_bytes(
            rows * columns, Setup(blocksize=blocksize, double_quant=double)
        )


def test_constants_of_a_70b_model_fall_from_4_to_1_gigabytes_with_double_quantization():
    counts = plan("llama-3-70b", "qlora", sequence=8).counts
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
def test_the_figures_for_full_fine_tuning_are_different_bytes_a_parameter(choices, each):
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


# -- closed forms


def saved(method="lora", **choices):
    setup = Setup(method=method, **(dict(dtype="fp32", batch=2, sequence=32) | choices))
    shapes = shapes_of(config_of(SMALL), setup)
    return list(saved_tensors(block_of(config_of(SMALL), shapes, setup), setup))


def test_a_block_keeps_what_the_module_docstring_says():
    T, d, f, H, G, h, r = 64, 64, 176, 4, 2, 16, 16
    got = sum(tensor.bytes for tensor in saved(rank=r) if tensor.layer == 1)
    numbers = 2 * T * (d + 1) + T * (2 * H * h + 2 * G * h + H) + 3 * T * f + 2 * T * d + 7 * T * r
    assert got == 4 * numbers


def test_frozen_layers_keep_no_input_and_adapters_do():
    def bytes_of(kind, **choices):
        return sum(s.bytes for s in saved(**choices) if s.kind == kind and s.layer == 1)

    narrow, wide = dict(targets=["q_proj"]), dict(targets="all-linear")
    # down_proj's input is kept for its adapter only, and the norms' outputs
    assert bytes_of("mlp", **wide) - bytes_of("mlp", **narrow) == 4 * 64 * (176 + 3 * 16)
    assert bytes_of("norms", **wide) - bytes_of("norms", **narrow) == 4 * 64 * 64  # of the second norm


@given(sequence=st.integers(2, 200), batch=st.integers(1, 8), factor=st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_activations_grow_in_proportion_to_the_batch(sequence, batch, factor):
    def blocks(batch):
        return sum(s.bytes for s in saved(sequence=sequence, batch=batch) if s.layer is not None)

    assert blocks(factor * batch) == factor * blocks(batch)


def test_scores_kept_by_eager_attention_grow_with_the_square_of_the_sequence():
    def scores(sequence):
        return sum(s.bytes for s in saved(attention="eager", sequence=sequence) if "B H S²" in s.what)

    assert scores(64) == 4 * scores(32) == 2 * 4 * 2 * 4 * 64**2


# -- predicted, simulated, measured


@pytest.fixture(scope="module")
def tiny():
    """A measured ledger of tiny-llama, each once."""
    made = {}

    def get(method, checkpointing, batch, sequence, **choices):
        key = json.dumps([method, checkpointing, batch, sequence, choices])
        if key not in made:
            setup = Setup(method=method, **(dict(dtype="fp32", rank=8) | choices))
            model = subjects.real_model("tiny-llama", setup)
            given = subjects.make_batch(model.config.vocab_size, batch, sequence, 0.5)
            made[key] = measure(model, given, checkpointing=checkpointing)
        return made[key]

    return get


@pytest.mark.parametrize("shape", [(2, 100), (1, 256)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_plan_and_simulation_agree_with_the_measured_step(tiny, method, checkpointing, shape):
    measured = tiny(method, checkpointing, *shape)
    how = dict(checkpointing=checkpointing, batch=shape[0], sequence=shape[1], supervised=0.5)
    how |= dict(rank=8, dtype="fp32", device="cpu")
    planned, simulated = plan("tiny-llama", method, **how), simulate("tiny-llama", method, **how)
    for name in EXACT:
        assert planned[name] == simulated[name] == measured[name], name
    for kind, n in measured.kinds("activations").items():
        assert abs(planned[f"activations/{kind}"] - n) <= 16, kind  # two scalars: the loss and its weight
        assert simulated[f"activations/{kind}"] == n, kind
    assert close(planned.peak, measured.peak, 0.01)
    assert close(simulated.peak, measured.peak, 0.001)
    assert planned.moment.split()[0].strip(",") in (measured.moment, "loss", "backward")


def test_plan_agrees_with_a_measured_step_of_smollm2(method="qlora"):
    how = dict(dtype="fp32", rank=8, batch=1, sequence=64, supervised=0.5)
    model = subjects.real_model("smollm2-135m", Setup(method=method, **how))
    measured = measure(model, subjects.make_batch(model.config.vocab_size, 1, 64, 0.5))
    planned = plan("smollm2-135m", method, device="cpu", **how)
    assert all(planned[name] == measured[name] for name in EXACT)
    assert close(planned["activations"], measured["activations"], 0.001)
    assert close(planned.peak, measured.peak, 0.01)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_plan_knows_a_step_that_keeps_what_this_course_makes_again(monkeypatch, method):
    how = dict(dtype="fp32", rank=8, batch=2, sequence=100, supervised=0.5)
    ours = plan("tiny-llama", method, device="cpu", **how)
    usual = plan("tiny-llama", method, device="cpu", recompute_act=False, **how)
    monkeypatch.setattr("labkit.training.loss.recompute_activations", lambda model: nullcontext())
    model = subjects.real_model("tiny-llama", Setup(method=method, **how))
    measured = measure(model, subjects.make_batch(model.config.vocab_size, 2, 100, 0.5))
    assert abs(usual["activations/mlp"] - measured["activations/mlp"]) <= 16
    assert close(usual.peak, measured.peak, 0.01)
    config = model.config
    act = 4 * 2 * 100 * config.intermediate_size * config.num_hidden_layers
    assert usual["activations/mlp"] - ours["activations/mlp"] == act


VARIATIONS = {
    "bf16, adapters in fp32": {},
    "bf16, adapters too": dict(adapter_dtype="bf16"),
    "bf16, attention only": dict(targets="attention"),
    "bf16, mlp only": dict(targets="mlp"),
    "two targets, all logits": dict(targets=["q_proj", "v_proj"], logits="all"),
    "eager attention": dict(attention="eager", dtype="fp32"),
    "embeddings train": dict(train_embeddings=True, dtype="fp32"),
    "products in bf16": dict(dtype="fp32", compute_dtype="bf16"),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", VARIATIONS)
def test_plan_agrees_with_the_simulated_step_of_other_choices(name, checkpointing):
    how = dict(batch=2, sequence=100, rank=8, supervised=0.5, checkpointing=checkpointing) | VARIATIONS[name]
    planned, simulated = plan(SMALL, "qlora", **how), simulate(SMALL, "qlora", **how)
    assert all(planned[part] == simulated[part] for part in EXACT)
    assert close(planned["activations"], simulated["activations"], 0.02)
    assert close(planned.peak, simulated.peak, 0.10)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral"])
def test_plan_agrees_with_the_simulated_step_of_other_families(model_type):
    config = SMALL | dict(model_type=model_type, head_dim=16, tie_word_embeddings=False)
    for method in ("full", "qlora"):
        planned, simulated = (f(config, method, batch=2, sequence=100, rank=8) for f in (plan, simulate))
        assert all(planned[part] == simulated[part] for part in EXACT)
        assert close(planned["activations"], simulated["activations"], 0.02)
        assert close(planned.peak, simulated.peak, 0.10)


def test_a_model_whose_blocks_are_not_modelled_gets_a_note():
    assert any("gemma2" in note for note in plan("gemma-2-9b", "qlora").notes)
    assert plan("llama-3-8b", "qlora").notes == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_70b_step_is_planned_and_its_blocks_simulated_in_little_memory():
    code = """
from labkit.memory.resident import status
from labkit.memory.formulas import plan, simulate
from labkit.models.shapes import config_of
how = dict(checkpointing=True, sequence=1024)
whole = plan("llama-3-70b", "qlora", **how).peak
config = config_of("llama-3-70b")
config.num_hidden_layers = 2
print(whole, plan(config, "qlora", **how).peak, simulate(config, "qlora", **how).peak, status("VmHWM"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    whole, planned, simulated, resident = map(int, done.stdout.split())
    assert 40e9 < whole < 50e9
    assert close(planned, simulated, 0.01)
    assert resident < 2e9


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_operating_system_sees_what_the_allocator_says():
    seen = measure_resident("tiny-llama", "lora", dtype="fp32", batch=4, sequence=512, supervised=0.5)
    assert close(seen["step"], seen["allocated"], 0.10)
    planned = plan("tiny-llama", "lora", dtype="fp32", device="cpu", batch=4, sequence=512, supervised=0.5)
    assert close(planned.peak - planned.static, seen["allocated"], 0.05)


def test_measuring_leaves_the_model_as_it_was():
    setup = Setup(method="qlora", dtype="fp32", rank=4)
    model = subjects.real_model("tiny-llama", setup).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    ledger = measure(model, subjects.make_batch(model.config.vocab_size, 1, 16), checkpointing=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training and not model.is_gradient_checkpointing
    assert not model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64)).requires_grad
    assert torch.equal(generator, torch.get_rng_state())
    assert ledger.counts["trainable"] == trainable(model).trainable


def test_the_time_line_reaches_the_peak_and_comes_back_to_what_is_static(tiny):
    ledger = tiny("lora", False, 2, 100)
    total = ledger.timeline.total
    assert max(total) == ledger.peak
    assert [name for name, _ in ledger.timeline.phases] == ["forward", "backward", "optimizer"]
    simulated = simulate("tiny-llama", "lora", rank=8, dtype="fp32", device="cpu", batch=2, sequence=100)
    assert max(simulated.timeline.total) == simulated.peak
    live = simulated.timeline.live
    forward_ends = dict(simulated.timeline.phases)["backward"]
    assert live["activations"][forward_ends] == max(live["activations"]) == simulated["activations"]
    assert live["gradients"][forward_ends] == 0 < live["gradients"][-1]


def test_the_crossover_is_where_measurement_puts_it(tiny):
    """QLoRA with all that is not in 4 bits in fp32 against LoRA in bf16: more memory from some length on."""
    frame = crossover(
        "tiny-llama",
        a=dict(method="qlora", dtype="fp32"),
        b=dict(method="lora", dtype="bf16"),
        device="cpu",
        rank=8,
        supervised=0.5,
    )
    where = frame.attrs["crossover"]
    assert 64 < where < 512
    for sequence, more in ((64, False), (512, True)):
        a = tiny("qlora", False, 1, sequence).peak
        b = tiny("lora", False, 1, sequence, dtype="bf16").peak
        assert (a > b) is more


def test_in_one_dtype_qlora_never_takes_more_than_lora():
    frame = crossover("tiny-llama", dict(method="qlora"), dict(method="lora"), dtype="fp32", device="cpu")
    assert frame.attrs["crossover"] is None and (frame["difference"] < 0).all()


# -- published figures


def test_torchtunes_measured_lora_of_llama_2_7b_is_predicted_within_15_percent():
    ledger = plan("llama-2-7b", "lora", **PUBLISHED["torchtune"], sequence=512)
    assert close(ledger.peak, 15.57e9, 0.15)
    # QLoRA's 9.29 GB are 9.13 GB reserved when the model had been loaded, and this on top; the step itself takes half
    step = plan("llama-2-7b", "qlora", **PUBLISHED["torchtune"], sequence=512)
    assert step.peak < 0.6 * 9.13e9


def test_unsloths_minimum_for_lora_is_the_weights_in_16_bits_and_not_much_more():
    for name, published in (("llama-3-8b", 22e9), ("llama-3-70b", 164e9)):
        ledger = plan(name, "lora", checkpointing=True, optimizer="adamw8bit", batch=2, sequence=2048)
        assert ledger["weights"] < published and close(ledger.peak, published, 0.20)


# -- the ledger itself


def test_a_ledger_adds_up():
    ledger = plan("smollm2-135m", "full")
    assert ledger.peak == sum(ledger.components(at_peak=True).values()) <= ledger.total
    assert ledger.total == sum(ledger.components().values()) == sum(row.bytes for row in ledger)
    assert list(ledger.components()) == list(COMPONENTS)
    assert all(isinstance(row.bytes, int) and row.formula for row in ledger)
    assert ledger.fits(ledger.peak / 1e9) and not ledger.fits(ledger.peak / 1e9, reserve=0.1)
    assert list(ledger.to_frame().columns) == ["component", "kind", "bytes", "at_peak", "formula", "source"]
    assert size(ledger.peak) in str(ledger)


def test_comparison_gives_ratios():
    one = Ledger([Row("weights", "fp32", 100, 100), Row("activations", "mlp", 50, 0)])
    other = Ledger([Row("weights", "fp32", 50, 50)])
    frame = one.compare(other).set_index(["component", "kind"])["ratio"]
    assert frame["weights", "all"] == 2 and frame["peak", "all"] == 2
    assert math.isinf(frame["activations", "mlp"])


def test_a_ledger_refuses_what_is_no_row():
    with pytest.raises(ValueError, match="component='weight' is not known; choose one of weights"):
        Row("weight", "", 1, 1)
    with pytest.raises(TypeError, match="whole number of bytes"):
        Row("weights", "", 1.5, 1)
    with pytest.raises(KeyError, match="the components are weights"):
        plan(SMALL, "lora")["weigths"]
    with pytest.raises(KeyError, match="activations has the kinds"):
        plan(SMALL, "lora")["activations/mpl"]


# -- bad input


@pytest.mark.parametrize(
    ("model", "choices", "message"),
    [
        ("llama2-7b", {}, "not a known config; did you mean 'llama-2-7b'"),
        ({"hidden_size": 3}, {}, "not the config of a model that transformers knows"),
        (3, {}, "int is no model"),
        ("tiny-llama", dict(method="dora"), "method='dora' is not known; choose one of"),
        ("tiny-llama", dict(sequence=513), "sequence=513 is longer than the 512 positions"),
        ("tiny-llama", dict(sequence=1), "nothing to predict"),
        (
            "tiny-llama",
            dict(rank=129),
            "rank=129 is above 128, the smaller side of model.layers.0.self_attn.k_proj",
        ),
        ("tiny-llama", dict(rank=-1), "rank=-1 must be a whole number"),
        ("tiny-llama", dict(batch=0), "batch=0 must be a whole number"),
        ("tiny-llama", dict(targets="q_porj"), "did you mean 'q_proj'"),
        ("tiny-llama", dict(squence=4), "'squence' is no setting; did you mean 'sequence'"),
        ("tiny-llama", dict(dtype="int4"), "dtype='int4' is not known"),
        ("tiny-llama", dict(optimizer="lion"), "optimizer='lion' is not known; choose one of"),
        ("tiny-llama", dict(supervised=0), "above 0, up to 1"),
        ("tiny-llama", dict(blocksize=100), "blocksize=100 is not known"),
        ("tiny-llama", dict(method="full", train_embeddings=True), "full fine-tuning trains them anyway"),
    ],
)
def test_bad_input_is_explained(model, choices, message):
    with pytest.raises(ValueError, match=message):
        plan(model, **choices)


def test_a_simulation_refuses_what_the_courses_step_does_not_have():
    with pytest.raises(
        ValueError, match="master=True: the step of this course has no such thing to run; use plan"
    ):
        simulate(SMALL, "full", master=True)
    with pytest.raises(ValueError, match="recompute_act=False: .* use plan"):
        simulate(SMALL, "full", recompute_act=False)


def test_measure_refuses_what_it_cannot_measure():
    model = subjects.real_model("tiny-llama", Setup(method="lora", dtype="fp32", rank=2))
    batch = subjects.make_batch(model.config.vocab_size, 1, 8)
    with pytest.raises(ValueError, match="optimizer='lion' is not known"):
        measure(model, batch, optimizer="lion")
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        measure(model.requires_grad_(False), batch)


def test_a_config_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not a JSON file"):
        plan(tmp_path)


def test_a_folder_a_config_and_a_model_give_the_same_ledger(tmp_path):
    config = config_of(SMALL)
    config.save_pretrained(tmp_path)
    model = add_lora(meta_model(config), LoRAConfig(r=2))
    peaks = {plan(given, "lora", rank=8).peak for given in (SMALL, config, tmp_path, model)}
    assert len(peaks) == 1
