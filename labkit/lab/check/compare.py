"""Try a student's function on fresh inputs; when its result is wrong, say which mistake it looks like.

A check knows the right answer and the wrong ones that people really give. A result that matches none of these
is shown next to the expected one.
"""

from collections.abc import Callable

import torch

TRIES = 5


class NotYet(AssertionError):
    """The exercise is not solved yet; the message says what the result looks like."""


def compare(
    name: str, theirs: Callable, right: Callable, mistakes: dict[str, Callable], inputs: Callable[[], tuple]
) -> None:
    """Call `theirs` and `right` on fresh inputs; if they differ, name the mistake that explains the most.

    Several inputs are tried, because two different mistakes may agree on one of them by chance.

    Raises:
        NotYet: says what the differences look like.
    """
    wrong = []  # (arguments, got, expected)
    for _ in range(TRIES):
        arguments = inputs()
        try:
            got = theirs(*arguments)
        except Exception as error:
            raise NotYet(f"{name}: your function raised {type(error).__name__}: {error}") from error
        if got is None or got is Ellipsis:
            raise NotYet(f"{name}: your function returned {got!r}; has the stub been filled in?")
        expected = right(*arguments)
        if not same(got, expected):
            wrong.append((arguments, got, expected))
    if wrong:
        likeliest, most = "", 0
        for message, mistake in mistakes.items():
            explained = sum(same(got, mistake(*arguments)) for arguments, got, _ in wrong)
            if explained > most:
                likeliest, most = message, explained
            if most == len(wrong):  # no other can explain more
                break
        if likeliest:
            raise NotYet(f"{name}: {likeliest}")
        arguments, got, expected = wrong[0]
        raise NotYet(f"{name}: for {describe(arguments)} expected {describe(expected)}, got {describe(got)}")
    print(f"{name}: correct, on {TRIES} fresh inputs.")


def same(a, b) -> bool:
    """Equal up to rounding, NaN where the other has NaN; for numbers, tensors, and lists or tuples."""
    try:
        left, right = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):  # not one array: compare part by part
        parts = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b)
        return parts and all(same(one, other) for one, other in zip(a, b))
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-4, atol=1e-5, equal_nan=True)


def describe(value) -> str:
    if isinstance(value, torch.Tensor) and value.numel() > 8:
        return f"a tensor of shape {tuple(value.shape)} with mean {value.double().mean():.4g}"
    if isinstance(value, tuple):
        return ", ".join(describe(v) for v in value)
    return str(value.tolist() if isinstance(value, torch.Tensor) else value)
