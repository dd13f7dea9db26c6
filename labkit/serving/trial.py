"""One trial of a candidate against the control: who is asked, what counts, and when it is over.

    split     a share of the users gets the candidate's answers, the others the control's
    shadow    everybody gets the control's; for a share of the users the candidate answers too, and nobody sees it

Sticky users are no independent draws: one who is never content and asks a hundred times would decide alone. So only the
first scores of each user count, `per_user` of them. An answer that fails or takes too long has the score 0, whichever
version it is of: a fault of the machine hits both alike.

A trial is a function of what has happened: it holds no clock, no file and no chance, and feeding it the lines of its
record again makes it anew.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import exp
from typing import Any

from labkit.checks import check_choice, check_number, check_whole, is_number
from labkit.serving.assignment import assign, place_of
from labkit.serving.naming import read_alias
from labkit.serving.sequential import ROLL_BACK, Evidence, PairedEvidence

ARMS = CONTROL, CANDIDATE = "control", "candidate"
MODES = SPLIT, SHADOW = "split", "shadow"
NO_DECISION, OVERTAKEN = "no decision", "overtaken"
LARGEST = 700.0  # logarithm of what a float holds
BACKLOG = 50  # blocks' worth of scores of one version that wait for those of the other


@dataclass(frozen=True)
class TrialPlan:
    """What a trial compares, on whom, and when it ends.

    Args:
        alias: whose traffic it is: "support@production".
        control: the number of the version that the alias points to.
        candidate: that of the version that is to replace it.
        share: of the users, for the candidate.
        mode: "split" or "shadow".
        alpha: the probability of a rollback if the candidate is as good, and of a promotion if it is no better.
        least: scores of the candidate before a decision.
        most: answers of the candidate; then it ends without a decision, and the control stays.
        per_user: scores of one user that count.
        salt: another one draws other users; by default the name of the trial.

    Raises:
        ValueError: a value is out of its range.
    """

    alias: str
    control: int
    candidate: int
    share: float = 0.2
    mode: str = SPLIT
    alpha: float = 0.05
    least: int = 10
    most: int = 2000
    per_user: int = 1
    salt: str = ""

    def __post_init__(self):
        read_alias(self.alias)
        for name in ("control", "candidate", "least", "most", "per_user"):
            check_whole(name, getattr(self, name))
        check_choice("mode", self.mode, MODES)
        check_number("alpha", self.alpha, at_least=1e-12, below=1)
        if not is_number(self.share) or not 0 < self.share <= 1 or (self.share == 1 and not self.is_paired):
            allowed = "above 0 and at most 1" if self.is_paired else "above 0 and below 1"
            raise ValueError(f"share={self.share!r} must be {allowed}; 0.2 is a usual start")
        if self.control == self.candidate:
            raise ValueError(f"control and candidate are both v{self.control}; give another version")
        if self.least > self.most:
            raise ValueError(f"least={self.least} is more than most={self.most}: it could never decide")

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "TrialPlan":
        """The plan in a line of a record."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    @property
    def is_paired(self) -> bool:
        """Do both versions answer the same requests?"""
        return self.mode == SHADOW

    @property
    def per_block(self) -> int:
        """Answers of the control for each of the candidate, about as they come."""
        return max(1, round((1 - self.share) / self.share))

    def label(self, arm: str) -> str:
        """The version of an arm: "support@v2"."""
        return f"{read_alias(self.alias).name}@v{self.candidate if arm == CANDIDATE else self.control}"


class Trial:
    """How a trial stands.

    Args:
        name: "support@production#1".
        plan: of it.

    Attributes:
        answers, scores, totals: by arm, how many answers and counted scores, and the sum of those scores.
        verdict: "promote", "roll back", "no decision" or "overtaken"; "" while it runs.
        reason: of the verdict, with the numbers at that moment.
    """

    def __init__(self, name: str, plan: TrialPlan):
        self.name, self.plan = name, plan
        self.evidence: Evidence | PairedEvidence = (
            PairedEvidence() if plan.is_paired else Evidence(plan.per_block)
        )
        self.answers, self.scores, self.users = Counter[str](), Counter[str](), Counter[str]()
        self.totals = dict.fromkeys(ARMS, 0.0)
        size = {CONTROL: BACKLOG * plan.per_block, CANDIDATE: BACKLOG}
        self.waiting: dict[str, deque[float]] = {arm: deque(maxlen=size[arm]) for arm in ARMS}
        self.verdict = self.reason = ""

    @property
    def is_over(self) -> bool:
        return bool(self.verdict)

    def route(self, user: str) -> tuple[str, str]:
        """The arm of a user, and why."""
        share = self.plan.share
        arm = assign(user, {CANDIDATE: share, CONTROL: max(0.0, 1 - share)}, self.salt)
        place = place_of(user, self.salt)
        which = "below" if arm == CANDIDATE else "not below"
        return arm, f"{self.name}: the user's place {place:.4f} is {which} the share {share:g}"

    @property
    def salt(self) -> str:
        return self.plan.salt or self.name

    def see_answer(self, arm: str) -> None:
        """Count an answer that was given, or that the shadow wrote."""
        self.answers[arm] += 1
        if not self.is_over and self.answers[CANDIDATE] >= self.plan.most:
            self.end(NO_DECISION, f"the candidate has given {self.plan.most} answers")

    def admits(self, person: str) -> bool:
        """Does the next score of this person count?"""
        return not self.is_over and self.users[person] < self.plan.per_user

    def see_score(self, arm: str, person: str, score: float) -> None:
        """Take in a score that counts, of a split trial."""
        self.count(person, {arm: score})
        self.waiting[arm].append(score)
        control, candidate = (self.waiting[arm] for arm in ARMS)
        while candidate and len(control) >= self.plan.per_block:
            block = sum(control.popleft() for _ in range(self.plan.per_block))
            self.evidence = self.evidence.after(block, candidate.popleft())
            self.look()

    def see_pair(self, person: str, control: float, candidate: float) -> None:
        """Take in the scores of both answers to one request, of a shadow trial."""
        self.count(person, {CONTROL: control, CANDIDATE: candidate})
        self.evidence = self.evidence.after(control, candidate)
        self.look()

    def count(self, person: str, scores: Mapping[str, float]) -> None:
        self.users[person] += 1
        for arm, score in scores.items():
            self.scores[arm] += 1
            self.totals[arm] += score

    def look(self) -> None:
        """Decide, if the evidence suffices."""
        if self.is_over or self.evidence.blocks < self.plan.least:
            return
        if verdict := self.evidence.decision(self.plan.alpha):
            word = "worse" if verdict == ROLL_BACK else "better"
            found, enough = self.strength(word), 1 / self.plan.alpha
            self.end(verdict, f"the candidate is {word}: evidence of {found:.3g}, and {enough:g} is enough")

    def strength(self, word: str) -> float:
        """The evidence that the candidate is "worse", or "better"."""
        return exp(min(float(getattr(self.evidence, word)), LARGEST))

    def end(self, verdict: str, reason: str) -> None:
        """End the trial."""
        means = [
            f"{self.plan.label(arm)} mean {self.totals[arm] / self.scores[arm]:.3f} of {self.scores[arm]} scores"
            if self.scores[arm]
            else f"{self.plan.label(arm)} no scores"
            for arm in ARMS
        ]
        self.verdict, self.reason = verdict, f"{reason}; {', '.join(means)}"

    def replay(self, record: Mapping[str, Any]) -> None:
        """Take in a line of its record."""
        kind = record["kind"]
        if kind == "answer":
            self.see_answer(record["arm"])
        elif kind == "score" and record["counted"]:
            self.see_score(record["arm"], record["person"], record["score"])
        elif kind == "pair" and record["counted"]:
            self.see_pair(record["person"], record["control"], record["candidate"])
        elif kind == "decision":
            self.verdict, self.reason = record["verdict"], record["reason"]

    def numbers(self) -> dict[str, Any]:
        """How it stands, as JSON can hold it."""
        means = {arm: self.totals[arm] / self.scores[arm] if self.scores[arm] else None for arm in ARMS}
        evidence = {word: self.strength(word) for word in ("worse", "better")}
        return {
            "answers": {arm: self.answers[arm] for arm in ARMS},
            "scores": {arm: self.scores[arm] for arm in ARMS},
            "means": means,
            "blocks": self.evidence.blocks,
            "evidence": evidence,
        }

    def as_json(self) -> dict[str, Any]:
        """The plan, how it stands, and the verdict."""
        return (
            {"trial": self.name}
            | asdict(self.plan)
            | self.numbers()
            | {
                "verdict": self.verdict,
                "reason": self.reason,
            }
        )


def read_score(score: object) -> float:
    """`score`, if it is one.

    Raises:
        ValueError: it is not a number from 0 to 1.
    """
    if not is_number(score) or not 0 <= score <= 1:
        raise ValueError(f"score={score!r} must be a number from 0 (wrong) to 1 (right)")
    return float(score)
