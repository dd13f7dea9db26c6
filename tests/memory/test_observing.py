"""Whoever measures changes nothing: a snapshot of everything, before and after every public measurer."""

import os
import random
import subprocess

import numpy as np
import pytest
import torch

import labkit.memory
from labkit.hardware import fast_paths
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.memory.formulas import crossover, plan
from labkit.memory.measurement import measure
from labkit.memory.observing import left_as_found
from labkit.memory.resident import measure_resident
from labkit.memory.simulation import simulate
from labkit.memory.subjects import make_batch
from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.paging import attach_paging
from labkit.training.loss import supervised_loss
from labkit.training.recompute import checkpoint_blocks
from tests.conftest import make_small_llama
from tests.memory.conftest import SMALL

T = torch.optim
OPTIMIZERS = {
    "AdamW, fused": lambda p: T.AdamW(p, fused=True),
    "SGD, momentum": lambda p: T.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Rprop": T.Rprop,  # whose steps do not follow the learning rate
    "paged, 8 bits": lambda p: AdamW8bit(p, min_8bit_size=0),
}
OTHERS = {
    "PUBLISHED",
    "METHODS",
    "Ledger",
    "LedgerRow",
    "Setup",
    "Timeline",
    "size",
    "make_batch",
    "random_model",
    "real_model",
}


def bits(value):
    """Something that is equal if and only if the value is, to the bit."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1)
        return (
            id(value),
            str(value.dtype),
            tuple(value.shape),
            value.requires_grad,
            data.view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {str(key): bits(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(one) for one in value]
    return repr(value)


def without_identity(state):
    return {key: v.tolist() if isinstance(v, torch.Tensor) else v for key, v in state.items()}


def snapshot(model, optimizer):
    """All that a measurer could change."""
    seen = {"generators": [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]}
    seen["process"] = [
        dict(os.environ),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.utils._python_dispatch._get_current_dispatch_mode(),
        fast_paths(),
        torch.get_rng_state.__name__,
    ]
    for name, module in model.named_modules():
        seen[name] = {
            key: bits(value) for key, value in vars(module).items() if not key.startswith("_modules")
        }
    seen["config"] = bits(vars(model.config))
    for name, p in model.named_parameters():
        hooks = len(p._post_accumulate_grad_hooks or ()), len(p._backward_hooks or ())
        seen[f"{name}, beside its value"] = [p.grad is not None and bits(p.grad), p._version, hooks]
    seen["groups"] = [[id(group), bits(group)] for group in optimizer.param_groups]
    paged = hasattr(optimizer, "pager")
    states = optimizer.state.items()
    seen["state"] = [[id(p), list(s), without_identity(s) if paged else bits(s)] for p, s in states]
    kept = ("state", "param_groups", "pager")
    seen["optimizer"] = {key: bits(value) for key, value in vars(optimizer).items() if key not in kept}
    if paged:
        table = optimizer.pager.table
        seen["log"] = [table.step, dict(table.counts), list(table.events), table.bytes_in, table.peak_bytes]
    return seen


def changes(before, model, optimizer):
    """Where a snapshot from now differs from one from before."""
    now = snapshot(model, optimizer)
    return [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]


def subject(kind="AdamW, fused", tmp_path=None, buffers=True):
    """A model in the middle of a training run: some modules in eval(), hooks, gradients, moments; its optimizer."""
    model = add_lora(make_small_llama(), LoRAConfig(r=4, dropout=0.1))
    model.train()
    model.model.layers[0].eval()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    if buffers:
        model.model.norm.register_buffer("calls", torch.zeros(3))

        def count(module, *_):
            module.calls += 1  # like the running mean of a batch norm

        model.model.norm.register_forward_hook(count)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[kind](parameters)
    if kind.startswith("paged"):
        attach_paging(optimizer, 20_000, tmp_path)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    frozen.grad = torch.ones_like(frozen)
    return model, optimizer


def batch_for(model):
    return make_batch(model.config.vocab_size, 2, 12, 0.5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_measured_step_leaves_model_optimizer_and_process_as_they_were(kind, tmp_path):
    model, optimizer = subject(kind, tmp_path)
    before = snapshot(model, optimizer)
    measure(model, batch_for(model), optimizer)
    assert changes(before, model, optimizer) == []


@pytest.mark.parametrize(("was", "measured"), [(False, True), (True, False)])
def test_checkpointing_is_as_it_was_whichever_way_a_step_is_measured(was, measured):
    model, optimizer = subject()
    if was:
        checkpoint_blocks(model)
    before = snapshot(model, optimizer)
    ledger = measure(model, batch_for(model), "sgd", checkpointing=measured)
    assert changes(before, model, optimizer) == [] and model.is_gradient_checkpointing is was
    expected = measure(subject()[0], batch_for(model), "sgd", checkpointing=measured)
    assert ledger["activations"] == expected["activations"], "what was asked for is what was measured"


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_after_a_failure_everything_is_as_it_was(where, monkeypatch):
    model, optimizer = subject()
    calls = []

    def fails(*_):
        calls.append(where)
        if len(calls) > 1:  # not in the step that warms up
            raise ArithmeticError("broken")

    if where == "forward":
        model.model.layers[1].register_forward_hook(fails)
    elif where == "backward":
        next(p for p in model.parameters() if p.requires_grad).register_post_accumulate_grad_hook(fails)
    else:
        optimizer.register_step_post_hook(fails)
    before = snapshot(model, optimizer)
    with pytest.raises(ArithmeticError):
        measure(model, batch_for(model), optimizer)
    assert changes(before, model, optimizer) == []


def test_a_loss_from_before_a_measurement_is_differentiated_after_it():
    gradients = []
    for measured in (False, True):
        model, optimizer = subject(buffers=False)
        optimizer.zero_grad()
        torch.manual_seed(3)
        loss = supervised_loss(model, batch_for(model))
        if measured:
            measure(model, batch_for(model), optimizer)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_it_measures_where_gradients_are_off_and_leaves_them_off():
    model, optimizer = subject()
    with torch.no_grad():
        before = snapshot(model, optimizer)
        assert measure(model, batch_for(model), optimizer)["gradients"] > 0
        assert changes(before, model, optimizer) == []


def test_plans_and_simulations_change_nothing_either(monkeypatch):
    model, optimizer = subject()
    answer = subprocess.CompletedProcess((), 0, stdout='{"before": 1}', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)  # its steps are taken in another process
    measurers = {
        "plan": lambda: plan(model, "lora", r=4, max_length=16),
        "simulate": lambda: simulate(SMALL, "qlora", r=4, max_length=16),
        "crossover": lambda: crossover(SMALL, dict(method="qlora"), dict(method="lora"), [16, 32], r=4),
        "measure": lambda: measure(model, batch_for(model), optimizer),
        "measure_resident": lambda: measure_resident("tiny-llama", "lora"),
    }
    assert measurers.keys() | OTHERS == set(labkit.memory.__all__), "a new measurer has to be tried here"
    before = snapshot(model, optimizer)
    for name, run in measurers.items():
        run()
        assert (name, changes(before, model, optimizer)) == (name, [])


def test_no_trace_of_a_tracker_stays_with_the_tensors_that_it_watched():
    import weakref

    model, optimizer = subject()
    before = len(weakref.finalize._registry)
    measure(model, batch_for(model), optimizer)
    assert len(weakref.finalize._registry) <= before


def test_a_buffer_that_is_replaced_and_an_attribute_that_is_new_are_put_back():
    model, optimizer = subject()
    before = snapshot(model, optimizer)
    with left_as_found(model, optimizer):
        model.model.norm.calls = torch.ones(5)
        model.model.norm.extra = 1
        model.requires_grad_(True)
        model.config.use_cache = not model.config.use_cache
        optimizer.param_groups[0]["lr"] = 7
        optimizer.state.clear()
        os.environ["KINETO_LOG_LEVEL"] = "7"
        torch.rand(3), np.random.rand(), random.random()
    assert changes(before, model, optimizer) == []


def test_what_cannot_be_measured_is_refused_before_anything_changes():
    model, optimizer = subject()
    before, batch = snapshot(model, optimizer), batch_for(model)
    unsupervised = type(batch)(batch.ids, torch.full_like(batch.targets, -100))
    for arguments, message in (
        (dict(batch=unsupervised), "no position of the batch is supervised"),
        (dict(optimizer=3), "optimizer=3 is neither a name nor an optimizer"),
        (dict(optimizer=AdamW([torch.nn.Parameter(torch.ones(2))])), "none of the model's parameters"),
        (dict(clip="1"), "clip='1' must be a positive number"),
        (dict(clip=float("nan")), "clip=nan"),
        (dict(logits="some"), "logits='some' is not known"),
        (dict(checkpointing="yes"), "checkpointing='yes' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, **(dict(batch=batch) | arguments))
    assert changes(before, model, optimizer) == []
