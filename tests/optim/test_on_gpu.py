"""On a GPU: paged state is the same bits. Needs one; imports nothing optional."""

import pytest
import torch

from labkit.optim.paging import attach_paging
from tests.optim.conftest import OPTIMIZERS, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


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
