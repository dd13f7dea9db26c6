"""Section paging: what its rows hold, the simulated cap, and what follows from the rows."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from gpu import paging, paging_subjects, paging_valve
from gpu.capped import CardMemory, SimulatedMemory, capped_memory
from gpu.measurement import Skipped, Stage
from gpu.paging import SECTION, bits_are_equal, conclude, cost_at, rate_of_copies
from gpu.paging_subjects import state_bytes, trained_model
from gpu.paging_valve import Training, repeatable, the_valve

from labkit.optim.paging import attach_paging

COST = {"budget_share", "step_s", "plain_s", "ratio", "bits_equal"}
VALVE = {
    *("cap_bytes", "plain_died_at_length", "paged_reached_length", "losses_equal", "budget_bytes", "lengths"),
}


@pytest.fixture(scope="module")
def valve(tmp_path_factory):
    """The row of a rehearsal."""
    return the_valve(Stage(torch.device("cpu"), torch.float32, True, tmp_path_factory.mktemp("scratch")))


def test_under_a_cap_the_plain_run_dies_and_the_paged_one_goes_on_with_the_losses_of_one_without(valve):
    assert valve.keys() >= VALVE and valve["cap"] == "simulated on the CPU"
    assert valve["plain_died_at_length"] in valve["lengths"][1:]
    assert valve["plain_error"].startswith("OutOfMemoryError: a simulated cap")
    assert valve["paged_reached_length"] == valve["lengths"][-1] and valve["paged_error"] is None
    assert valve["losses_equal"] and valve["plain_losses_equal"]
    assert valve["budget_at_end_bytes"] < valve["budget_bytes"]
    assert 1 <= valve["failed_passes"] < len(valve["losses"])
    assert valve["needed_bytes"] == sorted(valve["needed_bytes"])
    json.dumps(valve, allow_nan=False)


def test_the_cap_is_gone_afterwards_also_when_a_run_failed(stage):
    with (
        pytest.raises(torch.OutOfMemoryError, match="a simulated cap of 1,000 bytes"),
        capped_memory(stage) as memory,
    ):
        memory.cap(1000)
        torch.zeros(1000)
    assert torch.zeros(1000).sum() == 0


def test_without_activations_that_outgrow_the_state_no_cap_is_tried(stage, monkeypatch):
    monkeypatch.setattr(paging_valve, "REHEARSED", (32, 33))
    with pytest.raises(Skipped, match="do not outgrow the state"):
        the_valve(stage)


def test_a_run_that_died_leaves_nothing_behind(stage):
    _, model = trained_model(stage, ())
    start = [p.detach().clone() for p in model.parameters()]
    with repeatable(), capped_memory(stage, [*model.parameters(), *start]) as memory:
        before = memory.now
        memory.cap(before + 3 * state_bytes(start) // 2 + 2_000_000)
        run = Training(model, start, stage).train((32, 256))
        assert run.died_at == 256 and run.reached == 32 and len(run.losses) == 2
        run.close()
        stage.tidy()
        assert memory.now - before < 10_000  # constants of the model


def test_a_simulated_peak_is_the_most_that_was_alive_at_a_time():
    kept = torch.zeros(1000)
    with SimulatedMemory([kept]) as memory:
        assert memory.now == 4000
        one = kept + 1
        other = one.view(10, 100)  # of the same storage
        del one
        two = other * 2
        del other, two
        assert memory.now == 4000 and memory.peak() == 12_000
        assert memory.peak() == 4000


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_cost_of_a_budget_has_what_lessons_read_and_equal_bits(share, stage, monkeypatch):
    monkeypatch.setattr(paging, "ROUNDS", 2)
    row = cost_at(stage, share)
    assert row.keys() >= COST and row["budget_share"] == share and row["bits_equal"] is True
    assert row["ratio"] == row["step_s"] / row["plain_s"] and row["tier"] == "a file"
    assert (row["bytes_moved"] == 0) == (share == 1)
    if share < 1:  # a cycle that does not fit: nearly all of the state goes out and in
        assert row["state_bytes"] < row["bytes_moved"] <= 2 * row["state_bytes"]
        assert row["share_of_copy"] == row["gb_per_s"] / row["copy_gb_per_s"]
    json.dumps(row, allow_nan=False)


def test_the_state_is_at_least_what_a_pager_counts_and_hardly_more(stage):
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), (64, 64), (1000, 33), (1 << 20,))]
    with attach_paging(torch.optim.AdamW(parameters, fused=True), 2**40, stage.scratch / "store") as pager:
        total = pager.table.total_bytes
    assert total <= state_bytes(parameters) <= total + 4096 * len(parameters)


def test_bits_that_differ_are_seen(stage, monkeypatch):
    values = [torch.ones(5000), torch.ones(40, 40)]
    assert bits_are_equal(values, state_bytes(values[:1]), stage)
    from labkit.optim.page_store import FileStore

    read = FileStore.read

    def careless(self, slot, tensors):
        read(self, slot, tensors)
        tensors[0].tensor[64] ^= 1

    monkeypatch.setattr(FileStore, "read", careless)
    assert not bits_are_equal(values, state_bytes(values[:1]), stage)


def test_plain_copies_have_a_rate(stage):
    assert rate_of_copies(stage, 100_000) > 0


# --- on a GPU, as far as it can be tried without one


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A stage with a GPU of which only the sizes are known; models are their names."""
    sizes = SimpleNamespace(free=80 * 10**9, on_host=100 * 10**9)
    monkeypatch.setattr(paging_subjects, "free_bytes", lambda device: sizes.free)
    monkeypatch.setattr(paging_subjects, "limits", lambda: SimpleNamespace(free=sizes.on_host))
    monkeypatch.setattr(paging_subjects, "random_model", lambda name, *_: f"the {name}")
    return Stage(torch.device("cuda", 0), torch.bfloat16, False, tmp_path), sizes


def test_the_model_is_the_largest_for_which_card_and_host_have_room(card):
    stage, sizes = card
    assert trained_model(stage, paging.MODELS) == ("smollm2-360m", "the smollm2-360m")
    sizes.on_host = 5 * 10**9  # two pagers pin 2.9 GB each
    assert trained_model(stage, paging.MODELS)[0] == "smollm2-135m"
    sizes.on_host, sizes.free = 100 * 10**9, 14 * 10**9
    assert trained_model(stage, paging.MODELS)[0] == "smollm2-135m"
    sizes.free = 2 * 10**9
    with pytest.raises(
        Skipped, match=r"smollm2-135m needs \d+\.\d GB of the GPU .* 2\.0 and 100\.0 GB are free"
    ):
        trained_model(stage, paging.MODELS)


def test_on_a_card_the_cap_is_that_of_pytorchs_allocator_and_is_taken_away(card, monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    with pytest.raises(torch.OutOfMemoryError), capped_memory(card[0]) as memory:
        assert isinstance(memory, CardMemory)
        memory.cap(250)
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert shares == [0.25, 1.0]


def test_bitsandbytes_pages_on_a_gpu_only(stage):
    with pytest.raises(Skipped, match="needs a GPU"):
        paging.bitsandbytes_paged(stage)


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A rehearsal that takes itself for a GPU, and a bitsandbytes whose optimizers are PyTorch's."""

    class Pretended(Stage):
        cuda = True
        wait = tidy = lambda self: None

    stage = Stage(torch.device("cpu"), torch.float32, True, tmp_path)
    module = ModuleType("bitsandbytes.optim")
    module.AdamW32bit = module.PagedAdamW32bit = torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    model = trained_model(stage, ())
    monkeypatch.setattr(paging, "trained_model", lambda *_: model)
    monkeypatch.setattr(paging, "capped_memory", lambda _: SimulatedMemory(model[1].parameters()))
    monkeypatch.setattr(paging, "laps", lambda ways, *_: {way: [call() or 0.5] for way, call in ways.items()})
    monkeypatch.setattr(paging, "LENGTHS", (32, 128, 160))
    return Pretended(torch.device("cpu"), torch.float32, False, tmp_path)


def test_what_bitsandbytes_manages_is_not_called_counted(pretended):
    row = paging.bitsandbytes_paged(pretended)
    assert row["state_is_counted"] is False and "does not show that anything was paged out" in row["note"]
    assert row["ratio"] == 1 and row["plain_died_at_length"] in (128, 160)
    assert paging.conclude({"bitsandbytes' paged AdamW": row})[0].endswith(row["note"])
    json.dumps(row, allow_nan=False)


def test_more_managed_memory_than_is_free_is_not_asked_for(pretended, monkeypatch):
    monkeypatch.setattr(paging, "free_bytes", lambda device: 1000)
    with pytest.raises(Skipped, match=r"managed memory, 0\.0 GB, would not fit"):
        paging.bitsandbytes_paged(pretended)


# --- the record


def test_the_valve_comes_first_and_what_is_never_given_back_last(stage):
    keys = [measurement.key for measurement in SECTION.measurements(stage)]
    assert keys[0] == "the valve" and keys[-1] == "bitsandbytes' paged AdamW"
    assert set(keys[1:-1]) == {"budget 100 %", "budget 50 %", "budget 25 %", "budget 10 %"}
    assert sum(measurement.seconds for measurement in SECTION.measurements(stage)) <= 60


def test_conclusions_say_what_happened(valve):
    cost = {"model": "m", "tokens": 4096, "ratio": 1.5, "bits_equal": True}
    rows = {
        "the valve": valve,
        "budget 25 %": {**cost, "budget_share": 0.25},
        "budget 100 %": {**cost, "budget_share": 1.0, "ratio": 1.1},
    }
    opened, costs, bits = conclude(rows)
    assert (
        f"plain run died at {valve['plain_died_at_length']} tokens" in opened
        and "with the losses of" in opened
    )
    assert "1.10 at 100 %, 1.50 at 25 % of the state" in costs and "equal bit for bit" in bits
    wrong = {**valve, "plain_died_at_length": None, "losses_equal": False, "paged_reached_length": 64}
    assert (
        "did not die" in conclude({"the valve": wrong})[0]
        and "OTHER losses" in conclude({"the valve": wrong})[0]
    )
    rows["budget 25 %"]["bits_equal"] = False
    assert "NOT equal" in conclude(rows)[2]
    assert conclude({}) == []
