"""Paged optimizers: the same bits, memory under the budget as the operating system sees it, and clean in every accident."""

import copy
import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import labkit
from labkit.optim import page_store
from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.page_table import PageTable
from labkit.optim.paging import PagedAdamW, attach_paging, detach_paging

SHAPES = ((64, 128), (200, 100), (128,), (300, 64), (5000,), (3,), (60, 40))
T = torch.optim
OPTIMIZERS = {
    "ours": lambda p: AdamW(p, lr=1e-2),
    "ours, 8 bits": lambda p: AdamW8bit(p, lr=1e-2),
    "AdamW": lambda p: T.AdamW(p, lr=1e-2),
    "AdamW, fused": lambda p: T.AdamW(p, lr=1e-2, fused=True),
    "AdamW, foreach, amsgrad": lambda p: T.AdamW(p, foreach=True, amsgrad=True),
    "SGD": lambda p: T.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: T.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: T.Adafactor(p),
    "RMSprop": lambda p: T.RMSprop(p, momentum=0.9, centered=True),
    "NAdam": lambda p: T.NAdam(p),
    "RAdam": lambda p: T.RAdam(p),
    "Adagrad": lambda p: T.Adagrad(p),
    "Adadelta": lambda p: T.Adadelta(p),
    "ASGD": lambda p: T.ASGD(p),
    "Rprop": lambda p: T.Rprop(p),
}


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


def make(kind, dtype=torch.float32, shapes=SHAPES):
    """(parameters, optimizer); one of the parameters is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    parameters = [torch.nn.Parameter(p.t() if tuple(p.shape) == (60, 40) else p) for p in made]
    return parameters, OPTIMIZERS[kind](parameters) if isinstance(kind, str) else kind(parameters)


def run(parameters, optimizer, steps, first=0):
    """Steps with gradients that depend on the number of the step alone; one parameter in five goes without one."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for n, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if (step + n) % 5 == 0:
                p.grad = None
        optimizer.step()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
    return type(a) is type(b) and a == b


def assert_same(a, b):
    """Parameters and state of two (parameters, optimizer), bit for bit."""
    for p, q in zip(a[0], b[0], strict=True):
        assert same(p.detach(), q.detach())
    one, other = a[1].state_dict(), b[1].state_dict()
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for n, state in one["state"].items():
        assert list(state) == list(other["state"][n])
        assert all(same(value, other["state"][n][key]) for key, value in state.items()), n


def budgets(kind, store):
    """{share: bytes} from all of the state down to that of one parameter."""
    _, optimizer = make(kind)
    with attach_paging(optimizer, 2**40, store) as pager:
        pages = pager.table.pages.values()
        total, largest = pager.table.total_bytes, max(1, *(page.nbytes for page in pages))
    return {share: max(largest, int(share * total)) for share in (1, 0.5, 0.25, 0.1)} | {0: largest}


@pytest.mark.parametrize("kind", ["ours", "ours, 8 bits", "AdamW, fused"])
@pytest.mark.parametrize("policy", ["lru", "mru"])
def test_paged_is_bit_identical_over_50_steps_at_every_budget(kind, policy, store):
    plain = make(kind)
    run(*plain, 50)
    for share, budget in budgets(kind, store).items():
        paged = make(kind)
        pager = attach_paging(paged[1], budget, store, policy, prefetch=share != 0.5)
        run(*paged, 50)
        assert_same(plain, paged)
        assert pager.table.peak_bytes <= budget
        assert (pager.table.counts["evict"] > 50) == (share < 1)
        pager.close()
        assert_same(plain, paged)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("prefetch", [True, False])
def test_any_optimizer_pages_and_stays_the_same(kind, prefetch, store):
    plain, paged = make(kind), make(kind)
    budget = budgets(kind, store)[0.25]
    with attach_paging(paged[1], budget, store, prefetch=prefetch) as pager:
        run(*plain, 12)
        run(*paged, 12)
        assert_same(plain, paged)
        assert pager.table.peak_bytes <= budget
    run(*plain, 3, first=12)
    run(*paged, 3, first=12)
    assert_same(plain, paged)


def test_bitsandbytes_optimizers_page_too(store):
    import bitsandbytes as bnb

    kind = lambda p: bnb.optim.AdamW8bit(p, lr=1e-2)  # noqa: E731
    plain, paged = make(kind), make(kind)
    attach_paging(paged[1], 45_056, store)
    run(*plain, 8)
    run(*paged, 8)
    for p, q in zip(plain[0], paged[0]):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["ours", "ours, 8 bits", "AdamW, fused"])
def test_half_precision_parameters_page(kind, dtype, store):
    plain, paged = make(kind, dtype), make(kind, dtype)
    attach_paging(paged[1], 90_112, store)
    run(*plain, 10)
    run(*paged, 10)
    assert_same(plain, paged)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 60), min_size=0, max_size=3), min_size=1, max_size=8),
    st.floats(0, 1),
    st.sampled_from(["lru", "mru"]),
    st.booleans(),
    st.sampled_from(["ours", "ours, 8 bits", "SGD, momentum"]),
)
def test_any_shapes_at_any_budget(tmp_path_factory, shapes, share, policy, prefetch, kind):
    store = tmp_path_factory.mktemp("store")
    plain, paged = make(kind, shapes=shapes), make(kind, shapes=shapes)
    pager = attach_paging(paged[1], 2**40, store)
    largest, total = max(p.nbytes for p in pager.table.pages.values()), pager.table.total_bytes
    pager.close()
    budget = max(1, largest + int(share * (total - largest)))
    with attach_paging(paged[1], budget, store, policy, prefetch=prefetch) as pager:
        run(*plain, 7)
        run(*paged, 7)
        assert_same(plain, paged)
        assert pager.table.peak_bytes <= budget


# --- the budget, seen from outside


def storages_alive():
    """{address: bytes} of the memory of all CPU tensors of at least 4096 numbers that Python knows."""
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"]
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel() >= 4096
    }


def bytes_alive_during_updates(budget: int, store: str) -> list[int]:
    """What is alive besides parameters and gradients, after every update of a run; for a process of its own."""
    seen, known = [], []

    class Watching(AdamW):
        def update(self, p, grad, state, group):
            super().update(p, grad, state, group)
            own = {t.data_ptr() for q in known for t in (q, q.grad) if t is not None}
            seen.append(sum(size for at, size in storages_alive().items() if at not in own))

    parameters, optimizer = make(lambda p: Watching(p, lr=1e-2), shapes=[(64, 64)] * 12)
    known.extend(parameters)
    attach_paging(optimizer, budget, store)
    seen.clear()  # of the trial step
    run(parameters, optimizer, 4)
    return seen


def test_the_tensors_alive_during_every_update_stay_under_the_budget(store):
    budget, page = 3 * 36_864, 36_864
    # in a process of its own, where no other test has left a tensor behind
    code = f"from tests.test_paging import *; print(*bytes_alive_during_updates({budget}, {str(store)!r}))"
    root = Path(__file__).resolve().parent.parent
    command = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    seen = [int(v) for v in command.stdout.split()]
    assert len(seen) > 30 and max(seen) <= budget
    assert max(seen) > 2 * page, "the budget is used, and the count sees the state"


RESIDENT = """
    import re, sys, torch
    from labkit.optim.paging import attach_paging
    budget, store = int(sys.argv[1]), sys.argv[2]
    def status(key):
        return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))
    parameters = [torch.nn.Parameter(torch.zeros(1 << 19)) for _ in range(48)]  # 2 MB each, 8 bytes of state a number: 201 MB
    gradient = torch.full((1 << 19,), 1e-3)
    for p in parameters:
        p.grad = gradient
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    optimizer_of_one = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1 << 19))])  # warm up what torch loads on first use
    optimizer_of_one.param_groups[0]["params"][0].grad = gradient
    optimizer_of_one.step()
    del optimizer_of_one
    if budget:
        attach_paging(optimizer, budget, store)
    before = status("VmRSS")
    for _ in range(3):
        optimizer.step()
    print(status("VmHWM") - before, status("RssAnon") + status("RssFile") + status("RssShmem") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads resident memory from /proc")
def test_resident_memory_of_the_process_falls_to_the_budget(store):
    def measure(budget):
        command = [sys.executable, "-c", textwrap.dedent(RESIDENT), str(budget), str(store)]
        return [
            int(v) for v in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        ]

    peak, after = measure(0)
    assert peak > 195e6 and after > 195e6, "unpaged, the state is resident"
    budget = 30_000_000
    peak, after = measure(budget)
    # the optimizer's own temporaries, 2 MB a parameter, and what the C library holds until it is told to let go
    assert after <= budget + 4e6 and peak <= budget + 16e6


def test_the_minimum_budget_is_one_parameter_and_less_is_refused_with_the_number(store):
    _, optimizer = make("ours")
    with pytest.raises(
        ValueError, match=r"budget_bytes=1000 .* parameter 1, 163840 bytes.*give at least 163840"
    ):
        attach_paging(optimizer, 1000, store)
    assert type(optimizer.state) is not PageTable and "step" not in optimizer.__dict__
    attach_paging(optimizer, 163840, store)


# --- what an optimizer does besides stepping


def test_checkpoints_are_those_of_the_plain_optimizer_in_both_directions(store):
    for kind in ("ours", "ours, 8 bits", "AdamW, fused"):
        plain, paged = make(kind), make(kind)
        attach_paging(paged[1], 170_000, store)
        run(*plain, 6)
        run(*paged, 6)
        from_plain, from_paged = copy.deepcopy(plain[1].state_dict()), paged[1].state_dict()
        paged_again, plain_again = make(kind), make(kind)
        for target, source in ((paged_again, plain), (plain_again, paged)):
            with torch.no_grad():
                for p, q in zip(target[0], source[0]):
                    p.copy_(q)
        pager = attach_paging(paged_again[1], 170_000, store)
        paged_again[1].load_state_dict(from_plain)
        plain_again[1].load_state_dict(from_paged)
        for pair in (plain, paged, paged_again, plain_again):
            run(*pair, 6, first=6)
        for pair in (paged, paged_again, plain_again):
            assert_same(plain, pair)
        assert pager.table.peak_bytes <= 170_000


def test_a_state_dict_is_a_snapshot_that_later_steps_do_not_change(store):
    paged = make("ours")
    attach_paging(paged[1], 170_000, store)
    run(*paged, 3)
    taken = paged[1].state_dict()["state"]
    kept = copy.deepcopy(taken)
    run(*paged, 3, first=3)
    for n, state in kept.items():
        assert all(torch.equal(value, taken[n][key]) for key, value in state.items())


def test_attaching_in_the_middle_of_a_run_and_detaching_changes_nothing(store):
    plain, paged = make("ours"), make("ours")
    run(*plain, 12)
    run(*paged, 4)
    pager = attach_paging(paged[1], 170_000, store)
    run(*paged, 4, first=4)
    assert pager.table.resident_bytes > 0
    detach_paging(paged[1])
    assert pager.table.resident_bytes == 0 and not any(page.state for page in pager.table.pages.values())
    detach_paging(paged[1])  # once more does nothing
    assert type(paged[1].state) is not PageTable and "step" not in paged[1].__dict__
    assert not hasattr(paged[1], "pager")
    run(*paged, 4, first=8)
    assert_same(plain, paged)


def test_looking_state_up_pages_it_in_and_assigning_pages_it_out(store):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], 170_000, store)
    run(*plain, 5)
    run(*paged, 5)
    for p, q in zip(*(pair[0] for pair in (plain, paged))):
        assert (q in paged[1].state) and set(paged[1].state[q]) == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(paged[1].state[q]["exp_avg"], plain[1].state[p]["exp_avg"])
        assert pager.table.resident_bytes <= 170_000
        for pair, key in ((plain, p), (paged, q)):
            pair[1].state[key] = {k: v * 2 if v.dim() else v for k, v in pair[1].state[key].items()}
    run(*plain, 5, first=5)
    run(*paged, 5, first=5)
    assert_same(plain, paged)


def test_a_deep_copy_of_a_paged_optimizer_is_a_plain_one_with_all_state(store):
    paged = make("AdamW")
    attach_paging(paged[1], 170_000, store)
    run(*paged, 3)
    twin = copy.deepcopy(paged[1])
    assert not isinstance(twin.state, PageTable) and len(twin.state) == len(paged[1].state)
    del twin.state  # the copy's own parameters are its keys
    run(*paged, 2, first=3)


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
def test_schedulers_closures_and_step_hooks_work_once_a_step(scheduler_first, store, recwarn):
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


def test_several_paged_optimizers_keep_out_of_each_others_way(store):
    plain, paged = [make("ours"), make("ours, 8 bits")], [make("ours"), make("ours, 8 bits")]
    for _, optimizer in paged:
        attach_paging(optimizer, 170_000, store)
    for step in range(6):
        for pair in plain + paged:
            run(*pair, 1, first=step)
    paged[0][1].pager.close()
    for step in range(6, 9):
        for pair in plain + paged:
            run(*pair, 1, first=step)
    for a, b in zip(plain, paged):
        assert_same(a, b)


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


def limited(budget_of_file, store, body):
    """Run `body` in a process that may not write files larger than that."""
    script = f"""
        import resource, sys, torch
        from labkit.optim.paging import attach_paging
        from labkit.optim.adamw import AdamW
        resource.setrlimit(resource.RLIMIT_FSIZE, ({budget_of_file}, {budget_of_file}))
        parameters = [torch.nn.Parameter(torch.ones(10_000)) for _ in range(10)]
        optimizer = AdamW(parameters)
    """
    script = textwrap.dedent(script) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", script, str(store)], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX systems can")
def test_a_disk_that_is_too_small_is_reported_when_attaching_and_nothing_has_changed(store):
    done = limited(
        400_000,
        store,
        """
        try:
            attach_paging(optimizer, 100_000, sys.argv[1])
        except OSError as error:
            print(error)
        assert not optimizer.state and "step" not in optimizer.__dict__
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert len(optimizer.state) == 10
        """,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "cannot grow from 327,680 to 409,600 bytes" in done.stdout
        and "give store= another folder" in done.stdout
    )
    assert os.listdir(store) == []


def test_a_write_that_fails_in_the_middle_of_a_step_loses_nothing(store, monkeypatch):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], 170_000, store, prefetch=False)
    for pair in (plain, paged):
        run(*pair, 4, first=1)
    kept = copy.deepcopy(paged[1].state_dict()["state"]), [p.detach().clone() for p in paged[0]]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(page_store.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            run(*paged, 1, first=6)
    now = paged[1].state_dict()["state"]
    changed = [n for n, p in enumerate(paged[0]) if not torch.equal(p, kept[1][n])]
    for n in kept[0]:
        if n not in changed:
            assert all(torch.equal(value, now[n][key]) for key, value in kept[0][n].items())
        else:
            assert now[n]["step"] == kept[0][n]["step"] + 1
    assert pager.table.resident_bytes <= 170_000
    with torch.no_grad():  # from the checkpoint, with space again, the run goes on as if nothing had been
        for p, value in zip(paged[0], kept[1]):
            p.copy_(value)
    paged[1].load_state_dict({**paged[1].state_dict(), "state": kept[0]})
    for pair in (plain, paged):
        run(*pair, 4, first=6)
    assert_same(plain, paged)


def test_a_read_that_fails_leaves_the_state_in_the_store(store, monkeypatch):
    plain, paged = make("ours"), make("ours")
    attach_paging(paged[1], 170_000, store, prefetch=False)
    for pair in (plain, paged):
        run(*pair, 4, first=1)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(page_store.os, "preadv", broken)
        with pytest.raises(OSError, match="Input/output"):
            run(*paged, 1, first=5)
    for pair in (plain, paged):
        run(*pair, 1, first=5)
    assert_same(plain, paged)


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
            saved = {"step": step + 1, "optimizer": optimizer.state_dict(), "parameters": [p.detach() for p in parameters]}
            torch.save(saved, checkpoint + ".part")
            os.replace(checkpoint + ".part", checkpoint)
    torch.save([p.detach() for p in parameters], checkpoint + ".done")
"""


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


def test_the_space_of_a_store_is_given_back_when_it_closes(store):
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(3):
        parameters, optimizer = make("ours")
        with attach_paging(optimizer, 170_000, store):
            run(parameters, optimizer, 2)
        assert os.listdir(store) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


# --- what is not done


def test_min_elements_keeps_small_tensors_in_memory_and_out_of_the_budget(store):
    plain, paged = make("ours"), make("ours")
    pager = attach_paging(paged[1], 1, store, min_elements=100_000)
    run(*plain, 4)
    run(*paged, 4)
    assert_same(plain, paged)
    table = pager.table
    numbers = sum(p.numel() for p in paged[0])
    assert table.bytes_out == table.bytes_in == table.total_bytes == 0
    assert table.exempt_bytes == 8 * numbers + 4 * len(SHAPES), (
        "the rule of 100,000 elements, and nothing is paged"
    )


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"budget_bytes": -1}, "positive whole number"),
        ({"budget_bytes": 0}, "positive whole number"),
        ({"budget_bytes": 1e6}, "positive whole number"),
        ({"budget_bytes": True}, "positive whole number"),
        ({"budget_bytes": "1GB"}, "positive whole number"),
        ({"budget_bytes": 10**6, "policy": "fifo"}, "choose one of"),
        ({"budget_bytes": 10**6, "min_elements": -1}, "at least 0"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings_, message, store):
    with pytest.raises(ValueError, match=message):
        attach_paging(make("ours")[1], store=store, **settings_)


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


def test_attaching_twice_and_to_what_cannot_be_paged_is_refused(store, tmp_path):
    parameters, optimizer = make("ours")
    attach_paging(optimizer, 10**6, store)
    with pytest.raises(ValueError, match="paged already"):
        attach_paging(optimizer, 10**6, store)
    with pytest.raises(TypeError, match="LBFGS"):
        attach_paging(T.LBFGS(parameters), 10**6, store)

    class KeepsLists(AdamW):
        def init_state(self, p, state):
            super().init_state(p, state)
            state["history"] = [torch.zeros(3)]

    with pytest.raises(TypeError, match="'history'.* is a list"):
        attach_paging(KeepsLists(parameters), 10**6, store)

    class Counts(AdamW):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1

    counting = Counts(parameters)
    attach_paging(counting, 10**6, store)
    parameters[0].grad = torch.ones_like(parameters[0])
    with pytest.raises(RuntimeError, match="changes \\['calls'\\]"):
        counting.step()
    replaced = AdamW(parameters)
    replaced.step = lambda: None
    with pytest.raises(ValueError, match="has replaced optimizer.step"):
        attach_paging(replaced, 10**6, store)
    with pytest.raises(ValueError, match="all on the CPU or all on one GPU"):
        attach_paging(AdamW([torch.nn.Parameter(torch.ones(2, device="meta"))]), 10**6, store)


def test_a_store_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="the page store cannot use the folder"):
            attach_paging(make("ours")[1], 10**6, path)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a folder in memory")
def test_a_store_in_memory_is_warned_about():
    with (
        pytest.warns(UserWarning, match="saves nothing"),
        attach_paging(make("ours")[1], 10**6, "/dev/shm/labkit-test"),
    ):
        pass
    os.rmdir("/dev/shm/labkit-test")


# --- the log, and the policies


@pytest.mark.parametrize("pages", [1, 3, 7])
def test_on_a_cycle_lru_never_hits_and_mru_hits_as_often_as_beladys_rule(pages, store):
    n, steps = 8, 20
    counts = {}
    for policy in ("lru", "mru"):
        parameters, optimizer = make("ours", shapes=[(512,)] * n)
        attach_paging(optimizer, pages * 8192, store, policy, prefetch=False)
        for _ in range(steps):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        counts[policy] = optimizer.pager.table
    assert counts["lru"].hit_rate == 0 and counts["lru"].counts["fault"] == n * (steps - 1)
    # Belady's rule by brute force over the same sequence, with a cache that is empty after the first step
    sequence, cached, hits = [i % n for i in range(n * (steps - 1))], set(), 0
    for at, page in enumerate(sequence):
        hits += page in cached
        if page not in cached and len(cached) == pages:
            following = lambda q: next((k for k in range(at + 1, len(sequence)) if sequence[k] == q), 10**9)  # noqa: B023, E731
            cached.discard(max(cached, key=following))
        cached.add(page)
    assert counts["mru"].counts["hit"] == pytest.approx(hits, abs=pages)


def test_the_log_adds_up_to_the_counts_and_the_resident_bytes(store):
    paged = make("ours")
    pager = attach_paging(paged[1], 250_000, store)
    run(*paged, 6)
    resident, inside = 0, set()
    for event in pager.table.events:
        if event.kind in ("create", "fault", "prefetch"):
            assert event.name not in inside
            inside.add(event.name)
            resident += event.nbytes
        elif event.kind == "evict":
            inside.remove(event.name)
            resident -= event.nbytes
        else:
            assert event.name in inside
        assert event.resident == resident <= 250_000
    kinds = [event.kind for event in pager.table.events]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        k: v for k, v in pager.table.counts.items() if v
    }
    assert {event.step for event in pager.table.events} == set(range(1, 7))


# --- in the rest of labkit


def test_paged_adamw_is_adamw(store):
    plain, paged = make("ours"), make(lambda p: PagedAdamW(p, 1e-2, budget_bytes=170_000, store=store))
    run(*plain, 5)
    run(*paged, 5)
    assert_same(plain, paged)
    assert labkit.PagedAdamW is PagedAdamW and labkit.attach_paging is attach_paging


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_training_run_with_a_budget_has_the_losses_of_one_without_and_resumes(
    optimizer, records, tokenizer, tmp_path, monkeypatch
):
    from labkit import LoRAConfig, TrainConfig, add_lora
    from labkit.training import checkpoint
    from labkit.training import loop as train
    from tests.conftest import make_small_llama

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))

    def losses(**changes):
        model = make_small_llama()
        torch.manual_seed(3)
        add_lora(model, LoRAConfig(r=16))
        config = TrainConfig(steps=6, batch_size=2, optimizer=optimizer, progress=False, **changes)
        return train(model, tokenizer, records, config).losses

    expected = losses()
    assert losses(state_budget_bytes=60_000) == expected
    save = checkpoint.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    folder = {"checkpoint_folder": tmp_path / "run", "checkpoint_every": 3}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        assert losses(**folder, state_budget_bytes=60_000) == expected[:3]
    assert losses(**folder) == expected, "a run that was paged goes on without paging"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["ours", "ours, 8 bits", "AdamW, fused", "SGD, momentum"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_on_a_gpu_state_pages_to_pinned_host_memory_with_the_same_bits(kind, prefetch):
    def on_gpu(p):
        return OPTIMIZERS[kind](p)

    def make_there():
        parameters, _ = make("SGD")
        parameters = [torch.nn.Parameter(p.detach().cuda()) for p in parameters]
        return parameters, on_gpu(parameters)

    def run_there(parameters, optimizer):
        for step in range(50):
            generator = torch.Generator().manual_seed(step)
            for n, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, generator=generator).cuda() if (step + n) % 5 else None
            optimizer.step()

    plain, paged = make_there(), make_there()
    plain[1].param_groups[0].update({"foreach": False} if kind == "SGD, momentum" else {})
    pager = attach_paging(paged[1], 170_000, prefetch=prefetch)
    run_there(*plain)
    run_there(*paged)
    assert pager.table.peak_bytes <= 170_000 and pager.table.counts["evict"] > 50
    pager.close()
    for p, q in zip(plain[0], paged[0]):
        assert torch.equal(p, q)
        for key, value in plain[1].state[p].items():
            assert (
                torch.equal(value, paged[1].state[q][key]) and value.device == paged[1].state[q][key].device
            )
