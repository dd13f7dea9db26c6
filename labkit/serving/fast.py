"""The fast paths of `labkit.serving.segments.add_segments`: the same sum with fewer copies and calls.

The reference takes rows out of x and y and puts them back for each segment. Here that happens once for all, and not at
all where the rows stand together, as an engine can arrange it. Each segment is then two calls into the linear algebra
library, the second of which multiplies, scales and adds in place. While text is written, when most segments are single
tokens, even two calls are many, and `labkit.serving.few_rows` walks all of them in one. A GPU has kernels of its own,
`labkit.serving.triton_segments`.

They sum in another order, or round once where the reference rounds twice, and agree with it to within the last bits.
"""

import torch
from torch import Tensor

from labkit.hardware import fast_paths
from labkit.quant.kernels.dispatch import has_kernels, is_ordinary
from labkit.serving.segments import Part

FEW = 16  # rows of a segment, on average, up to which a loop over rows is faster than two products


def is_fast(y: Tensor, x: Tensor, part: Part) -> bool:
    """Is there a fast path for hidden states x, (rows, tokens, in), and the base's output y?

    Not where y is differentiated: it is overwritten.
    """
    if not fast_paths() or (torch.is_grad_enabled() and y.requires_grad):
        return False
    factors = part.segments[0].factors
    return on_gpu(y, x, part) or (x.is_floating_point() and y.dtype == factors.B.dtype and y.is_contiguous())


def on_gpu(y: Tensor, x: Tensor, part: Part) -> bool:
    """Do Triton's kernels take these?"""
    if not (x.is_cuda and has_kernels(x) and is_ordinary(x)):
        return False
    from labkit.serving.triton_segments import takes  # late: Triton needs a GPU

    return takes(y, x, part)


def add_in_place(y: Tensor, x: Tensor, part: Part) -> Tensor:
    """`y[rows] += s B A x[rows]` for every segment, where `is_fast` says so.

    Args:
        y: (rows, tokens, out), the base's output.
        x: (rows, tokens, in).
        part: the segments, at least one.

    Returns:
        y.
    """
    if on_gpu(y, x, part):
        from labkit.serving.triton_segments import add_with_kernels

        return add_with_kernels(y, x, part)
    if is_single_tokens(y, x, part):
        # late: numba takes a second to import, and to compile
        from labkit.serving.few_rows import Table, add_rows

        if part.table is None:
            part.table = Table(part.order, part.segments)
        return add_rows(y, x.contiguous(), part.table)
    rows = part.together
    taken = y.index_select(0, part.order) if rows is None else y[rows]
    inputs = x.index_select(0, part.order) if rows is None else x[rows]
    sizes = [(stop - start) * y.shape[1] for start, stop, _ in part.segments]
    ones = inputs.to(y.dtype).reshape(-1, x.shape[-1]).split(sizes)
    sums = taken.view(-1, y.shape[-1]).split(sizes)
    for one, out, (_, _, (A, B, scaling)) in zip(ones, sums, part.segments):
        out.addmm_(torch.mm(one, A.T), B.T, alpha=scaling)
    return y if rows is not None else y.index_copy_(0, part.order, taken)


def is_single_tokens(y: Tensor, x: Tensor, part: Part) -> bool:
    """Are there one token for each row, few rows for each adapter, and fp32 on a CPU?"""
    return (
        y.shape[1] == 1
        and len(part.order) <= FEW * len(part.segments)
        and x.is_cpu
        and x.dtype == y.dtype == torch.float32
        and has_kernels(x)
        and is_ordinary(x)
    )
