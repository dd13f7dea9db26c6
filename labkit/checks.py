"""The checks that every part of labkit makes of what it is given: a known name, a whole number, and a hint at the nearest name."""

import difflib
import math
from collections.abc import Iterable


def nearest(given: object, known: Iterable[str]) -> str:
    """A hint for an error message: "did you mean 'q_proj'?", or "" if no name is near.

    >>> nearest("q_porj", ["q_proj", "v_proj"])
    "did you mean 'q_proj'?"
    """
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a `ValueError` that lists what is allowed, unless `value` is in `allowed`.

    >>> check_choice("schedule", "cosin", ("linear", "cosine"))
    Traceback (most recent call last):
    ValueError: schedule='cosin' is not known; choose one of ('linear', 'cosine'); did you mean 'cosine'?
    """
    allowed = tuple(allowed)
    if not any(type(value) is type(one) and value == one for one in allowed):
        hint = nearest(value, filter(lambda one: isinstance(one, str), allowed))
        raise ValueError(
            f"{name}={value!r} is not known; choose one of {allowed}" + (f"; {hint}" if hint else "")
        )


def is_whole(value: object, at_least: int = 1) -> bool:
    """Is it an `int` (and not a bool) of at least that much?"""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def check_whole(name: str, value: object, at_least: int = 1, usual: str = "") -> None:
    """Raise a `ValueError` unless `value` is a whole number of at least `at_least`.

    Args:
        name: of the setting, for the message.
        value: what was given.
        at_least: the smallest that is allowed.
        usual: what to say of usual values, such as "8 or 16 is a usual start".

    >>> check_whole("rank", 2.5, usual="8 or 16 is a usual start")
    Traceback (most recent call last):
    ValueError: rank=2.5 must be a whole number of at least 1; 8 or 16 is a usual start
    """
    if not is_whole(value, at_least):
        raise ValueError(
            f"{name}={value!r} must be a whole number of at least {at_least}"
            + (f"; {usual}" if usual else "")
        )


def check_positive(name: str, value: object, usual: str = "") -> None:
    """Raise a `ValueError` unless `value` is a finite number above 0.

    >>> check_positive("lr", float("nan"))
    Traceback (most recent call last):
    ValueError: lr=nan must be a positive number
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a positive number" + (f"; {usual}" if usual else ""))
