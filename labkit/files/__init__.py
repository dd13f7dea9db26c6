"""Files: how others' are read, and how ours are written."""

from labkit.files.reading import read_bytes, read_header, read_json, read_tensors, sha256
from labkit.files.writing import (
    CannotWrite,
    InUse,
    clear_leftovers,
    new_file,
    new_folder,
    only_one,
    write_json,
    write_text,
)

__all__ = [
    "CannotWrite",
    "InUse",
    "clear_leftovers",
    "new_file",
    "new_folder",
    "only_one",
    "read_bytes",
    "read_header",
    "read_json",
    "read_tensors",
    "sha256",
    "write_json",
    "write_text",
]
