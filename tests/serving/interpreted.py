"""The kernels of mixed batches in Triton's interpreter against the reference: a script, for the interpreter is chosen at import."""

import numpy as np
import torch
from triton.runtime import interpreter

from labkit.serving.segments import Factors, Part, Segment, add_segments, sort_rows
from labkit.serving.triton_segments import add_with_kernels, takes

_own_tensors = interpreter._patch_lang_tensor

# width, height, tokens of a row, ranks of adapters, rows
CASES = [
    (70, 130, 1, {"a": 2, "b": 33, "c": 16}, "ab.cba.a"),
    (64, 40, 19, {"a": 1, "b": 8}, ".ab"),
    (200, 24, 3, {"a": 16}, "aaaaaa"),
]


def patch_tensors(tensor, *rest):
    """What Triton does; 3.6 also makes an int of an array with one number, which numpy no longer allows."""
    _own_tensors(tensor, *rest)
    tensor.__index__ = lambda self: int(np.asarray(self.handle.data).squeeze())


def check(width, height, tokens, ranks, rows, dtype):
    by_row = sort_rows([None if row == "." else row for row in rows])
    segments = []
    for i, name in enumerate(by_row.keys):
        A, B = torch.randn(ranks[name], width), torch.randn(ranks[name], height).T
        segments.append(Segment(by_row.starts[i], by_row.starts[i + 1], Factors(A, B, 0.1 + i)))
    part = Part(by_row.order, None, segments)
    x, y = torch.randn(len(rows), tokens, width).to(dtype), torch.randn(len(rows), tokens, height).to(dtype)
    expected = add_segments(y.clone(), x, part.order, segments)
    assert takes(y, x, part)
    base = [row for row, name in enumerate(rows) if name == "."]
    before = y[base].clone()
    add_with_kernels(y, x, part)
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 0.1}
    torch.testing.assert_close(y, expected, **close)
    assert torch.equal(y[base], before)


if __name__ == "__main__":
    interpreter._patch_lang_tensor = patch_tensors
    torch.manual_seed(0)
    for case in CASES:
        for dtype in (torch.float32, torch.float16):
            check(*case, dtype)
    print("equal")
