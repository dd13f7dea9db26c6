"""`torch.set_default_dtype` is for the tensors of a caller. What labkit makes for itself has its own dtype."""

import subprocess
import sys

import pytest
import torch

from labkit.quant.codebooks import CODEBOOKS

SCRIPT = """
import hashlib, os, sys
import torch

for default in sys.argv[1:]:  # each in a fork that imports labkit itself
    child = os.fork()
    if child == 0:
        break
    assert os.waitpid(child, 0)[1] == 0
else:
    sys.exit()
torch.set_default_dtype(getattr(torch, default))  # before labkit makes its tables

from labkit.hardware import set_fast
from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.quant.codebooks import CODEBOOKS
from labkit.quant.tensor import quantize

digest = hashlib.sha256()

def note(*tensors):
    for tensor in tensors:
        digest.update(str(tensor.dtype).encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())

generator = torch.Generator().manual_seed(0)
weight = torch.randn(64, 260, dtype=torch.float32, generator=generator)
for fast in (True, False):
    set_fast(fast)
    for name in CODEBOOKS:
        if CODEBOOKS[name].numel() == 16:
            for double_quant in (True, False):
                for rounding in ("nearest", "lookup"):
                    q = quantize(weight, name, double_quant=double_quant, scale_rounding=rounding)
                    note(q.packed, q.absmax, q.dequantize(), q.dequantize(torch.float16))
    for kind in (AdamW, AdamW8bit):
        p = torch.nn.Parameter(weight.clone())
        optimizer = kind([p], lr=0.01)
        for step in range(3):
            p.grad = torch.randn(p.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        note(p.detach(), *[v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)])
note(*CODEBOOKS.values())
print(digest.hexdigest())
"""


def digests(*defaults: str) -> list[str]:
    """Of all numbers that are made under each default dtype."""
    command = [sys.executable, "-c", SCRIPT, *defaults]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.slow
def test_tables_codes_and_moments_do_not_depend_on_the_default_dtype():
    expected, *others = digests("float32", "bfloat16", "float64")
    assert others == [expected, expected]


def test_a_search_table_that_is_made_under_another_default_dtype_is_right_afterwards():
    from labkit.quant import codebooks

    levels = CODEBOOKS["nf4"] * 0.999  # of which no table is kept yet
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        thresholds, _ = codebooks.search_tables(levels)
    finally:
        torch.set_default_dtype(before)
    assert thresholds.dtype == torch.float32
    assert torch.equal(thresholds, codebooks.midpoints(levels))
