"""What of a PEFT configuration a loader follows, what it passes over, and what it refuses.

PEFT's configurations have dozens of keys, and every version adds some. A loader here names those that it
follows, each with a check of its value, and those that cannot change what a saved adapter computes. Any other
is refused by name if it is set: a key that nobody here knows may be the one that says how to compute.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from labkit.checks import is_number, is_whole
from labkit.models.patterns import PatternError, check_patterns

# where it was made and for what, and how it was trained
PASSED_OVER = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
    "task_type",
})  # fmt: skip
MAX_CONFIG = 2**22  # bytes; the full names of all layers of the largest models take 1 MiB
LARGEST = 2**20  # the largest rank, number of tokens or of a layer that is read

Check = Callable[[Any], bool]


def is_switch(value: object) -> bool:
    """Is it true, false, or not given?"""
    return value is None or isinstance(value, bool)


def is_count(value: object) -> bool:
    """Is it a whole number of at least 1, and no larger than makes sense?"""
    return is_whole(value) and value <= LARGEST


def is_factor(value: object) -> bool:
    """Is it a positive number that fp32 can hold?"""
    return is_number(value) and 1e-37 < value < 1e38


def is_share(value: object) -> bool:
    """Is it a number of at least 0 and below 1, or not given?"""
    return value is None or (is_number(value) and 0 <= value < 1)


def are_names(value: object) -> bool:
    """Is it a list of names, or not given?"""
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def are_names_or_pattern(value: object) -> bool:
    """Is it a list of names, an expression, or not given?"""
    return isinstance(value, str) or are_names(value)


def are_layers(value: object) -> bool:
    """Is it the number of a layer, a list of numbers, or not given?"""
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(is_whole(n, at_least=0) and n <= LARGEST for n in numbers)


def by_pattern(check: Check) -> Check:
    """Is it a value that fits for each of some patterns, or not given?"""
    return lambda value: value is None or (isinstance(value, dict) and all(map(check, value.values())))


# the checks, in words
ALLOWED: dict[Check, str] = {
    is_switch: "true or false",
    is_count: f"a whole number from 1 to {LARGEST:,}",
    is_factor: "a positive number that fp32 can hold",
    is_share: "a number of at least 0 and below 1",
    are_names: "a list of names",
    are_names_or_pattern: "a list of names, or an expression",
    are_layers: f"whole numbers from 0 to {LARGEST:,}",
}


def is_set(value: object) -> bool:
    """Does a key with this value say anything? (Not null, false, zero or empty, which all say "without".)"""
    return bool(value) or (isinstance(value, float) and math.isnan(value))


def check_config(
    raw: Mapping[str, object],
    path: Path,
    follows: Mapping[str, Check],
    usual: Mapping[str, Collection[object]] | None = None,
    passed_over: Collection[str] = (),
    required: Collection[str] = (),
    advice: Mapping[str, str] | None = None,
) -> None:
    """Raise a `ValueError` that names what in a configuration cannot be followed, if there is anything.

    Args:
        raw: the configuration.
        path: of its file, for the message.
        follows: the keys that the loader follows, and what their values have to be.
        usual: keys with the only values that are implemented.
        passed_over: keys that change nothing here, beside `PASSED_OVER`.
        required: keys that must be there.
        advice: what to do about the value of a key that is refused.
    """
    usual, advice = usual or {}, advice or {}
    missing = [key for key in required if raw.get(key) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; save the adapter again")
    unknown = [key for key, values in usual.items() if key in raw and raw[key] not in values]
    known = {*follows, *usual, *passed_over, *PASSED_OVER}
    unknown += [key for key in raw if key not in known and is_set(raw[key])]
    if unknown:
        what = ", ".join(f"{key}={shown(raw[key])}" for key in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        hint = "; ".join(advice[key] for key in unknown if key in advice)
        hint = hint or f"If you know that it does not, take it out of {path.name}"
        raise ValueError(
            f"the adapter in {path.parent} has {what}{more}, which this loader does not know, and which may change "
            f"what the adapter computes. {hint}"
        )
    for key, check in follows.items():
        if key in raw and not check(raw[key]):
            allowed = ALLOWED.get(check, "for each of some patterns such a value as for all layers")
            raise ValueError(f"{path}: {key}={shown(raw[key])} must be {allowed}")


def check_expressions(path: Path, expressions: Iterable[str]) -> None:
    """Raise a `ValueError` unless the regular expressions in a configuration can be read, and matched in time."""
    try:
        check_patterns(expressions)
    except PatternError as error:
        raise ValueError(f"{path} holds what cannot be matched: {error}") from None


def shown(value: object) -> str:
    """A value as a message shows it: not all of a long one."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def hash_settings(raw: Mapping[str, object], passed_over: Collection[str] = PASSED_OVER) -> str:
    """A hash of what a configuration says of what an adapter computes: of the keys that are set and count."""
    counted = {key: value for key, value in raw.items() if key not in passed_over and is_set(value)}
    return sha256(canonical(counted)).hexdigest()


def canonical(value: object) -> bytes:
    """JSON of `value`, in the same bytes however its keys are ordered and its file is laid out."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
