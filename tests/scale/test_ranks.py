"""What goes wrong on one rank is said in one sentence, and all the others end."""

import re
import socket

import pytest

from labkit.scale import ranks
from tests.scale import parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "patience", "said"),
    [
        ("killed", 30, r"^rank 1 of 2 was killed by SIGKILL .*\(in step 2\); the other ranks were ended"),
        ("raises", 30, r"^rank 1: FloatingPointError: the loss is NaN \(in step 2\)"),
        (
            "sleeps",
            2,
            r"^rank 1 has been in step 2 for [2-9]\d* seconds, at parts.py, line \d+ \(die\), while rank 0 waits for it in "
            r"all_reduce, parts.py, line \d+ \(die\): a straggler, or a hang",
        ),
    ],
)
def test_a_rank_that_dies_or_stands_still_is_named(how, patience, said):
    with pytest.raises(ranks.RankFailed) as caught:
        ranks.start(parts.die, 2, how, 2, patience=patience)
    assert re.search(said, str(caught.value)), str(caught.value)
    assert caught.value.rank == 1 and "\n" not in str(caught.value)


def test_ranks_that_wait_for_different_collectives_are_told_which():
    with pytest.raises(
        ranks.RankFailed, match=r"each waits for the others: rank 0 in all_reduce, .* rank 1 in barrier, "
    ):
        ranks.start(parts.die, 2, "goes elsewhere", 2, patience=2, counted=True)


@pytest.mark.parametrize("what", ["code", "data"])
def test_ranks_with_other_code_or_data_are_told_which(what):
    with pytest.raises(
        ranks.RankFailed, match=f"DifferentRanks: rank 1 has another {what} than the others? "
    ):
        ranks.start(parts.differ, 3, what, patience=30)


def test_a_port_that_is_taken_and_a_function_that_cannot_be_imported():
    with socket.socket() as other:
        other.bind((ranks.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"^port={port} is taken by another program; give port=0"):
            ranks.start(parts.die, 2, "never", 9, port=port)
    with pytest.raises(ValueError, match="put it at the top level of a file$"):
        ranks.start(lambda: None, 2)
    with pytest.raises(ValueError, match="ranks=0 must be a whole number"):
        ranks.start(parts.die, 0)
