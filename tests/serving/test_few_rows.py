"""Single tokens of different adapters, added on threads: the sum that the reference adds, on any number of them."""

import pytest
import torch

from labkit.serving.few_rows import Table, add_rows
from labkit.serving.loaded import ALIGNMENT, make_room
from labkit.serving.segments import Factors, Segment, add_segments, sort_rows


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_batch(rows, ranks, width, height):
    """x, y and the segments of rows such as "ab.a", where "." has no adapter."""
    draw = torch.Generator().manual_seed(0)
    by_row = sort_rows([None if row == "." else row for row in rows])
    segments = []
    for i, name in enumerate(by_row.keys):
        A = torch.randn(ranks[name], width, generator=draw) / width**0.5
        B = torch.randn(ranks[name], height, generator=draw).T
        segments.append(Segment(by_row.starts[i], by_row.starts[i + 1], Factors(A, B, 0.5 + i)))
    x, y = (torch.randn(len(rows), 1, n, generator=draw) for n in (width, height))
    return x, y, by_row.order, segments


@pytest.mark.parametrize(
    ("rows", "ranks", "width", "height"),
    [
        ("ab.cba.a", {"a": 2, "b": 33, "c": 16}, 70, 130),
        ("a" * 16, {"a": 16}, 576, 1536),  # enough to be worth the threads
        ("abcdefghijklmnop", dict.fromkeys("abcdefghijklmnop", 16), 1536, 576),
        ("..b", {"b": 1}, 3, 5),
    ],
)
def test_rows_get_what_the_reference_adds_and_others_stay(threads, rows, ranks, width, height):
    x, y, order, segments = make_batch(rows, ranks, width, height)
    expected = add_segments(y.clone(), x, order, segments)
    ours = add_rows(y.clone(), x, Table(order, segments))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    others = [i for i, row in enumerate(rows) if row == "."]
    assert torch.equal(ours[others], y[others])


def test_a_row_is_the_same_to_the_last_bit_whoever_else_is_in_the_batch(threads):
    ranks = dict.fromkeys("abcdefgh", 16)
    x, y, order, segments = make_batch("abcdefghabcdefgh", ranks, 576, 1536)
    whole = add_rows(y.clone(), x, Table(order, segments))
    for start, stop, factors in segments:
        for row in order[start:stop].tolist():
            alone = Table(torch.tensor([0]), [Segment(0, 1, factors)])
            assert torch.equal(add_rows(y[row : row + 1].clone(), x[row : row + 1], alone)[0], whole[row])


def test_factors_that_do_not_lie_as_they_are_read_are_refused():
    A, B = torch.randn(4, 8), torch.randn(6, 4)
    with pytest.raises(ValueError, match="B the transpose of a contiguous matrix"):
        Table(torch.tensor([0]), [Segment(0, 1, Factors(A, B, 1.0))])


def test_tensors_share_a_piece_of_memory_and_no_byte_of_it():
    cpu, shapes = torch.device("cpu"), {}
    for i, dtype in enumerate((torch.float32, torch.float64, torch.float32)):
        shapes[i] = (3, 5 + i), dtype, cpu
    rooms = make_room(shapes)
    for i, room in rooms.items():
        room.fill_(i)
    assert all((room == i).all() and room.dtype == shapes[i][1] for i, room in rooms.items())
    starts = [room.data_ptr() for room in rooms.values()]
    assert len({room.untyped_storage().data_ptr() for room in rooms.values()}) == 1
    assert all((later - starts[0]) % ALIGNMENT == 0 for later in starts)
