"""The checks that every part of labkit makes of its settings: known names, whole numbers, numbers in a range; and of the
packages that it can do without.

Each raises a `ValueError` that says what was given and what is allowed. A bool is never a number here,
although Python counts it as an `int`.
"""

import difflib
import importlib
import importlib.metadata
import math
from collections.abc import Iterable
from dataclasses import fields
from types import ModuleType
from typing import TypeGuard

import numpy as np


def nearest(given: object, known: Iterable[str]) -> str:
    """How a sentence about an unknown name ends: with the known name that is nearest to it, if one is near.

    >>> "'q_porj' matches no layer" + nearest("q_porj", ["q_proj", "v_proj"])
    "'q_porj' matches no layer; did you mean 'q_proj'?"
    >>> "'x' matches no layer" + nearest("x", ["q_proj", "v_proj"])
    "'x' matches no layer."
    """
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def needed(package: str, user: str) -> ModuleType:
    """A package that labkit can do without, for what cannot do without it.

    Args:
        package: its name, as it is imported and installed.
        user: what needs it, as the error calls it.

    Raises:
        ModuleNotFoundError: it is not installed; says what needs it, and how to get it.

    >>> needed("numpee", "reading a table")
    Traceback (most recent call last):
    ModuleNotFoundError: numpee is not installed, and reading a table needs it; pip install numpee
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        top = package.partition(".")[0]
        if error.name not in (top, package):  # it is installed, and something that it needs is not
            raise
        raise ModuleNotFoundError(
            f"{top} is not installed, and {user} needs it; pip install {top}", name=top
        ) from None


def version_of(package: str) -> str:
    """The version of a package, or "unknown" if nothing is installed under this name, as labkit in a bare checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a `ValueError` that lists what is allowed, unless `value` is one of `allowed`.

    >>> check_choice("schedule", "cosin", ("linear", "cosine"))
    Traceback (most recent call last):
    ValueError: schedule='cosin' is not known; choose one of ('linear', 'cosine'); did you mean 'cosine'?
    """
    allowed = tuple(allowed)
    if not any(is_same(value, one) for one in allowed):
        raise not_known(name, value, allowed)


def not_known(name: str, value: object, allowed: Iterable[object], usual: str = "") -> ValueError:
    """The error that `check_choice` raises, for a choice that is checked in another way."""
    allowed = tuple(allowed)
    hint = nearest(value, [one for one in allowed if isinstance(one, str)]).removesuffix(".")
    return ValueError(
        f"{name}={value!r} is not known; choose one of {allowed}{hint}" + (f"; {usual}" if usual else "")
    )


def is_same(value: object, one: object) -> bool:
    """Are the two equal, and of one type? (In Python `True == 1 == 1.0`.)"""
    return isinstance(value, type(one)) and isinstance(value, bool) == isinstance(one, bool) and value == one


def is_number(value: object) -> TypeGuard[float]:
    """Is it a real number, Python's or numpy's, that a float can hold, and neither a bool nor NaN?"""
    if not isinstance(value, (int, float, np.integer, np.floating)) or type(value) is bool:
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def is_whole(value: object, at_least: int = 1) -> TypeGuard[int]:
    """Is it an integer, Python's or numpy's (and not a bool), of at least that much?"""
    return isinstance(value, (int, np.integer)) and type(value) is not bool and bool(value >= at_least)


def use_python_numbers(config: object) -> None:
    """Turn numpy's numbers in the fields of a (frozen) dataclass into Python's, which JSON can hold."""
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, (np.integer, np.floating)):
            object.__setattr__(config, field.name, value.item())


def check_whole(name: str, value: object, at_least: int = 1, usual: str = "") -> None:
    """Raise a `ValueError` unless `value` is a whole number of at least `at_least`.

    Args:
        name: of the setting, for the message.
        value: what was given.
        at_least: the smallest that is allowed.
        usual: what to say about usual values, such as "8 or 16 is a usual start".

    >>> check_whole("rank", 2.5, usual="8 or 16 is a usual start")
    Traceback (most recent call last):
    ValueError: rank=2.5 must be a whole number of at least 1; 8 or 16 is a usual start
    """
    if not is_whole(value, at_least):
        raise ValueError(said(name, value, f"a whole number of at least {at_least}", usual))


def check_positive(name: str, value: object, usual: str = "") -> None:
    """Raise a `ValueError` unless `value` is a finite number above 0.

    >>> check_positive("lr", float("nan"))
    Traceback (most recent call last):
    ValueError: lr=nan must be a positive number
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(said(name, value, "a positive number", usual))


def check_number(name: str, value: object, at_least: float, below: float = math.inf, usual: str = "") -> None:
    """Raise a `ValueError` unless `value` is a finite number of at least `at_least` and below `below`.

    >>> check_number("dropout", 1, at_least=0, below=1)
    Traceback (most recent call last):
    ValueError: dropout=1 must be a number of at least 0 and below 1
    """
    if not is_number(value) or not at_least <= value < below:
        limit = "" if below == math.inf else f" and below {below}"
        raise ValueError(said(name, value, f"a number of at least {at_least}{limit}", usual))


def said(name: str, value: object, allowed: str, usual: str) -> str:
    """The message of a check that failed."""
    return f"{name}={value!r} must be {allowed}" + (f"; {usual}" if usual else "")
