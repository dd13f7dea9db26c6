"""Each method trains what it says, and half a training is not a result."""

import pytest
import torch

from labkit.lora.count import trainable
from labkit.quant.linear import QuantLinear
from labkit.sweeps import fitting, runs
from labkit.sweeps.config import RunConfig
from labkit.sweeps.tasks import TASKS
from labkit.training import run as training_run
from tests.sweeps.cases import QUICK

D, LINEARS = 256, 2_949_120  # tiny-llama's width, and the weights of its linear layers


@pytest.mark.parametrize(
    "settings, parameters",
    [
        ({"method": "full"}, 4_000_000),
        ({"method": "full", "embeddings": False}, 4_000_000 - 4096 * D),
        ({"method": "lora", "r": 8}, 149_504),
        ({"method": "lora", "r": 8, "targets": "attention"}, 4 * 8 * (2 * 2 * D + 2 * (D + 128))),
        ({"method": "lora", "r": 8, "embeddings": True}, 149_504 + 4096 * D),
        ({"method": "qlora", "r": 1}, 149_504 // 8),
        ({"method": "subspace", "d": 50}, 50),
        ({"method": "lora", "variant": "dora"}, 149_504 + 4 * (2 * D + 2 * 128 + 2 * 704 + D)),
        ({"method": "ia3"}, 4 * (2 * 128 + 704)),
        ({"method": "prompt", "size": 20}, 20 * D),
        ({"method": "prefix", "size": 146}, 149_504),
        ({"method": "bottleneck", "size": 36}, 8 * (2 * D * 36 + 36 + D)),
        ({"method": "none"}, 0),
    ],
    ids=str,
)
def test_each_method_trains_what_it_says(settings, parameters):
    model, _ = fitting.prepare(RunConfig(**settings))
    assert trainable(model).trainable == parameters
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear))
    assert quantized == (LINEARS if settings["method"] == "qlora" else 0)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_the_dtype_of_products_is_the_one_that_was_asked_for(products):
    model, _ = fitting.prepare(RunConfig(method="qlora", products=products))
    assert {m.compute_dtype for m in model.modules() if isinstance(m, QuantLinear)} == {
        getattr(torch, products)
    }


def test_an_adapter_in_bf16_has_its_optimizer_state_in_bf16_and_trains():
    config = RunConfig(**QUICK, adapter_dtype="bfloat16")
    model, _, _ = fitting.fit(config, TASKS["facts"].records(config))
    matrices = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" not in name} == {torch.float32}
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if name.endswith("lora_B"))
    optimizer = torch.optim.AdamW(matrices, fused=True)
    for p in matrices:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}


def test_training_that_was_interrupted_is_no_result(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "supervised_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.run(RunConfig(**QUICK))
