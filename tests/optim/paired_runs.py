"""Two runs that do the same: one unpaged on the CPU, and one with its state paged on a simulated GPU."""

import random

import pytest
import torch

from labkit.optim import paging, pinned_store, valve
from labkit.optim.paging import attach_paging
from tests.optim.conftest import OPTIMIZERS, make, same
from tests.optim.simulated_gpu import Gpu, SimulatedTorch
from tests.optim.streams import SCHEDULES

BUDGETS = (163_840, 200_000, 330_000, 10**7)  # the first is the largest page


class PairedRuns:
    """The two runs, and what may happen to them; `check` compares.

    Args:
        patch: pytest's monkeypatch.
        schedule: one of `SCHEDULES`.
        seed: of the schedule and of all that is drawn.
        kind: one of `OPTIMIZERS`.
        store: the module of the `PinnedStore`.
        attached: for `attach_paging`.
    """

    def __init__(self, patch, schedule, seed=0, kind="ours", store=pinned_store, **attached):
        self.gpu, self.random, self.step = Gpu(SCHEDULES[schedule], seed), random.Random(seed), 0
        self.kept: list = []  # (what something else put into memory, where)
        patch.setattr(torch.Tensor, "record_stream", lambda t, s: self.gpu.record_stream(t, s))
        patch.setattr(store, "torch", SimulatedTorch(self.gpu))
        patch.setattr(store.PinnedStore, "device_type", "cpu")  # where the simulated tensors are
        patch.setattr(paging, "store_for", lambda device, folder: store.PinnedStore(device))
        patch.setattr(valve.gc, "collect", lambda: None)  # slow, and nothing here is in cycles
        self.plain = make(kind)
        parameters = [torch.nn.Parameter(self.gpu.put(p.detach())) for p in self.plain[0]]
        self.paged = parameters, OPTIMIZERS[kind](parameters)
        with self.gpu:
            self.pager = attach_paging(self.paged[1], **{"budget_bytes": 200_000, **attached})

    # --- what both do

    def steps(self, count=1):
        for _ in range(count):
            self.step += 1
            self.make_gradients()
            self.plain[1].step()
            with self.gpu:
                self.paged[1].step()

    def make_gradients(self):
        generator = torch.Generator().manual_seed(self.step)
        for n, (p, q) in enumerate(zip(self.plain[0], self.paged[0], strict=True)):
            gradient = torch.randn(p.shape, generator=generator)
            p.grad, q.grad = (gradient, self.gpu.put(gradient)) if (self.step + n) % 5 else (None, None)

    def steps_on_another_stream(self):
        """Beside other work on the first; each stream waits for the other where the user must see to it."""
        first, other = self.gpu.current, self.gpu.stream()
        other.wait_stream(first)
        with self.gpu.on(other):
            self.steps(2)
        self.other_work()
        first.wait_stream(other)

    # --- what only the paged one does, and must not be seen

    def other_work(self):
        """Something else takes memory on the current stream, and expects to find later what it put there."""
        for n in sorted({page.nbytes for page in self.pager.table.pages.values()}):
            data = torch.full((n,), self.random.randrange(1, 100), dtype=torch.uint8)
            self.kept.append((data, self.gpu.put(data)))

    def interrupted_read(self):
        """Ctrl-C falls just after a copy was started."""
        store, start = self.pager.table.store, self.pager.table.store.start_reading

        def start_and_stop(*arguments):
            start(*arguments)
            raise KeyboardInterrupt

        out = [page for page in self.pager.table.pages.values() if page.state is None and page.exists]
        if out:
            store.start_reading = start_and_stop
            with self.gpu, pytest.raises(KeyboardInterrupt):
                self.pager.table.prefetch(out[0])
            del store.start_reading
            self.other_work()

    def load_checkpoint(self):
        """Of the unpaged run."""
        saved = self.plain[1].state_dict()
        state = {
            n: {k: self.gpu.put(v) if v.dim() else v.clone() for k, v in entry.items()}
            for n, entry in saved["state"].items()
        }
        with self.gpu:
            self.paged[1].load_state_dict({**saved, "state": state})

    def change_budget(self):
        with self.gpu:
            self.pager.set_budget(self.random.choice(BUDGETS))

    def run_out_of_memory(self):
        """A pass that needs what the state has."""

        def passes():
            if self.pager.table.resident_bytes > 100_000:
                raise torch.OutOfMemoryError("CUDA out of memory")

        for p in self.paged[0]:
            p.grad = None
        with self.gpu:
            self.pager.make_room_for(passes)

    def close(self, keep_state=True):
        with self.gpu:
            self.pager.close(keep_state)
        self.other_work()

    # --- comparing

    def check(self, state=True):
        """Parameters, state and the memory of others are what they should be."""
        for n, (p, q) in enumerate(zip(self.plain[0], self.paged[0], strict=True)):
            assert same(p.detach(), self.gpu.read(q.detach())), n
        if state:
            expected, found = self.plain[1].state_dict()["state"], self.state()
            assert expected.keys() == found.keys()
            for n, entry in expected.items():
                assert all(same(value, found[n][key]) for key, value in entry.items()), n
        self.gpu.synchronize()
        for data, place in self.kept:
            assert torch.equal(data, self.gpu.read(place)), "the memory of others was written to"

    def state(self):
        """Of the paged run, as the host sees it."""
        with self.gpu:
            state = self.paged[1].state_dict()["state"]
        return {n: {k: self.gpu.read(v) for k, v in entry.items()} for n, entry in state.items()}


ACTIONS = (
    PairedRuns.steps,
    PairedRuns.steps_on_another_stream,
    PairedRuns.other_work,
    PairedRuns.interrupted_read,
    PairedRuns.load_checkpoint,
    PairedRuns.change_budget,
    PairedRuns.run_out_of_memory,
    PairedRuns.check,
)
