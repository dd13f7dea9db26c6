"""A new version gets a share of the traffic, and evidence decides: promote it, or roll it back. No clock, no chance.

Who is asked (`assign`) follows from a hash of the user, so that a user stays with a version, and keeps it when the share
grows. What is found is looked at after every answer, and a test that is made for one look raises false alarms then: at
5 % a look, most equal versions are accused in the end. `Evidence` is a test martingale. While the candidate is no
worse, what it multiplies up reaches 1/alpha at any time with probability alpha at most (Ville's inequality), however
often one looks.

    a, b     success rates of candidate and control, estimated from the answers before
    m        their mean, weighted as the answers of a block are
    factor   p_a(candidate) p_b(control) / (p_m(candidate) p_m(control)), if a < b, else 1

Its expectation is 1 at most under every pair of rates of which the candidate's is no lower: the factor falls in the first
and rises in the second, and at equal rates it is 1 at most.

Source: Turner, Ly and Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for optional
stopping", 2024 (arXiv 2106.02693), section 3.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from labkit.checks import check_number, check_whole

PROMOTE, ROLL_BACK = "promote", "roll back"
PRIOR = 0.5  # successes and failures that each rate begins with


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
    digest = hashlib.sha256(f"{len(salt)}:{salt}{user}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@dataclass(frozen=True)
class Evidence:
    """What answers of two versions say about which one is better.

    Answers are taken in blocks of `per_block` of the control and one of the candidate. The numbers may be arrays: many
    trials side by side.

    Attributes:
        per_block: answers of the control for each of the candidate.
        blocks: how many were taken.
        control, candidate: successes.
        worse, better: the logarithm of the evidence that the candidate is worse, or better.
    """

    per_block: int = 1
    blocks: int = 0
    control: float | np.ndarray = 0.0
    candidate: float | np.ndarray = 0.0
    worse: float | np.ndarray = 0.0
    better: float | np.ndarray = 0.0

    def __post_init__(self):
        check_whole("per_block", self.per_block)

    def after(self, control: float | np.ndarray, candidate: float | np.ndarray) -> "Evidence":
        """The evidence after one more block.

        Args:
            control: successes among `per_block` answers of the control.
            candidate: 1 if the candidate's answer was a success, else 0.

        Raises:
            ValueError: numbers that cannot be those of a block.
        """
        k = self.per_block
        for what, value, most in (("control", control, k), ("candidate", candidate, 1)):
            if not np.all(
                (np.asarray(value) == np.round(value))
                & (np.asarray(value) >= 0)
                & (np.asarray(value) <= most)
            ):
                raise ValueError(
                    f"{what}={value} must be a whole number from 0 to {most}: successes in a block"
                )
        a = (self.candidate + PRIOR) / (self.blocks + 2 * PRIOR)
        b = (self.control + PRIOR) / (k * self.blocks + 2 * PRIOR)
        m = (a + k * b) / (1 + k)
        step = candidate * np.log(a / m) + (1 - candidate) * np.log((1 - a) / (1 - m))
        step = step + control * np.log(b / m) + (k - control) * np.log((1 - b) / (1 - m))
        return replace(
            self,
            blocks=self.blocks + 1,
            control=self.control + control,
            candidate=self.candidate + candidate,
            worse=self.worse + np.where(a < b, step, 0.0),
            better=self.better + np.where(a > b, step, 0.0),
        )

    def decision(self, alpha: float = 0.05) -> str | None:
        """ "promote", "roll back", or None: not yet. Each is wrong of equal versions with probability `alpha` at most.

        Raises:
            ValueError: `alpha` is not between 0 and 1.
        """
        check_number("alpha", alpha, at_least=1e-12, below=1)
        if self.worse >= -math.log(alpha):
            return ROLL_BACK
        return PROMOTE if self.better >= -math.log(alpha) else None
