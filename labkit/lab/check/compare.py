"""Try a student's function on fresh inputs; when its result is wrong, say which mistake it looks like.

A check knows the right answer and the wrong ones that people really give; a wrong one may raise an error, too. A
result that matches none of these is described by the first place where it differs from what was expected.
"""

import contextlib
import io
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from labkit.lab import diary

TRIES = 5
GRADING = "LABKIT_GRADING"  # set in the kernel that grades
FEW = 8  # numbers of a tensor that are shown whole


class NotYet(AssertionError):
    """The exercise is not solved yet; the message says what the result looks like."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message. A traceback would end in the code that knows the answer."""
        return [f"Not yet. {self}"]


class Stopped(KeyboardInterrupt):
    """The reader stopped a check, or a time limit did; shown, as `NotYet`, without the code that knows the answer."""

    def _render_traceback_(self) -> list[str]:
        return [f"Stopped. {self}"]


_asked: ContextVar[list[Callable] | None] = ContextVar("asked", default=None)  # where `reference` listens
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def noted(name: str) -> Iterator[None]:
    """Around a check: whether it passed goes into the reader's progress, and no traceback shows the answer.

    Raises:
        NotYet: not solved; also when the student's function made the check itself fail.
        Stopped: the check was interrupted.
    """
    passed = False
    try:
        yield
        passed = True
    except NotYet:
        raise
    except KeyboardInterrupt:
        raise Stopped(f"{name}: your function was still running; does it come to an end?") from None
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        raise NotYet(f"{name}: the check could not go on after your function ({said})") from None
    finally:
        if not _quiet.get():
            diary.note_exercise(name, passed)


def is_asked(right: Callable) -> bool:
    """Does somebody only want the right function? Then a check hands it over, and tries nothing."""
    asked = _asked.get()
    if asked is not None:
        asked.append(right)
    return asked is not None


def passes(check: Callable, function: Callable) -> bool:
    """Does the function pass? Nothing is printed or noted."""
    before = _quiet.set(True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            check(function)
    except NotYet:
        return False
    finally:
        _quiet.reset(before)
    return True


def yours_or_ours(check: Callable, yours: Callable) -> Callable:
    """`yours` if it passes the check; until then the course's own, so that a lesson goes on below an exercise.

    In grading there are no others' functions: `yours` comes back as it is.
    """
    if os.environ.get(GRADING) or passes(check, yours):
        return yours
    asked: list[Callable] = []
    before = _asked.set(asked)
    try:
        check(yours)
    finally:
        _asked.reset(before)
    ours = asked[0]
    print(f"{check.__name__}: yours does not pass yet. What follows uses the course's own.")
    return lambda *arguments: ours(*arguments)


def compare(
    name: str,
    theirs: Callable,
    right: Callable,
    mistakes: dict[str, Callable],
    inputs: Callable[[], tuple],
    parts: Sequence[str] = (),
    atol: float = 1e-5,
) -> None:
    """Call `theirs` and `right` on fresh inputs; if they differ, name the mistake that explains the most.

    Several inputs are tried, because two different mistakes may agree on one of them by chance.

    Args:
        name: of the exercise, with which a message begins.
        theirs, right: the student's function and the solution, of the same arguments.
        mistakes: {message: a function with that mistake}; it may raise the error that the mistake raises.
        inputs: makes fresh arguments.
        parts: names of the parts of a result that is a tuple.
        atol: differences up to this count as rounding.

    Raises:
        NotYet: says what the differences look like.
    """
    if is_asked(right):
        return
    with noted(name):
        judge(name, theirs, right, mistakes, inputs, parts, atol)


def judge(
    name: str,
    theirs: Callable,
    right: Callable,
    mistakes: dict[str, Callable],
    inputs: Callable[[], tuple],
    parts: Sequence[str],
    atol: float,
) -> None:
    """What `compare` does, of the same arguments."""
    wrong = []  # (arguments, got, expected)
    for _ in range(TRIES):
        arguments = inputs()
        got, expected = outcome(theirs, arguments), right(*arguments)
        check_filled_in(name, got)
        if not same(got, expected, atol):
            wrong.append((arguments, got, expected))
    if not wrong:
        print(f"{name}: correct, on {TRIES} fresh inputs.")
        return
    likeliest, most = "", 0
    for message, mistake in mistakes.items():
        explained = sum(same(got, outcome(mistake, arguments), atol) for arguments, got, _ in wrong)
        if explained > most:
            likeliest, most = message, explained
        if most == len(wrong):  # no other can explain more
            break
    if likeliest:
        raise NotYet(f"{name}: {likeliest}")
    arguments, got, expected = wrong[0]
    if isinstance(got, Exception):
        raise NotYet(f"{name}: your function raised {type(got).__name__}: {got}{raised_at(got)}") from got
    where = difference(got, expected, parts, atol)
    raise NotYet(f"{name}: {where}{given(arguments)}")


def check_filled_in(name: str, got: object) -> None:
    """Raise `NotYet` for what a stub gives."""
    if isinstance(got, NotImplementedError):
        raise NotYet(f"{name}: nothing is there yet; has the stub been filled in?")
    if got is None or got is Ellipsis:
        raise NotYet(f"{name}: your function returned {got!r}; has the stub been filled in?")


def outcome(function: Callable, arguments: tuple) -> object:
    """What the function returns, or the error that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def same(a, b, atol: float = 1e-5) -> bool:
    """Equal up to rounding, NaN where the other has NaN; for numbers, tensors, lists or tuples, and errors."""
    if isinstance(a, Exception) or isinstance(b, Exception):
        return type(a) is type(b) and str(a) == str(b)
    try:
        left, right = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):  # not one array: compare part by part
        parts = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b)
        return parts and all(same(one, other, atol) for one, other in zip(a, b))
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-4, atol=atol, equal_nan=True)


def difference(got, expected, parts: Sequence[str] = (), atol: float = 1e-5) -> str:
    """The first place where `got` differs from `expected`, in words."""
    if isinstance(expected, (list, tuple)) and not is_flat(expected):
        if not isinstance(got, (list, tuple)) or len(got) != len(expected):
            return f"expected {len(expected)} parts, got {describe(got)}"
        n = next(n for n, (one, other) in enumerate(zip(got, expected)) if not same(one, other, atol))
        return f"{parts[n] if parts else f'part {n}'}: {difference(got[n], expected[n], atol=atol)}"
    try:
        left, right = (torch.as_tensor(value, dtype=torch.float64) for value in (got, expected))
    except (TypeError, ValueError, RuntimeError):  # not numbers
        return f"expected {describe(expected)}, got {describe(got)}"
    if left.shape != right.shape:
        return f"expected the shape {tuple(right.shape)}, got {tuple(left.shape)}"
    if not right.dim():
        return f"expected {right.item():.6g}, got {left.item():.6g}"
    off = ~torch.isclose(left, right, rtol=1e-4, atol=atol, equal_nan=True)
    first = tuple(off.nonzero()[0].tolist())
    at = ", ".join(map(str, first))
    return f"{off.sum()} of {off.numel()} entries differ; at [{at}] expected {right[first]:.6g}, got {left[first]:.6g}"


def is_flat(value: Sequence) -> bool:
    """Is it a list of plain numbers?"""
    return all(isinstance(one, (int, float)) for one in value)


def raised_at(error: BaseException) -> str:
    """The student's own line that raised the error: the first one outside of this folder."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if Path(frame.filename).parent != Path(__file__).parent]
    return f", at `{theirs[0].line.strip()}`" if theirs and theirs[0].line else ""


def given(arguments: tuple) -> str:
    """The arguments, where they are short."""
    text = describe(arguments)
    return f" (for {text})" if len(text) <= 120 else ""


def describe(value) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > FEW:
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return ", ".join(describe(v) for v in value)
    return str(value.tolist() if isinstance(value, torch.Tensor) else value)
