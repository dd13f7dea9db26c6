"""What a student sees when an exercise is not solved yet."""

import random

import pytest
import torch

from labkit.lab.check import compare
from labkit.lab.check.compare import NotYet


def square(x):
    return x * x


def try_on(function, mistakes=None, parts=(), right=square, inputs=lambda: (torch.arange(12.0).view(3, 4),)):
    compare.compare("exercise", function, right, mistakes or {}, inputs, parts)


def test_the_first_entry_that_differs_is_shown():
    def off_by_one(x):
        return square(x) + (x == 6)

    with pytest.raises(NotYet, match=r"1 of 12 entries differ; at \[1, 2\] expected 36, got 37"):
        try_on(off_by_one)


def test_a_wrong_shape_is_said_before_any_number():
    with pytest.raises(NotYet, match=r"expected the shape \(3, 4\), got \(4, 3\)"):
        try_on(lambda x: square(x).T)


def test_the_part_that_differs_has_its_name():
    with pytest.raises(NotYet, match=r"the second: 12 of 12"):
        try_on(
            lambda x: (x, x + 1), parts=("the first", "the second"), right=lambda x: (x, x),
        )  # fmt: skip
    with pytest.raises(NotYet, match="expected 2 parts"):
        try_on(lambda x: x, right=lambda x: (x, x))


def test_two_results_that_look_alike_are_told_apart_by_an_entry():
    with pytest.raises(NotYet, match="at .0. expected 0, got 0.001"):
        try_on(lambda x: x + 1e-3, right=lambda x: x, inputs=lambda: (torch.arange(300.0),))


def test_a_number_is_shown_with_the_arguments():
    with pytest.raises(NotYet, match=r"expected 4, got 5 \(for 2\)"):
        try_on(lambda n: n + 3, right=square, inputs=lambda: (2,))


def test_a_mistake_that_raises_is_named_by_its_error():
    W, x = torch.randn(5, 3), torch.randn(2, 3)

    def given():
        return x, W

    with pytest.raises(NotYet, match="transpose"):
        try_on(
            lambda x, W: x @ W,
            {"a transpose is missing": lambda x, W: x @ W},
            (),
            lambda x, W: x @ W.T,
            given,
        )


def test_an_error_of_another_kind_is_shown_with_its_line():
    def broken(x):
        return x / undefined  # noqa: F821

    with pytest.raises(NotYet, match="raised NameError: .*at `return x / undefined"):
        try_on(broken, {"a mistake": lambda x: x + "text"})


def test_what_a_notebook_shows_is_one_line_without_the_solution():
    with pytest.raises(NotYet) as caught:
        try_on(lambda x: None)
    (line,) = caught.value._render_traceback_()
    assert line.startswith("Not yet. exercise: your function returned None") and "\n" not in line
    assert "square" not in line


def test_a_notebook_renders_it_so(tmp_path):
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactive.InteractiveShell.instance()
    shown = []
    shell._showtraceback = lambda kind, value, lines: shown.append(lines)
    shell.run_cell(
        "from labkit.lab import check\ncheck.weight_bytes(lambda parameters, bits: parameters * bits)"
    )
    assert shown == [["Not yet. weight_bytes: that is bits; there are eight to a byte"]]


def test_the_verdict_does_not_depend_on_luck():
    random.seed(0)
    for _ in range(20):
        with pytest.raises(NotYet, match="twice"):
            try_on(
                lambda n: 2 * n * n, {"that is twice": lambda n: 2 * n * n, "that is n": lambda n: n},
                inputs=lambda: (random.randint(2, 9),),
            )  # fmt: skip
