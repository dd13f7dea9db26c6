"""Is the candidate worse than the control, or better? A test that may be looked at after every answer.

A test made for one look raises false alarms when it is repeated: at 5 % a look, most equal versions are accused in the
end. `Evidence` is a test martingale. While the candidate is no worse, it reaches 1/alpha at any time with probability
alpha at most (Ville's inequality), however often one looks.

    a, b     mean scores of candidate and control, estimated from the answers before
    m        their mean, weighted as the answers of a block are
    factor   p_a(candidate) p_b(control) / (p_m(candidate) p_m(control)), if a < b, else 1

The expectation of the factor is at most 1 whenever the candidate's rate is no lower. A score s between 0 and 1 counts as
p(1)^s p(0)^(1-s), which is at most s p(1) + (1-s) p(0), so the bound holds for any such scores.

Source: Turner, Ly and Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for optional
stopping", 2024 (arXiv 2106.02693), section 3.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from labkit.checks import check_number, check_whole

PROMOTE, ROLL_BACK = "promote", "roll back"
PRIOR = 0.5  # right and wrong answers that each rate begins with
Numbers = float | np.ndarray


@dataclass(frozen=True)
class Evidence:
    """What the scores of two versions say about which one is better.

    Scores are taken in blocks of `per_block` of the control and one of the candidate. The numbers may be arrays: many
    trials side by side.

    Attributes:
        per_block: answers of the control for each of the candidate.
        blocks: how many were taken.
        control, candidate: sums of scores.
        worse, better: the logarithm of the evidence that the candidate is worse, or better.
    """

    per_block: int = 1
    blocks: int = 0
    control: Numbers = 0.0
    candidate: Numbers = 0.0
    worse: Numbers = 0.0
    better: Numbers = 0.0

    def __post_init__(self):
        check_whole("per_block", self.per_block)

    def after(self, control: Numbers, candidate: Numbers) -> "Evidence":
        """The evidence after one more block.

        Args:
            control: the sum of the scores of `per_block` answers of the control.
            candidate: the score of one answer of the candidate, from 0 to 1.

        Raises:
            ValueError: numbers that cannot be those of a block.
        """
        k = self.per_block
        check_scores("control", control, k)
        check_scores("candidate", candidate, 1)
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
        return decide(self, alpha)


@dataclass(frozen=True)
class PairedEvidence:
    """The same question, where both versions answer every request: a sequential sign test.

    Pairs with equal scores say nothing. Of the others, let d = (1 + candidate - control) / 2, and q its mean in the pairs
    before. If the candidate is no worse, the mean of d is at least 1/2, and (2q)^d (2(1-q))^(1-d) has an expectation of
    at most 1 for any q < 1/2: a bet against 1/2 (Waudby-Smith and Ramdas 2024, arXiv 2010.09686, section 4).

    Attributes:
        blocks: pairs, with those of equal scores.
        unequal: those whose scores differ.
        total: the sum of d.
        worse, better: as those of `Evidence`.
    """

    blocks: int = 0
    unequal: Numbers = 0.0
    total: Numbers = 0.0
    worse: Numbers = 0.0
    better: Numbers = 0.0

    def after(self, control: Numbers, candidate: Numbers) -> "PairedEvidence":
        """The evidence after the scores of both answers to one more request.

        Raises:
            ValueError: a score is not between 0 and 1.
        """
        check_scores("control", control, 1)
        check_scores("candidate", candidate, 1)
        differs = np.where(np.equal(control, candidate), 0.0, 1.0)
        d = (1 + np.subtract(candidate, control)) / 2
        q = (self.total + PRIOR) / (self.unequal + 2 * PRIOR)
        step = differs * (d * np.log(2 * q) + (1 - d) * np.log(2 * (1 - q)))
        return replace(
            self,
            blocks=self.blocks + 1,
            unequal=self.unequal + differs,
            total=self.total + differs * d,
            worse=self.worse + np.where(q < 0.5, step, 0.0),
            better=self.better + np.where(q > 0.5, step, 0.0),
        )

    def decision(self, alpha: float = 0.05) -> str | None:
        """As that of `Evidence`."""
        return decide(self, alpha)


def decide(evidence: Any, alpha: float) -> str | None:
    """What the evidence of one trial says so far.

    Raises:
        ValueError: `alpha` is not between 0 and 1.
    """
    check_number("alpha", alpha, at_least=1e-12, below=1)
    if evidence.worse >= -math.log(alpha):
        return ROLL_BACK
    return PROMOTE if evidence.better >= -math.log(alpha) else None


def check_scores(what: str, value: Numbers, most: int) -> None:
    """Raise a `ValueError` unless all numbers are between 0 and `most`."""
    given = np.asarray(value, dtype=float)
    if not np.all((given >= 0) & (given <= most)):
        raise ValueError(f"{what}={value} must be from 0 to {most}: scores between 0 and 1 in a block")
