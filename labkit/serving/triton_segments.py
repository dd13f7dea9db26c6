"""The segments of a mixed batch on a GPU, in Triton: two kernels for a layer, however many adapters.

`shrink` makes z = s A x, and `expand` adds B z to y. Each program takes some tokens of one segment, so that it needs
one A or one B, whose address it looks up: ranks may differ, and no factor is copied to one shape with others. No two
programs write to the same place.

Without a GPU, TRITON_INTERPRET=1 runs the same code on a CPU; the tests do.

Source: S-LoRA (Sheng et al. 2023), section 5, and vLLM's `lora_shrink` and `lora_expand`. Agrees with:
`labkit.serving.segments.add_segments`, up to the order of sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.serving.segments import Part

READ = torch.float32, torch.bfloat16, torch.float16  # dtypes of x and y
TOKENS, WIDTH = 16, 64  # of x that a program takes at a time; numbers of a row


@triton.jit
def _tokens_of(block, blocks, order, tokens, TOKENS: tl.constexpr):
    # of a block: its segment, where its tokens are in sorted order, which are there, and where those are in the batch
    segment = tl.load(blocks + 3 * block)
    place = tl.load(blocks + 3 * block + 1) + tl.arange(0, TOKENS)
    inside = place < tl.load(blocks + 3 * block + 2)
    row = tl.load(order + place // tokens, mask=inside, other=0)
    return segment, place, inside, row * tokens + place % tokens


@triton.jit(do_not_specialize=["tokens"])
def shrink(
    x,
    z,
    order,
    blocks,
    A_at,
    ranks,
    scalings,
    tokens,
    width,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    segment, place, inside, token = _tokens_of(tl.program_id(0), blocks, order, tokens, TOKENS)
    A = tl.load(A_at + segment).to(tl.pointer_type(tl.float32))
    k = tl.arange(0, R)
    is_rank = k < tl.load(ranks + segment)
    sums = tl.zeros((TOKENS, R), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        j = start + tl.arange(0, WIDTH)
        some = tl.load(
            x + token[:, None] * width + j[None, :], mask=inside[:, None] & (j < width)[None, :], other=0
        )
        a = tl.load(
            A + k[None, :] * width + j[:, None], mask=is_rank[None, :] & (j < width)[:, None], other=0
        )
        sums = tl.dot(some.to(tl.float32), a, sums, input_precision="ieee")  # no TF32
    sums = sums * tl.load(scalings + segment)
    tl.store(z + place[:, None] * R + k[None, :], sums, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens"])
def expand(
    y,
    z,
    order,
    blocks,
    B_at,
    ranks,
    tokens,
    height,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    HEIGHT: tl.constexpr,
):
    segment, place, inside, token = _tokens_of(tl.program_id(0), blocks, order, tokens, TOKENS)
    B = tl.load(B_at + segment).to(tl.pointer_type(tl.float32))
    k, o = tl.arange(0, R), tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
    is_rank, is_output = k < tl.load(ranks + segment), o < height
    some = tl.load(z + place[:, None] * R + k[None, :], mask=inside[:, None], other=0)
    b = tl.load(B + k[:, None] * height + o[None, :], mask=is_rank[:, None] & is_output[None, :], other=0)
    at = y + token[:, None] * height + o[None, :]
    there = inside[:, None] & is_output[None, :]
    before = tl.load(at, mask=there, other=0)
    after = before.to(tl.float32) + tl.dot(some, b, input_precision="ieee")
    tl.store(at, after.to(before.dtype), mask=there)


def takes(y: Tensor, x: Tensor, part: Part) -> bool:
    """Can the kernels read these?"""
    factors = [segment.factors for segment in part.segments]
    return (
        x.dtype in READ
        and y.dtype in READ
        and y.is_contiguous()
        and all(A.dtype == B.dtype == torch.float32 for A, B, _ in factors)
    )


def tables_of(part: Part, tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """On the device: (blocks, 3) segment, start and stop in sorted tokens; and for each segment the addresses of A and
    of B transposed, its rank and its scaling."""
    blocks = [
        (i, first, stop * tokens)
        for i, (start, stop, _) in enumerate(part.segments)
        for first in range(start * tokens, stop * tokens, TOKENS)
    ]
    factors = [segment.factors for segment in part.segments]
    if not all(A.is_contiguous() and B.T.is_contiguous() for A, B, _ in factors):
        raise ValueError("A must be contiguous, and B the transpose of a contiguous matrix")
    columns = [blocks, *([f.data_ptr() for f in side] for side in list(zip(*factors))[:2])]
    columns.append([len(A) for A, _, _ in factors])
    tables = [torch.tensor(column, dtype=torch.int64).to(device) for column in columns]
    return *tables, torch.tensor([scaling for _, _, scaling in factors]).to(device)


def add_with_kernels(y: Tensor, x: Tensor, part: Part) -> Tensor:
    """`y[rows] += s B A x[rows]` for every segment, in place: x (rows, tokens, in), y (rows, tokens, out)."""
    tokens, width, height = y.shape[1], x.shape[-1], y.shape[-1]
    if part.table is None or part.table[0] != tokens:
        part.table = tokens, tables_of(part, tokens, x.device)
    blocks, A_at, B_at, ranks, scalings = part.table[1]
    R = max(16, triton.next_power_of_2(max(len(s.factors.A) for s in part.segments)))
    z = torch.empty(len(part.order) * tokens, R, dtype=torch.float32, device=x.device)
    sizes = {"R": R, "TOKENS": TOKENS, "num_warps": 4}
    x = x.contiguous()
    with torch.cuda.device_of(x):
        shrink[(len(blocks),)](
            x, z, part.order, blocks, A_at, ranks, scalings, tokens, width, WIDTH=WIDTH, **sizes
        )
        grid = len(blocks), triton.cdiv(height, WIDTH)
        expand[grid](y, z, part.order, blocks, B_at, ranks, tokens, height, HEIGHT=WIDTH, **sizes)
    return y
