"""The ledger of one rank against two ranks that run, and what it says of models that do not fit here."""

import pytest

from labkit import memory
from labkit.scale import ranks
from tests.scale import parts

SETTINGS = {"r": 8, "dtype": "fp32", "max_length": 256, "device": "cpu"}
TINY = "data/tiny-llama"


@pytest.mark.slow
@pytest.mark.parametrize("shard", [None, "all"])
def test_the_plan_of_a_rank_is_what_two_ranks_hold(shard):
    plan = memory.plan(TINY, "qlora", ranks=2, shard=shard, **SETTINGS)
    for found in ranks.start(parts.memory_of_a_step, 2, shard or "whole"):
        static = found["with gradients"]
        assert static["4 bits"] == plan["weights/4 bits"]
        assert static["scales"] == plan["constants"]
        assert static["adapters"] == plan["lora"]
        assert static["others"] == plan["weights"] - plan["weights/4 bits"]
        assert static["gradients"] == plan["gradients/of all that trains"]
        assert static["optimizer"] == plan["optimizer"]
        peak = sum(found["static"].values()) + found["step"]
        print(shard, plan.peak, peak, plan.peak / peak, plan, found)
        assert plan.peak == pytest.approx(peak, rel=0.1)


def test_zero_1_is_useless_for_lora_and_divides_most_of_full_fine_tuning():
    """ZeRO, figure 1: with AdamW in mixed precision 12 of 16 bytes per parameter are the optimizer's."""

    def saved(method: str, shard: str, **settings) -> float:
        one, part = (memory.plan("llama-2-7b", method, ranks=8, shard=s, **settings) for s in (None, shard))
        return 1 - part.static / one.static

    full = saved("full", "optimizer", master=True)
    assert full == pytest.approx(7 / 8 * 12 / 14, abs=0.01)  # without gradients, which are not static
    assert saved("lora", "optimizer") < 0.03
    assert saved("qlora", "optimizer") < 0.08
    assert saved("lora", "all") > 0.85


def test_published_figures_of_a_70b_model_on_two_cards():
    """PEFT's documentation, "Use PEFT QLoRA and FSDP for finetuning large models on multiple GPUs"."""
    settings = {
        "r": 8,
        "max_length": 2048,
        "batch_size": 2,
        "checkpointing": True,
        "logits": "all",
        "adapter_dtype": "bf16",
    }
    plain = memory.plan("llama-2-70b", ranks=2, shard="all", **settings)
    offloaded = memory.plan("llama-2-70b", ranks=2, shard="all", offload=True, **settings)
    print(plain, offloaded, offloaded.counts)
    assert plain.peak / 1e9 == pytest.approx(35.6, rel=0.25)
    assert offloaded.peak < plain.peak - 15e9 and offloaded.fits(24)
    assert 2 * offloaded.counts["host_bytes"] > 30e9


def test_settings_that_do_not_go_together():
    with pytest.raises(
        ValueError, match="offload=True keeps what is sharded, and shard=None; give shard='all'"
    ):
        memory.plan(TINY, ranks=2, offload=True)
    with pytest.raises(ValueError, match="shard='zero3' is not known"):
        memory.plan(TINY, ranks=2, shard="zero3")
    with pytest.raises(ValueError, match="ranks=0 must be a whole number"):
        memory.plan(TINY, ranks=0)
    alone = memory.plan(TINY)
    assert memory.plan(TINY, ranks=1, shard="all").rows == alone.rows
