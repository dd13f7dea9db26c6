"""Names of adapters and aliases, and references to versions.

    support                  the adapter; as a reference, what its alias `production` points to
    support@v2               version 2, for ever
    support@production       whatever that alias points to now

A name is a folder, a part of a URL, and an argument of other servers. So the alphabet is small: a-z, 0-9 and "-",
beginning with a letter, ending with none of "-", 63 characters at most (a DNS label). Upper case is refused because some
file systems do not tell it apart, and letters beyond ASCII because some look like others: "ѕupport" with a Cyrillic
letter is another string, and nobody can see it.
"""

import re
import unicodedata
from typing import NamedTuple

from labkit.formats.peft_settings import shown

LONGEST = 63
NAME = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?")
VERSION = re.compile(r"v([1-9][0-9]{0,8})")
LIKE_A_VERSION = re.compile(r"v[0-9]+")
RESERVED = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]")  # which Windows opens as devices
ALLOWED = f"a-z, 0-9 and '-', a letter first, no '-' last, at most {LONGEST} characters"
USUAL_ALIAS = "production"


class UnknownAdapter(LookupError):
    """There is no such adapter, version or alias; the message says which there are."""


class Reference(NamedTuple):
    """Which version is meant: by its `number`, or by an `alias`; one of the two is None."""

    name: str
    number: int | None
    alias: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.alias or f'v{self.number}'}"


def check_name(name: object, what: str = "name") -> str:
    """`name`, if it may be the name of an adapter or an alias.

    Raises:
        ValueError: saying which character is not allowed, and a name that is.

    >>> check_name("Support.DE")
    Traceback (most recent call last):
    ValueError: name='Support.DE' has 'S' (LATIN CAPITAL LETTER S); allowed: a-z, 0-9 and '-', a letter first, no '-' \
last, at most 63 characters; for example 'support-de'
    """
    if isinstance(name, str) and is_name(name):
        return name
    reason = "is no text" if not isinstance(name, str) else wrong_with(name)
    near = suggestion(name) if isinstance(name, str) else ""
    hint = f"; for example {near!r}" if near else ""
    raise ValueError(f"{what}={shown(name)} {reason}; allowed: {ALLOWED}{hint}")


def is_name(text: str) -> bool:
    """Is it in the alphabet, short enough, and neither a version ("v2") nor a device of Windows?"""
    return (
        len(text) <= LONGEST
        and NAME.fullmatch(text) is not None
        and LIKE_A_VERSION.fullmatch(text) is None
        and RESERVED.fullmatch(text) is None
    )


def wrong_with(name: str) -> str:
    """Why a text is not a name, in words that follow it."""
    if not name:
        return "is empty"
    if len(name) > LONGEST:
        return f"has {len(name):,} characters"
    if LIKE_A_VERSION.fullmatch(name):
        return "would be read as the number of a version"
    if RESERVED.fullmatch(name):
        return "is a device on Windows"
    foreign = next((letter for letter in name if not re.match(r"[a-z0-9-]", letter)), None)
    if foreign is not None:
        code = unicodedata.name(foreign, f"U+{ord(foreign):04X}")
        return f"has {foreign!r} ({code})"
    return "does not begin with a letter" if not name[0].isalpha() else "ends with '-'"


def suggestion(name: str) -> str:
    """The nearest allowed name, if there is an obvious one; "" if not."""
    plain = unicodedata.normalize("NFKC", name[: 2 * LONGEST]).casefold()
    made = re.sub(r"[\s_./\\]+", "-", plain.strip())[:LONGEST].strip("-")
    return made if is_name(made) else ""


def read_reference(text: object) -> Reference:
    """The version that a text means: "support", "support@production" or "support@v2".

    Raises:
        ValueError: it cannot be a reference.
    """
    if not isinstance(text, str):
        raise ValueError(f"{shown(text)} is no text; give 'NAME', 'NAME@ALIAS' or 'NAME@v2'")
    name, at, rest = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name, None, USUAL_ALIAS)
    if number := VERSION.fullmatch(rest):
        return Reference(name, int(number[1]), None)
    return Reference(name, None, check_name(rest, "alias"))


def read_alias(text: object) -> Reference:
    """As `read_reference`, of an alias that is named: "support@production".

    Raises:
        ValueError: it names no alias.
    """
    reference = read_reference(text)
    if reference.alias is None or "@" not in str(text):
        raise ValueError(
            f"{shown(text)} is not an alias; give 'NAME@ALIAS', such as '{reference.name}@production'"
        )
    return reference


def read_version(text: object) -> Reference:
    """As `read_reference`, of a version by its number: "support@v2".

    Raises:
        ValueError: it names no version.
    """
    reference = read_reference(text)
    if reference.number is None:
        raise ValueError(f"{shown(text)} is not a version; give 'NAME@v2', with its number")
    return reference
