"""On a GPU: paged state is the same bits, whatever happens to it, and makes room under a real cap. Imports nothing optional."""

import copy

import pytest
import torch

from labkit.optim.paging import attach_paging
from tests.optim.conftest import OPTIMIZERS, make

DEVICE = torch.device("cuda")
BUDGET = 300_000  # of 596,000 bytes of state; the largest parameter has 163,840
SIZE = 1 << 22  # numbers of a parameter of the larger runs: 16 MiB, and 32 of state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_there(kind="AdamW, fused"):
    """(parameters, optimizer) on the GPU."""
    parameters = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in make("ours")[0]]
    return parameters, OPTIMIZERS[kind](parameters)


def run_there(pair, steps, first=0):
    """Steps with gradients that depend on the step's number alone; one parameter in five has none."""
    for step in range(first, first + steps):
        generator = torch.Generator(DEVICE).manual_seed(step)
        for n, p in enumerate(pair[0]):
            gradient = torch.randn(p.shape, device=DEVICE, generator=generator)
            p.grad = gradient if (step + n) % 5 else None
        pair[1].step()


def assert_same_there(plain, paged):
    """Parameters and state, bit for bit."""
    assert all(map(torch.equal, plain[0], paged[0]))
    one, other = plain[1].state_dict()["state"], paged[1].state_dict()["state"]
    assert one.keys() == other.keys()
    for n, state in one.items():
        for key, value in state.items():
            assert value.device == other[n][key].device and torch.equal(value, other[n][key]), (n, key)


@pytest.mark.parametrize("kind", ["ours", "ours, 8 bits", "AdamW, fused", "SGD, momentum"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_state_pages_to_pinned_host_memory_with_the_same_bits(kind, prefetch):
    plain, paged = make_there(kind), make_there(kind)
    if kind == "SGD, momentum":  # its default on a GPU steps all parameters at once, with other roundings
        plain[1].param_groups[0]["foreach"] = False
    budget = 50_000 if kind == "ours, 8 bits" else 170_000
    pager = attach_paging(paged[1], budget, prefetch=prefetch)
    for pair in (plain, paged):
        run_there(pair, 50)
    assert pager.table.peak_bytes <= budget and pager.table.counts["evict"] > 50
    pager.close()
    assert_same_there(plain, paged)


@pytest.mark.parametrize("policy", ["lru", "mru"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_budgets_may_change_between_steps(policy, prefetch):
    plain, paged = make_there(), make_there()
    with attach_paging(paged[1], BUDGET, policy=policy, prefetch=prefetch) as pager:
        for number, budget in enumerate((BUDGET, 170_000, 10**7, 170_000, 400_000)):
            pager.set_budget(budget)
            assert pager.table.resident_bytes <= budget
            for pair in (plain, paged):
                run_there(pair, 4, first=4 * number)
            assert_same_there(plain, paged)
    for pair in (plain, paged):
        run_there(pair, 2, first=20)
    assert_same_there(plain, paged)


def test_a_checkpoint_taken_while_pages_are_on_their_way_loads_into_both():
    plain, paged = make_there(), make_there()
    attach_paging(paged[1], BUDGET)
    for pair in (plain, paged):
        run_there(pair, 3)
    saved = paged[1].state_dict()  # the next page is being read
    for pair in (plain, paged):
        run_there(pair, 3, first=3)
    again = make_there()
    with torch.no_grad():
        for p, q in zip(again[0], plain[0], strict=True):
            p.copy_(q)
    attach_paging(again[1], BUDGET)
    again[1].load_state_dict(plain[1].state_dict())
    for pair in (plain, paged, again):
        run_there(pair, 3, first=6)
    assert_same_there(plain, paged)
    assert_same_there(plain, again)
    assert all(state["step"] <= 3 for state in saved["state"].values()), "a snapshot stays what it was"


def test_steps_on_other_streams_than_the_default_one():
    plain, paged = make_there(), make_there()
    pager = attach_paging(paged[1], BUDGET)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    kept = []
    for number in range(6):
        run_there(plain, 2, first=2 * number)
        stream, default = streams[number % 2], torch.cuda.current_stream()
        stream.wait_stream(default)
        with torch.cuda.stream(stream):
            run_there(paged, 2, first=2 * number)
        kept += [torch.full((163_840,), number, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
        default.wait_stream(stream)
    assert_same_there(plain, paged)
    assert all((data == n // 4).all() for n, data in enumerate(kept)), "the memory of others is left alone"
    pager.close()
    assert_same_there(plain, paged)


def test_memory_that_is_freed_is_not_written_to_afterwards():
    parameters = [torch.nn.Parameter(torch.zeros(SIZE, device=DEVICE)) for _ in range(4)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    pager = attach_paging(optimizer, 2 * (2 * 4 * SIZE + 4096))
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
    pager.close(keep_state=False)  # the next page is being read
    data = [torch.full((2 * 4 * SIZE,), 7, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
    torch.cuda.synchronize()
    assert all((d == 7).all() for d in data)


def test_after_an_exception_in_mid_step_paging_closes_and_nothing_is_lost(monkeypatch):
    plain, paged = make_there("ours"), make_there("ours")
    pager = attach_paging(paged[1], BUDGET)
    for pair in (plain, paged):
        run_there(pair, 4, first=1)
    calls = 0
    update = type(paged[1]).update

    def breaks(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ArithmeticError("broken")
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(paged[1]), "update", breaks)
        with pytest.raises(ArithmeticError):
            run_there(paged, 1, first=5)
    pager.close()
    with torch.no_grad():  # from the checkpoint of the other
        for p, q in zip(paged[0], plain[0], strict=True):
            p.copy_(q)
    paged[1].load_state_dict(copy.deepcopy(plain[1].state_dict()))
    for pair in (plain, paged):
        run_there(pair, 3, first=5)
    assert_same_there(plain, paged)


def test_stepping_in_backward_on_the_threads_of_autograd():
    def make_model():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(200, 200) for _ in range(6)]
        return torch.nn.Sequential(*layers).to(DEVICE)

    pairs = []
    for paged in (False, True):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        if paged:
            attach_paging(optimizer, 700_000, fused_into_backward=True)
        pairs.append((model, optimizer))
    for step in range(6):
        x = torch.randn(16, 200, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(step))
        for model, optimizer in pairs:
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
    assert_same_there(*[(list(model.parameters()), optimizer) for model, optimizer in pairs])


def test_state_is_not_paged_while_a_graph_is_captured():
    paged = make_there()
    attach_paging(paged[1], BUDGET)
    run_there(paged, 3)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="cannot be paged while a CUDA graph is captured"),
        torch.cuda.graph(graph),
    ):
        paged[1].pager.set_budget(170_000)
    run_there(paged, 2, first=3)


def test_the_valve_opens_where_the_card_is_full_and_the_losses_are_those_of_a_larger_card():
    def run(with_valve, cap=None):
        parameters = [torch.nn.Parameter(torch.full((SIZE,), 0.5, device=DEVICE)) for _ in range(8)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        pager = attach_paging(optimizer, 2**40) if with_valve else None
        losses = []
        for texts in (1, 1, 2, 3, 3):

            def passes(texts=texts):
                kept = [parameters[0].sin() * n for n in range(8 * texts)]  # autograd keeps 16 MiB of each
                loss = sum(k.mean() for k in kept) + sum(p.square().mean() for p in parameters)
                loss.backward()
                return loss.item()

            try:
                losses.append(pager.make_room_for(passes) if with_valve else passes())
            except torch.OutOfMemoryError:
                break
            optimizer.step()
            optimizer.zero_grad()
        if with_valve:
            assert pager.table.budget < pager.table.total_bytes
            pager.close(keep_state=False)
        return losses, torch.cuda.max_memory_allocated(DEVICE)

    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    expected, peak = run(with_valve=False)
    state = 8 * 2 * 4 * SIZE
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((peak - state // 2) / total, DEVICE)
        plain, _ = run(with_valve=False)
        torch.cuda.empty_cache()
        paged, _ = run(with_valve=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        torch.cuda.empty_cache()
    assert len(expected) == 5 and len(plain) < 5, "all of the state and the longest text do not fit"
    assert paged == expected
