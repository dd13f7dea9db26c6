"""What adapters add to single tokens, compiled by numba: one call for a layer, however many adapters.

While text is written, each row is one token, and a segment of one or two rows is so little work that calling the
linear algebra library costs more than the work. Here the rows are a table of addresses, and the threads that
multiplied by the base walk it:

    z = s A x          (r,)    r dot products
    y += B z           (out,)  r multiples of the columns of B, which lie one after another in memory

Every factor is read once for each row, where it is. That is all the traffic there has to be, and at 16 adapters it is
most of the time that is left. Reading four rows of A at once, or with vectors written out, was no faster here.
"""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from labkit.quant.kernels import threads
from labkit.quant.kernels.kept import compiled
from labkit.quant.kernels.tasks import TASK
from labkit.quant.kernels.vectors import next_part, pointer
from labkit.serving.segments import Segment

FLOAT = 4  # bytes
COLUMNS = 4  # of a table: a row, the addresses of A and of B transposed, the rank


class Table:
    """The rows of a batch that have an adapter in one layer, as addresses.

    They are those of the segments' tensors, which the caller keeps.

    Args:
        order, segments: see `labkit.serving.segments.Part`.

    Raises:
        ValueError: factors that do not lie in memory as `add_rows` reads them.
    """

    def __init__(self, order: Tensor, segments: Sequence[Segment]):
        rows, lines, scalings = order.tolist(), [], []
        for start, stop, (A, B, scaling) in segments:
            if not (A.is_contiguous() and B.T.is_contiguous() and A.dtype == B.dtype == torch.float32):
                raise ValueError(
                    "A must be contiguous, B the transpose of a contiguous matrix, and both in fp32"
                )
            lines += [(row, A.data_ptr(), B.data_ptr(), len(A)) for row in rows[start:stop]]
            scalings += [scaling] * (stop - start)
        self.lines = np.array(lines, dtype=np.int64).reshape(-1, COLUMNS)
        self.scalings = np.array(scalings, dtype=np.float32)
        self.ranks = int(self.lines[:, 3].sum())
        self.arguments = len(lines), self.lines.ctypes.data, self.scalings.ctypes.data


def add_rows(y: Tensor, x: Tensor, table: Table) -> Tensor:
    """`y[row] += s B A x[row]` for the rows of a table; x (rows, 1, in) and y (rows, 1, out): contiguous, in fp32."""
    width, height = x.shape[-1], y.shape[-1]
    threads.run(
        add_task.address,
        len(table.lines),
        table.ranks * (width + height),
        x.data_ptr(),
        y.data_ptr(),
        width,
        height,
        *table.arguments,
    )
    return y


# "reassoc": a dot product may be summed in another order, as vectors have to
@numba.njit(fastmath={"reassoc", "contract"})
def add_row(x, A, B, r, scaling, y):
    """`y += s B A x` for one row; A and B transposed are flat."""
    width, height = len(x), len(y)
    for k in range(r):
        z = np.float32(0)
        for j in range(width):
            z += A[k * width + j] * x[j]
        z *= scaling
        for j in range(height):
            y[j] += z * B[k * height + j]


@compiled(TASK)
def add_task(arguments):
    a = numba.carray(arguments, 9)
    parts, width, height, rows = a[1], a[4], a[5], a[6]
    table = numba.carray(pointer(a[7]), COLUMNS * rows, np.int64)
    scalings = numba.carray(pointer(a[8]), rows, np.float32)
    part = next_part(a)
    while part < parts:
        for i in range(rows * part // parts, rows * (part + 1) // parts):
            row, r = table[COLUMNS * i], table[COLUMNS * i + 3]
            x = numba.carray(pointer(a[2] + FLOAT * row * width), width, np.float32)
            y = numba.carray(pointer(a[3] + FLOAT * row * height), height, np.float32)
            A = numba.carray(pointer(table[COLUMNS * i + 1]), r * width, np.float32)
            B = numba.carray(pointer(table[COLUMNS * i + 2]), r * height, np.float32)
            add_row(x, A, B, r, scalings[i], y)
        part = next_part(a)
