"""Characters in a record that nobody wrote on purpose: NUL, half a surrogate pair, control characters, and what is left
of text that was decoded as something else."""

import re
from collections.abc import Iterator, Mapping

from labkit.data.own.findings import Findings
from labkit.data.records import shortened

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
# UTF-8 that was read as Windows-1252: "Ã¤" for "ä", "â€™" for "’"; and what could not be decoded at all
DAMAGED = re.compile("\ufffd|Ã[\x80-\xbf\u0152-\u2122]|â€[\x80-\xbf\u0152-\u2122]|Â[\xa0-\xbf]")


def look_at_texts(record: Mapping, line: int, findings: Findings) -> None:
    """Note the first of each kind of suspicious character in a record."""
    texts = list(texts_in(record))
    for kind, pattern in (
        ("NUL byte", re.compile("\0")),
        ("lone surrogate", LONE_SURROGATE),
        ("control character", CONTROL),
        ("damaged text", DAMAGED),
    ):
        found = next((match for text in texts if (match := pattern.search(text))), None)
        if found:
            around = found.string[max(0, found.start() - 20) : found.end() + 20]
            names = " ".join(f"U+{ord(letter):04X}" for letter in found[0])
            findings.add(kind, line, f"has {names} in {shortened(around)}")


def texts_in(value: object) -> Iterator[str]:
    """Every text inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts_in(key)
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
