"""What adapters add to single tokens, compiled by numba: one call for a layer, however many adapters.

While text is written, each row is one token, and a segment of one or two rows is so little work that calling the
linear algebra library costs more than the work. Here the rows are a table of addresses, walked in one loop:

    z = s A x          (r,)    r dot products
    y += B z           (out,)  r multiples of the columns of B, which lie one after another in memory

Every factor is read once, where it is. That is all the traffic there has to be, and at 16 adapters it is most of the
time that is left.
"""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from labkit.quant.kernels.vectors import pointer
from labkit.serving.segments import Segment

FLOAT = 4  # bytes


def table_of(order: Tensor, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """For each row: its index, the addresses of A and of B transposed, and the rank; and its scaling.

    The addresses are those of the segments' tensors, which the caller keeps.
    """
    rows, lines, scalings = order.tolist(), [], []
    for start, stop, (A, B, scaling) in segments:
        if not (A.is_contiguous() and B.T.is_contiguous() and A.dtype == B.dtype == torch.float32):
            raise ValueError("A must be contiguous, B the transpose of a contiguous matrix, and both in fp32")
        lines += [(row, A.data_ptr(), B.data_ptr(), len(A)) for row in rows[start:stop]]
        scalings += [scaling] * (stop - start)
    return np.array(lines, dtype=np.int64).reshape(-1, 4), np.array(scalings, dtype=np.float32)


def add_rows(y: Tensor, x: Tensor, table: np.ndarray, scalings: np.ndarray) -> Tensor:
    """`y[row] += s B A x[row]` for the rows of a table; x (rows, in) and y (rows, out) are contiguous and in fp32."""
    add_table(x.data_ptr(), y.data_ptr(), x.shape[-1], y.shape[-1], table, scalings)
    return y


# "reassoc": a dot product may be summed in another order, as vectors have to
@numba.njit(
    "void(int64, int64, int64, int64, int64[:,::1], float32[::1])",
    nogil=True,
    fastmath={"reassoc", "contract"},
)
def add_table(x_at, y_at, width, height, table, scalings):
    for i in range(len(table)):
        row, r = table[i, 0], table[i, 3]
        x = numba.carray(pointer(x_at + FLOAT * row * width), width, np.float32)
        y = numba.carray(pointer(y_at + FLOAT * row * height), height, np.float32)
        A = numba.carray(pointer(table[i, 1]), r * width, np.float32)
        B = numba.carray(pointer(table[i, 2]), r * height, np.float32)
        for k in range(r):
            z = np.float32(0)
            for j in range(width):
                z += A[k * width + j] * x[j]
            z *= scalings[i]
            for j in range(height):
                y[j] += z * B[k * height + j]
