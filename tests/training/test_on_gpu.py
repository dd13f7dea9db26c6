"""On a GPU: the losses are the CPU's, a run goes on exactly, answers are the same. Needs one; imports nothing optional.

In fp32 GPU and CPU differ by the order of their sums, about 1e-6 of a loss in one step; Adam makes more of it in the
steps after. What must be the same bits is computed twice on the GPU, with PyTorch's plain attention: the backward pass
of the fused ones adds up in an order of its own each time.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.data.batches import collate
from labkit.data.encoding import encode_all
from labkit.data.tickets import load_tickets, ticket_answer
from labkit.hardware import compute_dtype
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from labkit.quant.linear import QuantLinear
from labkit.training.config import TrainConfig
from labkit.training.evaluate import generate, held_out_loss
from labkit.training.loop import train
from labkit.training.loss import supervised_loss
from labkit.training.recompute import checkpoint_blocks
from tests.training.small_runs import SHORT, weights

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = ("full", "lora", "qlora")
QUIET = {"progress": False, "batch_size": 2, "steps": 6, "lr": 2e-3}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """No TF32 in products of fp32, whatever the session has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def tickets() -> list[dict]:
    """Sixteen records for tiny-llama."""
    return [
        {"prompt": t["message"], "completion": ticket_answer(t["label"])} for t in load_tickets("train")[:16]
    ]


def prepared(tiny, method: str, dropout: float = 0.0) -> nn.Module:
    """tiny-llama on the CPU, ready to train."""
    model = copy.deepcopy(tiny[0])
    torch.manual_seed(3)
    if method == "full":
        return model.requires_grad_(True)
    config = LoRAConfig(r=8, dropout=dropout)
    return add_lora(model, config) if method == "lora" else add_qlora(model, config)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` with its frozen weights in `dtype`; what trains stays in fp32."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and not p.requires_grad:
                module._parameters[name] = nn.Parameter(p.to(dtype), requires_grad=False)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_run_has_the_losses_of_the_cpu_in_fp32(tiny, tickets, method):
    config = TrainConfig(**QUIET | {"steps": 8})
    model = prepared(tiny, method)
    expected, made = copy.deepcopy(model), model.to(DEVICE)
    on_cpu, on_gpu = (train(m, tiny[1], tickets, config) for m in (expected, made))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-4)
    assert on_gpu.losses[0] == pytest.approx(on_cpu.losses[0], rel=1e-5), "before anything has been learned"
    norms = [[step["grad_norm"] for step in history.steps] for history in (on_gpu, on_cpu)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    distance = (weights(made).cpu() - weights(expected)).norm() / weights(expected).norm()
    assert distance < 1e-3


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_run_in_16_bits_stays_close_to_the_cpus_in_fp32(tiny, tickets, method):
    dtype = compute_dtype(DEVICE)
    if dtype == torch.float32:
        pytest.skip("this GPU has no bf16 in hardware")
    config = TrainConfig(**QUIET | {"steps": 8})
    expected = prepared(tiny, method)
    made = in_dtype(copy.deepcopy(expected).to(DEVICE), dtype)
    on_cpu, on_gpu = (train(m, tiny[1], tickets, config) for m in (expected, made))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=0.03) and on_gpu.losses != on_cpu.losses
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tiny, tmp_path, method):
    """Dropout draws from the GPU's generator, whose state is in the checkpoint."""

    def model():
        return prepared(tiny, method, dropout=0.1).to(DEVICE)

    def press_stop(module, *_):
        calls.extend([1] * module.training)
        if len(calls) == 4 and module.training:
            raise KeyboardInterrupt

    with sdpa_kernel(SDPBackend.MATH):
        whole_model = model()
        whole = train(whole_model, tiny[1], SHORT, TrainConfig(**QUIET))
        config, calls, stopped_model = TrainConfig(**QUIET, checkpoint_folder=tmp_path), [], model()
        hook = stopped_model.model.norm.register_forward_hook(press_stop)
        stopped = train(stopped_model, tiny[1], SHORT, config)
        hook.remove()
        assert (stopped.stopped, len(stopped.steps)) == ("interrupted", 3)
        torch.rand(1000, device=DEVICE)  # moves the generator on
        again_model = model()
        again = train(again_model, tiny[1], SHORT, config)
    assert again.losses == whole.losses
    assert torch.equal(weights(again_model), weights(whole_model))


def test_a_checkpoint_of_the_cpu_goes_on_on_the_gpu(tiny, tmp_path):
    whole = train(prepared(tiny, "lora"), tiny[1], SHORT, TrainConfig(**QUIET))
    config, model, calls = TrainConfig(**QUIET, checkpoint_folder=tmp_path), prepared(tiny, "lora"), []

    def press_stop(module, *_):
        calls.extend([1] * module.training)
        if len(calls) == 4 and module.training:
            raise KeyboardInterrupt

    model.model.norm.register_forward_hook(press_stop)
    assert len(train(model, tiny[1], SHORT, config).steps) == 3
    again = train(prepared(tiny, "lora").to(DEVICE), tiny[1], SHORT, config)
    assert again.losses == pytest.approx(whole.losses, rel=1e-4) and again.losses[:3] == whole.losses[:3]


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_of_blocks_gives_the_same_gradients(tiny, tickets, method):
    model = prepared(tiny, method).to(DEVICE).train()
    batch = collate(encode_all(tickets[:2], tiny[1], 512)[0], tiny[1].pad_token_id).to(DEVICE)
    found = []
    with sdpa_kernel(SDPBackend.MATH):
        for again in (False, True):
            if again:
                checkpoint_blocks(model)
            model.zero_grad(set_to_none=True)
            supervised_loss(model, batch).backward()
            found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert any(gradient.abs().max() > 0 for gradient in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_greedy_answers_are_the_tokens_of_the_cpu_also_in_batches(tiny):
    prompts = [t["message"] for t in load_tickets("test")[:8]]
    model = add_qlora(copy.deepcopy(tiny[0]), LoRAConfig(r=4))
    expected = generate(model, tiny[1], prompts, 16, batch_size=8, progress=False)
    model.to(DEVICE)
    for batch_size in (1, 8):
        assert generate(model, tiny[1], prompts, 16, batch_size, progress=False) == expected
    assert any(expected)


def test_the_held_out_loss_is_the_cpus(tiny, tickets):
    model = copy.deepcopy(tiny[0])
    expected, tokens = held_out_loss(model, tiny[1], tickets)
    assert held_out_loss(model.to(DEVICE), tiny[1], tickets) == (pytest.approx(expected, rel=1e-5), tokens)


def test_under_autocast_products_are_in_16_bits_and_the_loss_is_close(tiny, tickets):
    model = prepared(tiny, "qlora").to(DEVICE).train()
    batch = collate(encode_all(tickets[:4], tiny[1], 512)[0], tiny[1].pad_token_id).to(DEVICE)
    plain = supervised_loss(model, batch)
    dtype = torch.bfloat16 if compute_dtype(DEVICE) == torch.bfloat16 or DEVICE == "cpu" else torch.float16
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    layer.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    with torch.autocast(DEVICE, dtype=dtype):
        loss = supervised_loss(model, batch)
    loss.backward()
    assert seen == [dtype]
    assert loss.item() == pytest.approx(plain.item(), rel=0.03)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients if g is not None)
