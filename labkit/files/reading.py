"""The one way in which labkit reads files that others wrote: nothing about them is believed.

A file must be a regular file of a bounded size (to read a pipe or an endless device would never end), JSON without
duplicate keys, and safetensors, which unlike pickle cannot run code.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_JSON = 16 * 2**20  # bytes; the largest configuration or header that is read
MAX_INSIDE = 10**6  # lists and objects in it, which take much more memory than they have letters


def read_bytes(path: str | Path, at_most: int = MAX_JSON) -> bytes:
    """The contents of a regular file of at most `at_most` bytes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a pipe, a device, a folder, or a file that is too large.
    """
    with open_regular(path, at_most) as file:
        return file.read(at_most + 1)


@contextmanager
def open_regular(path: str | Path, at_most: int | None = None) -> Iterator[BinaryIO]:
    """A regular file of at most `at_most` bytes, open for reading.

    Raises:
        as `read_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        check_regular(path, os.fstat(descriptor), at_most)
        yield file


def check_regular(path: str | Path, info: os.stat_result, at_most: int | None = None) -> None:
    """Raise a `ValueError` unless it is a regular file, of at most `at_most` bytes."""
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if at_most is not None and info.st_size > at_most:
        raise ValueError(f"{path} has {info.st_size:,} bytes; at most {at_most:,} are read")


def read_json(path: str | Path, at_most: int = MAX_JSON) -> object:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: see `read_bytes`; or not JSON, with a key twice, or nested too deeply.
    """
    return parse_json(path, read_bytes(path, at_most))


def read_json_lines(path: str | Path, at_most: int = MAX_JSON, unfinished: bool = True) -> list[Any]:
    """The values in a file with one line of JSON each; empty lines count for nothing.

    Args:
        path, at_most: as for `read_json`.
        unfinished: read a last line, too, that does not end; False leaves out what somebody is still writing.

    Raises:
        as `read_json`.
    """
    # not splitlines: a text in JSON may hold other ends of a line
    lines = read_bytes(path, at_most).split(b"\n")
    return [parse_json(path, line) for line in (lines if unfinished else lines[:-1]) if line]


def parse_json(path: str | Path, raw: bytes) -> object:
    """The value of JSON in `raw`; `path` is for the message."""
    if raw.count(b"[") + raw.count(b"{") > MAX_INSIDE:
        raise ValueError(f"{path} holds more than {MAX_INSIDE:,} lists and objects, the most that are read")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is not valid JSON ({reason})") from None


class DuplicateKey(ValueError):
    """A JSON object has `key` twice."""

    def __init__(self, key: str):
        super().__init__(f"{key!r} stands there twice")
        self.key = key


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict, for `object_pairs_hook`.

    Raises:
        DuplicateKey: it has a key twice; Python would keep the second value and lose the first.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise DuplicateKey(twice)
    return made


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a regular file, cut off, damaged, a header too large or with a name twice.
    """
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from None


def read_header(path: str | Path) -> dict:
    """The header of a safetensors file: name → dtype, shape, offsets; and `__metadata__`, if there is any.

    Raises:
        as `read_tensors`.
    """
    with open_regular(path) as file:
        info = os.fstat(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_JSON, info.st_size - 8):
            raise ValueError(f"{path} is cut off, or not a safetensors file (a header of {length:,} bytes)")
        header = parse_json(path, file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file (its header is no object)")
    return header


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
