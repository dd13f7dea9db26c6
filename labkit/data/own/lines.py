"""The lines of a text file that somebody else wrote, one at a time and never more than 16 MiB of one.

A file that is not text at all is recognised by its first bytes. A line that is not UTF-8 is given with its bad bytes
as lone surrogates (PEP 383), so that whoever reads it can name the line and go on with the next.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from labkit.data.own.findings import Findings
from labkit.data.records import shortened
from labkit.files.reading import open_regular
from labkit.paths import data_folder

MAX_FILE = (
    256 * 2**20
)  # bytes; the records of a larger one, and what is compared of them, fill a laptop's memory
MAX_LINE = 16 * 2**20  # bytes; a dozen novels
BOM = b"\xef\xbb\xbf"

NOT_TEXT = {  # how a file begins -> what it is, and what to do
    b"\x1f\x8b": ("a gzip archive", "unpack it with gunzip"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet (.xlsx)", "unpack it, or export the sheet as CSV UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an old spreadsheet or document of Office", "export it as CSV UTF-8"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "unpack it with unzstd"),
    b"BZh": ("a bzip2 archive", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("an xz archive", "unpack it with unxz"),
    b"PAR1": ("a parquet file", "pandas.read_parquet(path).to_json(new_path, orient='records', lines=True)"),
    b"ARROW1": ("an Arrow file", "write its table as JSON lines"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"%PDF": ("a PDF", "extract its text first"),
}
OTHER_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class Line(NamedTuple):
    """A line: its number from 1, its text (None if it is longer than `MAX_LINE`), how it ends, its size in bytes."""

    number: int
    text: str | None
    ending: str
    size: int

    @property
    def is_blank(self) -> bool:
        return self.text is not None and not self.text.strip()


class Row(NamedTuple):
    """What a record will be made of, as the file has it, and the line where it begins."""

    line: int
    values: dict


def numbered_lines(path: str | Path, at_most: int | None = None) -> Iterator[Line]:
    """The lines of a file, without the BOM; LF ends a line, with a CR before it or without.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder, a pipe, or more than `at_most` bytes.
    """
    check_is_file(path)
    with open_regular(path, at_most) as file:
        number = 0
        while raw := file.readline(MAX_LINE):
            number += 1
            size, is_long = len(raw), False
            while not raw.endswith(b"\n") and (more := file.readline(MAX_LINE)):
                is_long, raw, size = True, more, size + len(more)
            if is_long:
                yield Line(number, None, "\n", size)
                continue
            if number == 1:
                raw = raw.removeprefix(BOM)
            text = raw.decode("utf-8", "surrogateescape")
            bare = text.removesuffix("\n").removesuffix("\r")
            yield Line(number, bare, text[len(bare) :], size)


def check_is_file(path: str | Path) -> None:
    """Raise unless there is something to read at `path`; says what is there, or what to do."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise ValueError(f"path={shortened(path)} must be the path of a file, such as 'train.jsonl'")
    place = Path(path)
    if place.is_dir():
        names = sorted(entry.name for entry in place.iterdir())
        raise ValueError(f"{path} is a folder; name the file in it, one of {shortened(names)}")
    if not place.exists():
        ours = place.is_relative_to(data_folder())
        raise FileNotFoundError(
            f"{path} is missing; "
            + (
                "run from a checkout of the course, or set LABKIT_DATA to its data/"
                if ours
                else "check the path"
            )
        )


class Start(NamedTuple):
    """What the first bytes of a file say: is there a BOM, does a JSON list begin, and if it is not UTF-8 text as a
    whole, the kind of that finding, what was found, and what to do."""

    has_bom: bool
    is_list: bool
    kind: str = ""
    found: str = ""
    advice: str = ""


def look_at_start(path: str | Path) -> Start:
    """What the first bytes of a file say about it.

    Raises:
        as `numbered_lines`.
    """
    check_is_file(path)
    with open_regular(path, MAX_FILE) as file:
        start = file.read(4096)
    has_bom = start.startswith(BOM)
    is_list = start.removeprefix(BOM).lstrip().startswith(b"[")
    is_binary = re.search(rb"[\x00-\x08\x0e-\x1f]", start)  # a column may be called PAR1 too
    for magic, (what, advice) in NOT_TEXT.items():
        if is_binary and start.startswith(magic):
            return Start(has_bom, is_list, "not text", f"is {what}", advice)
    encoding = next(
        (name for bom, name in OTHER_BOMS.items() if start.startswith(bom)), utf_16_without_bom(start)
    )
    if encoding:
        advice = f"save it as UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW"
        return Start(has_bom, is_list, "not UTF-8", f"is text in {encoding}", advice)
    return Start(has_bom, is_list)


def utf_16_without_bom(start: bytes) -> str:
    """The name of the encoding, if every other byte is NUL, as of Latin letters in UTF-16."""
    even, odd = start[0::2], start[1::2]
    if len(start) >= 4 and even.count(0) * 2 > len(even) and not odd.count(0):
        return "UTF-16BE"
    if len(start) >= 4 and odd.count(0) * 2 > len(odd) and not even.count(0):
        return "UTF-16LE"
    return ""


def can_be_read(line: Line, findings: Findings) -> bool:
    """Is the line short enough, in UTF-8 and without NUL bytes?"""
    if line.text is None:
        findings.add("line too long", line.number, f"has {line.size:,} bytes")
        return False
    bad = re.search("[\udc80-\udcff]", line.text)
    if bad:
        byte = ord(bad[0]) - 0xDC00
        findings.add(
            "not UTF-8",
            line.number,
            f"has the byte 0x{byte:02x} in column {bad.start() + 1}, which is no UTF-8, after "
            f"{line.text[max(0, bad.start() - 20) : bad.start()]!r}",
            advice=f"if {legacy_letter(byte)!r} is meant, the file is in Windows-1252 or Latin-1; save it as UTF-8: "
            "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
        )
        return False
    if "\0" in line.text:
        findings.add("NUL byte", line.number, f"has a NUL byte in column {line.text.index(chr(0)) + 1}")
        return False
    return True


def legacy_letter(byte: int) -> str:
    """What a byte means in Windows-1252, of which Latin-1 is a part."""
    return bytes([byte]).decode("cp1252", "replace")
