"""FSDP2 over a QLoRA model: what it divides, what it sends, what it computes, and what only looks divided."""

import pytest
import torch

from labkit import QuantLinear
from labkit.scale import ranks, sharding, traffic
from tests.scale import parts
from tests.scale.test_data_parallel import ROUNDING, alone, furthest  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def divided():
    return ranks.start(parts.train_sharded, 2, 4, True, counted=True)


@pytest.mark.slow
def test_a_sharded_model_takes_the_step_of_one_process_on_unchanged_codes(alone, divided):  # noqa: F811
    for found in divided:
        assert found["losses"] == pytest.approx(alone["losses"], abs=ROUNDING)
        assert furthest(found["adapters"], alone["adapters"]) < ROUNDING
        assert found["same codes"]


@pytest.mark.slow
def test_a_step_sends_what_the_formula_says_to_the_byte(divided):
    expected = traffic.fsdp_step(divided[0]["groups"], 2)
    assert min(expected.values()) > 0
    for step in range(parts.STEPS):
        assert {op: sum(found["counts"][step][op] for found in divided) for op in expected} == expected


@pytest.mark.slow
def test_bytes_in_buffers_stay_whole_on_each_rank_and_as_parameters_they_are_divided(divided):
    buffers = ranks.start(parts.train_sharded, 2, 4, False, counted=True)
    for as_buffers, as_parameters in zip(buffers, divided):
        whole = as_buffers["before"]["4 bits"]
        assert as_buffers["after"]["4 bits"] == whole and as_parameters["after"]["4 bits"] == whole // 2
        for kind in ("adapters", "others"):
            assert (
                as_parameters["after"][kind] <= as_parameters["before"][kind] / 2 + 4096
            )  # and rotary frequencies
        assert as_parameters["trained"]["gradients"] == as_parameters["after"]["adapters"]
        assert as_parameters["trained"]["optimizer"] == as_parameters["after"]["adapters"]  # momentum
        assert as_buffers["losses"] == pytest.approx(as_parameters["losses"], abs=ROUNDING)
        assert as_parameters["refusal"] == ""
        assert (
            "28 4-bit layers keep their bytes in buffers, which FSDP2 leaves whole" in as_buffers["refusal"]
        )


@pytest.mark.slow
def test_bitsandbytes_bytes_are_parameters_and_divided_as_ours():
    for found in ranks.start(parts.shard_bitsandbytes, 2):
        assert found["sharded"] == found["ours"] == found["whole"] // 2


def test_codes_stored_as_floats_help_fsdp1_and_are_spoiled_by_mixed_precision_in_fsdp2():
    for found in ranks.start(parts.store_as_floats, 2):
        assert found["FSDP1 uint8"] == "Cannot flatten integer dtype tensors"
        assert found["FSDP1 bf16"] == (256 + 2 * 128) // 2
        assert found["FSDP2 uint8"] and not found["FSDP2 bf16"]
    with pytest.raises(ValueError, match="3 bytes are not a whole number of torch.bfloat16"):
        sharding.stored_as(torch.zeros(3, 1, dtype=torch.uint8), torch.bfloat16)


@pytest.mark.slow
def test_a_launcher_that_was_asked_for_fsdp_and_gave_something_else_is_found_out():
    for found in ranks.start(parts.ask_accelerate, 2):
        assert found["kind"] == "DDP" and found["class"] == "DistributedDataParallel"
        assert found["said"].startswith(
            "this model was to be sharded, and is DDP (DistributedDataParallel): every rank"
        )


def test_a_layer_that_holds_its_bytes_as_parameters_is_the_same_layer():
    layer = QuantLinear.from_linear(torch.nn.Linear(128, 96))
    x = torch.randn(5, 128)
    y, keys, weight = layer(x), set(layer.state_dict()), layer.weight
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.hold_bytes(True)
    assert {n for n, p in layer.named_parameters() if p.dtype == torch.uint8} == {"packed", "absmax_codes"}
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")
    assert (
        torch.equal(layer(x), y) and set(layer.state_dict()) == keys and layer.weight.nbytes == weight.nbytes
    )
    half = layer.half()
    assert half.absmax_absmax.dtype == torch.float32 and half.packed.dtype == torch.uint8
    other = QuantLinear.from_linear(torch.nn.Linear(128, 96), blocksize=128)
    other.hold_bytes(True)
    other.load_state_dict(state)  # of another block size
    assert isinstance(other.packed, torch.nn.Parameter) and torch.equal(other(x), y)
    other.hold_bytes(False)
    assert [n for n, _ in other.named_parameters()] == ["bias"] and torch.equal(other(x), y)
