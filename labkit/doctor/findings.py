"""What a probe says.

A probe measures one number and compares it with a threshold that it can give a reason for. It has three answers:
`healthy`, `sick`, and `cannot say`, which names what is missing. It never guesses: a number that was not measured is
not a healthy one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

HEALTHY, SICK, UNKNOWN = "healthy", "sick", "cannot say"


@dataclass(frozen=True)
class Finding:
    """The answer of one probe.

    Attributes:
        outcome: `HEALTHY`, `SICK` or `UNKNOWN`.
        says: what was seen, or what is missing.
        number: the one that was compared with the threshold; None if nothing was measured.
        cure: what to do; "" unless it is sick.
        numbers: others that were measured on the way, by name.
    """

    outcome: str
    says: str
    number: float | None = None
    cure: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


class Missing(Exception):
    """Something that a probe needs was not given, or is not there; the message says what."""


def healthy(says: str, number: float, **numbers: float) -> Finding:
    return Finding(HEALTHY, says, number, numbers=numbers)


def sick(says: str, number: float, cure: str, **numbers: float) -> Finding:
    return Finding(SICK, says, number, cure, numbers)


def unknown(says: str, **numbers: float) -> Finding:
    return Finding(UNKNOWN, says, numbers=numbers)
