"""The loop over parameters: groups, hooks and closures as without paging, and clean in every accident."""

import copy
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from labkit.optim.adamw import AdamW
from labkit.optim.paging import attach_paging, detach_paging
from tests.optim.conftest import SHAPES, T, assert_same, make, run


def scheduled_losses(paging, scheduler_first, store):
    """Five steps with a closure, a scheduler and hooks: the losses, and who was called when."""
    parameters, optimizer = make("AdamW")
    if scheduler_first:
        scheduler = T.lr_scheduler.StepLR(optimizer, 2, 0.5)
    if paging:
        attach_paging(optimizer, 170_000, store)
    if not scheduler_first:
        scheduler = T.lr_scheduler.StepLR(optimizer, 2, 0.5)
    calls, losses = [], []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in parameters)
        loss.backward()
        return loss

    for step in range(6):
        if step == 4:  # the scheduler's wrapper still leads to the optimizer
            detach_paging(optimizer)
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 8
    return losses, calls


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_schedulers_closures_and_step_hooks_work_once_per_step(scheduler_first, store, recwarn):
    plain, paged = (scheduled_losses(paging, scheduler_first, store) for paging in (False, True))
    assert plain == paged and paged[1] == ["before", "closure", "after"] * 6
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_several_groups_added_groups_and_frozen_parameters(store):
    def make_groups(p):
        return T.SGD([{"params": p[:2], "momentum": 0.9}, {"params": p[2:4], "lr": 0.3}], lr=0.1)

    plain, paged = make(make_groups), make(make_groups)
    for pair in (plain, paged):
        pair[0][1].requires_grad_(False)
    pager = attach_paging(paged[1], 120_000, store)
    for pair in (plain, paged):
        for n, p in enumerate(pair[0]):
            p.grad = torch.full_like(p, n + 1.0) if p.requires_grad else None
        pair[1].step()
        pair[1].add_param_group({"params": pair[0][4:], "momentum": 0.5})
        pair[0][1].requires_grad_(True)
        run(*pair, 5)
    assert_same(plain, paged)
    assert len(pager.table.pages) == len(SHAPES)


def test_an_added_group_that_does_not_fit_is_refused_before_anything_changes(store):
    parameters, optimizer = make("ours", shapes=[(10, 10)])
    attach_paging(optimizer, 5000, store)
    large = torch.nn.Parameter(torch.zeros(100, 100))
    optimizer.add_param_group({"params": [large]})
    before = parameters[0].detach().clone()
    parameters[0].grad, large.grad = torch.ones(10, 10), torch.ones(100, 100)
    with pytest.raises(ValueError, match="parameter 1, 81920 bytes"):
        optimizer.step()
    assert torch.equal(parameters[0], before)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused_before_anything_changes(kind, store):
    first = torch.nn.Parameter(torch.ones(10))
    second = torch.nn.Parameter(torch.ones(10, 2, dtype=torch.complex64 if kind == "complex" else None))
    optimizer = T.AdamW([first, second], foreach=False)
    attach_paging(optimizer, 10_000, store)
    first.grad = torch.ones(10)
    second.grad = torch.ones_like(second) if kind == "complex" else torch.ones(10, 2).to_sparse()
    with pytest.raises(ValueError, match=f"parameter 1 of shape \\(10, 2\\) has a {kind} gradient"):
        optimizer.step()
    assert torch.equal(first, torch.ones(10)) and not optimizer.state


def test_sizes_are_found_without_numbers_where_an_optimizer_does_not_look_at_them(store):
    seen = []

    class Looks(AdamW):
        def update(self, p, grad, state, group):
            seen.append(p.device.type)
            if grad.abs().max() > 1e6:  # a number: a meta tensor has none
                raise ArithmeticError("exploded")
            super().update(p, grad, state, group)

    Looks.__module__ = "labkit.optim.looks"
    parameters, optimizer = make(lambda p: Looks(p, lr=1e-2), shapes=[(10, 10)])
    with attach_paging(optimizer, 10_000, store) as pager:
        assert seen == ["meta", "cpu"] and pager.table.total_bytes == 4096
    Looks.__module__ = "elsewhere"
    with attach_paging(optimizer, 10_000, store):
        assert seen == ["meta", "cpu", "cpu"], "an optimizer of others never sees a meta tensor"
    assert not optimizer.state and torch.equal(parameters[0], make("ours", shapes=[(10, 10)])[0][0])


def test_a_trial_step_that_fails_says_so_and_leaves_the_optimizer_as_it_was(store):
    class Breaks(AdamW):
        def update(self, p, grad, state, group):
            raise ArithmeticError("broken")

    _, optimizer = make(lambda p: Breaks(p, lr=1e-2))
    groups = optimizer.param_groups
    with pytest.raises(ArithmeticError) as caught:
        attach_paging(optimizer, 10**6, store)
    assert caught.value.__notes__ == ["in a trial step over a copy of parameter 0, to see what state it gets"]
    assert optimizer.param_groups is groups and not optimizer.state and "step" not in optimizer.__dict__


# --- in backward


def fused_pair(paging, store, **changes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 80), torch.nn.Tanh(), torch.nn.Linear(80, 40))
    optimizer = T.AdamW(model.parameters(), lr=1e-2)
    if paging:
        attach_paging(optimizer, 36_864, store, fused_into_backward=True, **changes)
    return model, optimizer


def test_stepping_in_backward_gives_the_same_bits_and_gradients_never_live_together(store):
    plain, fused = fused_pair(False, store), fused_pair(True, store)
    together = []
    for p in fused[0].parameters():  # registered after the pager's own
        p.register_post_accumulate_grad_hook(
            lambda _: together.append(sum(q.grad is not None for q in fused[0].parameters()))
        )
    for step in range(8):
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step))
        for model, optimizer in (plain, fused):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
    assert together == [0] * 32
    for pair in (plain, fused):
        assert len(pair[1].state_dict()["state"]) == 4
    assert_same(*[(list(model.parameters()), optimizer) for model, optimizer in (plain, fused)])
    assert fused[1].pager.table.step == 8


def test_in_backward_a_second_gradient_before_the_step_is_refused(store):
    model, optimizer = fused_pair(True, store)
    x = torch.ones(2, 40)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="cannot be accumulated"):
        model(x).sum().backward()
    detach_paging(optimizer)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters()), "detached, gradients stay"


# --- accidents


def test_an_exception_in_the_middle_of_a_step_leaves_each_parameter_with_its_own_state(store):
    class Breaks(AdamW):
        broken = None

        def update(self, p, grad, state, group):
            if p is self.broken:
                raise ArithmeticError("broken")
            super().update(p, grad, state, group)

    parameters, optimizer = make(lambda p: Breaks(p, lr=1e-2))
    reference = make("ours")
    attach_paging(optimizer, 170_000, store)
    run(parameters, optimizer, 4, first=1)
    run(*reference, 4, first=1)
    optimizer.broken = parameters[3]
    groups = optimizer.param_groups
    with pytest.raises(ArithmeticError) as caught:
        run(parameters, optimizer, 1, first=5)
    assert "2 parameters were updated in this step, and 3 were not" in caught.value.__notes__[0]
    assert optimizer.param_groups is groups and len(groups[0]["params"]) == len(SHAPES)
    before, after = reference[0], make("ours")
    with torch.no_grad():
        for p, q in zip(after[0], before):
            p.copy_(q)
    after[1].load_state_dict(copy.deepcopy(reference[1].state_dict()))
    run(*after, 1, first=5)
    for n, p in enumerate(parameters):  # the first of these had no gradient
        expected = after if n < 3 else reference
        assert torch.equal(p, expected[0][n]), n
        moment = optimizer.state[p]["exp_avg"]
        assert n in (3,) or torch.equal(moment, expected[1].state[expected[0][n]]["exp_avg"])


KILLED = """
    import os, signal, sys, torch
    from labkit.optim.adamw import AdamW
    from labkit.optim.paging import attach_paging
    store, checkpoint, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(50, 60)) for _ in range(8)]
    class Dies(AdamW):
        updates = 0
        def update(self, *arguments):
            Dies.updates += 1
            if Dies.updates == kill_at:
                print(os.listdir(store), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            super().update(*arguments)
    optimizer = Dies(parameters, lr=1e-2)
    attach_paging(optimizer, 60_000, store)
    first = 0
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint)
        first = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for p, value in zip(parameters, saved["parameters"]):
                p.copy_(value)
    for step in range(first, 12):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        if (step + 1) % 3 == 0:
            values = [p.detach() for p in parameters]
            saved = {"step": step + 1, "optimizer": optimizer.state_dict(), "parameters": values}
            torch.save(saved, checkpoint + ".part")
            os.replace(checkpoint + ".part", checkpoint)
    torch.save([p.detach() for p in parameters], checkpoint + ".done")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_in_the_middle_of_a_step_a_run_goes_on_to_the_same_bits_and_leaves_no_file(store, tmp_path):
    def start(name, kill_at):
        script = textwrap.dedent(KILLED)
        command = [sys.executable, "-c", script, str(store), str(tmp_path / name), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True)

    killed = start("killed", 8 * 7 + 5)  # in the eighth step
    assert killed.returncode == -signal.SIGKILL and killed.stdout.strip() == "[]", (
        "a live store has no name either"
    )
    assert os.listdir(store) == [], "nothing to sweep"
    assert (tmp_path / "killed").exists() and not (tmp_path / "killed.done").exists()
    assert start("killed", -1).returncode == 0
    assert start("whole", -1).returncode == 0
    for a, b in zip(torch.load(tmp_path / "killed.done"), torch.load(tmp_path / "whole.done")):
        assert torch.equal(a, b)
