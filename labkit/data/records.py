"""What a data set is to labkit: a list of dicts, one per record."""

import os
from collections.abc import Iterable, Mapping
from typing import Any


def records_of(records: Any, name: str = "data") -> list[Mapping]:
    """The records as a list, if they are records.

    Args:
        records: a list, a generator, a data set: whatever gives dicts one after the other.
        name: of the argument, for the message.

    Raises:
        ValueError: a path, a single record, a table, or something in it is no record; says what to do.
    """
    if isinstance(records, (str, bytes, os.PathLike)):
        raise ValueError(
            f"{name}={shortened(records)} is a text, and must be a list of records; of a file with a JSON object per "
            "line, read them with labkit.data.read_jsonl(path), or read_records(path), which checks them"
        )
    if isinstance(records, Mapping):
        raise ValueError(
            f"{name} is a {type(records).__name__} with the keys {shortened(list(records))}, and must be a list of "
            "records; put a single record into a list, and of several splits choose one"
        )
    if not isinstance(records, Iterable):
        raise ValueError(f"{name}={shortened(records)} must be a list of records")
    found = list(records)
    for i, record in enumerate(found):
        if not isinstance(record, Mapping):
            also = (
                f". {name}.to_dict('records') makes records of a table" if hasattr(records, "to_dict") else ""
            )
            raise ValueError(f"record {i} of {name}: {not_a_record(record)}{also}")
    return found


def not_a_record(record: object) -> str:
    """Says that something is no record, and what one is."""
    return (
        f"{shortened(record)} is a {type(record).__name__}, and must be a dict: {{'prompt': …, 'completion': …}} or "
        "{'messages': […]}"
    )


def shortened(value: object) -> str:
    """`value` as Python writes it, if need be without its middle."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:60]}…{text[-60:]}"
