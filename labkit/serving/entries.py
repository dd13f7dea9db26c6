"""What a publisher says about a version: checked, and as the text that the database keeps."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from labkit.checks import is_number
from labkit.formats.peft_settings import shown

LONGEST_TEXT = 10_000  # letters of an owner, a note
LONGEST_JSON = 2**20  # letters of data, config
WORD = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")  # a data set, a metric: "exact_match"


def text(name: str, value: object, required: bool = False) -> str:
    """A text that people write: an owner, a note.

    Raises:
        ValueError: no text, too long, with characters that cannot be shown, or empty where it must not be.
    """
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise ValueError(f"{name}={shown(value)} must be text of at most {LONGEST_TEXT:,} letters")
    if not all(letter.isprintable() or letter in "\n\t" for letter in value):
        raise ValueError(f"{name}={shown(value)} holds characters that cannot be shown; leave them out")
    if required and not value.strip():
        raise ValueError(f"{name} is empty; say who answers for this version, such as a name or a team")
    return value.strip()


def json_text(name: str, value: object) -> str:
    """A value as JSON.

    Raises:
        ValueError: JSON cannot hold it, or it is too long.
    """
    try:
        made = json.dumps(value, ensure_ascii=False, allow_nan=False)
        made.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} cannot be recorded as JSON ({error}); give text, finite numbers, lists and dictionaries of them"
        ) from None
    if len(made) > LONGEST_JSON:
        raise ValueError(
            f"{name} has {len(made):,} letters as JSON, more than {LONGEST_JSON:,}; give a hash of it"
        )
    return made


def read_results(results: Mapping[str, Mapping[str, float]] | None) -> list[tuple[str, str, float]]:
    """Results of evaluations as rows (data set, metric, value).

    Raises:
        ValueError: not data set → metric → finite number.

    >>> read_results({"tickets": {"exact_match": 0.81}})
    [('tickets', 'exact_match', 0.81)]
    """
    rows: list[tuple[str, str, float]] = []
    for dataset, measured in as_mapping(results or {}).items():
        for metric, value in as_mapping(measured).items():
            for what, word in (("data set", dataset), ("metric", metric)):
                if not isinstance(word, str) or not WORD.fullmatch(word):
                    raise ValueError(
                        f"results: the {what} {shown(word)} must be of A-Z, a-z, 0-9, '_', '.' and '-', at most 63, such "
                        "as 'tickets' and 'exact_match'"
                    )
            if not is_number(value) or not math.isfinite(value):
                raise ValueError(f"results: {dataset} {metric}={shown(value)} must be a finite number")
            rows.append((dataset, metric, float(value)))
    return rows


def as_mapping(value: Any) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"results={shown(value)} must be {{data set: {{metric: number}}}}")
    return value
