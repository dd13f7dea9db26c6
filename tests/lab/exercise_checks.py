"""What every exercise check must do; the tests of each lesson's checks call these with their own cases."""

import pytest

from labkit.lab import check


def accepts_the_solution_and_names_each_mistake(checker, right, wrong, capsys, times: int) -> None:
    """`times`: inputs are drawn afresh each time, and neither the verdict nor the name may depend on luck."""
    for _ in range(times):
        checker(right)
    assert "correct" in capsys.readouterr().out
    for function, message in wrong:
        for _ in range(times):
            with pytest.raises(check.NotYet, match=message):
                checker(function)


def survives_stubs_exceptions_and_nonsense(checker) -> None:
    with pytest.raises(check.NotYet, match="stub been filled in"):
        checker(lambda *_: None)
    with pytest.raises(check.NotYet, match="raised ZeroDivisionError"):
        checker(lambda *_: 1 / 0)
    with pytest.raises(check.NotYet, match="expected"):
        checker(lambda *_: "a string")


def tests_of(cases: list[tuple], times: int = 20):
    """The two tests of a lesson's checks, to be assigned to names in its file.

    Args:
        cases: (checker, solution, [(mistake, what the message must say), …]).
        times: how often each is tried.
    """
    each = pytest.mark.parametrize(
        ("checker", "right", "wrong"), cases, ids=lambda v: getattr(v, "__name__", "")
    )

    @each
    def accepts(checker, right, wrong, capsys):
        accepts_the_solution_and_names_each_mistake(checker, right, wrong, capsys, times)

    @each
    def survives(checker, right, wrong):
        survives_stubs_exceptions_and_nonsense(checker)

    return accepts, survives
