"""Who is asked: a version gets a share of the users, and a user stays with a version.

The assignment follows from a hash, so nothing has to be remembered, every process agrees, and it can be computed again
when somebody asks why.
"""

import hashlib
import math
from collections.abc import Mapping

from labkit.checks import check_number


def assign(user: str, shares: Mapping[str, float], salt: str = "") -> str:
    """Which version a user gets: always the same one for the same shares.

    When the share of the first version grows at the cost of the last one, only users of the last one change.

    Args:
        user: whatever stays with a user.
        shares: of the traffic, by version, in order: {"support@v3": 0.2, "support@v2": 0.8}.
        salt: another one draws other users, such as the name of the trial.

    Raises:
        ValueError: shares that are negative, or do not add up to 1.
    """
    for version, share in shares.items():
        check_number(f"share of {version}", share, at_least=0)
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-9):
        raise ValueError(f"shares {dict(shares)} add up to {sum(shares.values()):g}; they must add up to 1")
    point, reached = place_of(user, salt), 0.0
    for version, share in shares.items():
        reached += share
        if point < reached:
            return version
    return [version for version, share in shares.items() if share > 0][-1]  # rounding left a gap before 1


def place_of(user: str, salt: str) -> float:
    """A number of at least 0 and below 1 for a user, as if drawn evenly."""
    return int.from_bytes(digest(user, salt)[:6], "big") / 2**48


def person_of(user: str, salt: str) -> str:
    """What stands for a user in a record: who knows the name can look it up, and nobody can read it off."""
    return digest(user, f"person {salt}").hex()[:16]


def digest(user: str, salt: str) -> bytes:
    return hashlib.sha256(f"{len(salt)}:{salt}{user}".encode(errors="surrogatepass")).digest()
