"""What the tests of paging share: fifteen optimizers, runs that repeat to the bit, and how to compare two."""

import pytest
import torch

from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.paging import attach_paging

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
    """Steps with gradients that depend on the step's number alone; one parameter in five has none."""
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
