"""N ranks with b examples each take the step of one process with N·b, and send what the formulas say."""

import pytest
import torch

from labkit.quant.linear import QuantLinear
from labkit.scale import data_parallel, ranks, traffic
from labkit.training.loss import supervised_loss
from tests.scale import parts

ROUNDING = 1e-6


def one_process(bits: int) -> dict:
    """The same steps on whole batches."""
    model = parts.tiny_qlora(bits)
    optimizer, losses = parts.optimizer_of(model), []
    for batch in parts.batches():
        optimizer.zero_grad()
        loss = supervised_loss(model, batch) / batch.n_supervised
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "adapters": parts.adapters(model), "model": model}


@pytest.fixture(scope="module")
def alone():
    return one_process(bits=4)


def furthest(some: dict, others: dict) -> float:
    assert some.keys() == others.keys()
    return max((some[name] - others[name]).abs().max().item() for name in some)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_ranks_with_shares_equal_one_process_with_all_and_the_wire_carries_the_adapters_only(alone, number):
    for found in (results := ranks.start(parts.train_shares, number, "written out", 4, counted=True)):
        assert found["losses"] == pytest.approx(alone["losses"], abs=ROUNDING)
        assert furthest(found["adapters"], alone["adapters"]) < ROUNDING
    assert furthest(results[0]["adapters"], results[-1]["adapters"]) == 0
    expected = traffic.ddp_step(alone["adapters"].values(), number)
    for step in range(parts.STEPS):
        whole = [t for found in results for t in found["counts"][step] if t[1] == "float32"]
        assert sum(sent for *_, sent in whole) == expected
        assert {op for op, *_ in whole} == {"all_reduce"}


@pytest.mark.slow
def test_DDP_takes_the_same_step_and_sends_the_base_in_each_unless_told_not_to(alone):
    frozen = sum(b.nbytes for b in alone["model"].buffers())
    assert frozen > sum(m.weight.nbytes for m in alone["model"].modules() if isinstance(m, QuantLinear)) > 0
    expected = traffic.ddp_step(alone["adapters"].values(), 2)
    for way, buffers in (("DDP", 0), ("DDP with buffers", frozen)):
        results = ranks.start(parts.train_shares, 2, way, 4, counted=True)
        for found in results:
            assert found["losses"] == pytest.approx(alone["losses"], abs=ROUNDING)
            assert furthest(found["adapters"], alone["adapters"]) < ROUNDING
        for step in range(parts.STEPS):
            counts = [t for found in results for t in found["counts"][step]]
            assert (
                sum(sent for op, dtype, _, sent in counts if (op, dtype) == ("all_reduce", "float32"))
                == expected
            )
            if step == 1:  # when DDP agrees on the order of its buckets, once
                continue
            assert (
                sum(sent for op, *_, sent in counts if op == "broadcast") == buffers
            )  # from rank 0 to rank 1


def test_a_rank_count_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^7 examples cannot be divided among 2 ranks.*give 6 or 8$"):
        data_parallel.share(range(7), 0, 2)
    with pytest.raises(ValueError, match="give 3$"):
        data_parallel.share([], 0, 3)
    torch.testing.assert_close([*data_parallel.share(range(6), 1, 3)], [1, 4])
