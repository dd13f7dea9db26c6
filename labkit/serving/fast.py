"""The fast path of `labkit.serving.segments.add_segments` on a CPU: the same sum with fewer copies and calls.

The reference takes rows out of x and y and puts them back for each segment. Here that happens once for all, and not at
all where the rows stand together, as an engine can arrange it. Each segment is then two calls into the linear algebra
library, the second of which multiplies, scales and adds in place. It rounds once where the reference rounds twice, so
the two agree to within the last bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.serving.segments import Segment


def add_in_place(y: Tensor, x: Tensor, rows: Tensor | slice, segments: Sequence[Segment]) -> Tensor:
    """`y[rows] += s B A x[rows]` for every segment.

    Args:
        y: (rows, tokens, out), contiguous, in the dtype of the factors.
        x: (rows, tokens, in).
        rows: those of the batch that the segments count; a slice where they stand together and in their order.
        segments: which of them use what.

    Returns:
        y.
    """
    together = isinstance(rows, slice)
    taken = y[rows] if together else y.index_select(0, rows)
    tokens, width = y.shape[1], y.shape[2]
    sizes = [(stop - start) * tokens for start, stop, _ in segments]
    inputs = (x[rows] if together else x.index_select(0, rows)).to(y.dtype).reshape(-1, x.shape[-1])
    sums = taken.view(-1, width)
    for one, out, (_, _, (A, B, scaling)) in zip(inputs.split(sizes), sums.split(sizes), segments):
        out.addmm_(torch.mm(one, A.T), B.T, alpha=scaling)
    return y if together else y.index_copy_(0, rows, taken)
