"""A trial with its record: every line is written before what it says takes effect, and makes the trial anew."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from labkit.serving import times, trial_log
from labkit.serving.routed import Routed
from labkit.serving.trial import CANDIDATE, CONTROL, OVERTAKEN, Trial, TrialPlan
from labkit.sweeps.records import append, mend_last_line

LASTING = (
    "start",
    "decision",
    "settled",
)  # on the disk at once; other lines survive a kill, not a loss of power


class TrialRecord:
    """A trial and the file of its alias; one thread at a time.

    Args:
        trial: the trial.
        path: of the file.
        clock: what says the time of a line.

    Attributes:
        is_decided: does the file say the verdict?
        is_settled: have the aliases been moved?
    """

    def __init__(self, trial: Trial, path: Path, clock: Callable[[], datetime]):
        self.trial, self.path, self.clock = trial, path, clock
        self.is_decided = self.is_settled = False

    @classmethod
    def begin(
        cls, plan: TrialPlan, path: Path, clock: Callable[[], datetime], author: str, note: str
    ) -> "TrialRecord":
        """A new trial, after those that the file has."""
        number = sum(line["kind"] == "start" for line in trial_log.read_log(path)) + 1
        made = cls(Trial(f"{plan.alias}#{number}", plan), path, clock)
        made.write("start", **asdict(plan), author=author, note=note)
        return made

    @classmethod
    def resume(cls, path: Path, clock: Callable[[], datetime]) -> "TrialRecord | None":
        """The last trial of a file, as it was; None if there is none. A line that a kill cut off is put aside.

        Raises:
            ValueError: a line is damaged.
        """
        mend_last_line(path)
        lines = trial_log.of_last_trial(trial_log.read_log(path))
        if not lines:
            return None
        made = cls(Trial(lines[0]["trial"], TrialPlan.read(lines[0])), path, clock)
        for line in lines:
            made.trial.replay(line)
            made.is_decided |= line["kind"] == "decision"
            made.is_settled |= line["kind"] == "settled"
        return made

    def answers(self) -> Iterator[Routed]:
        """The answers that the file has of the trial, with what is known of their scores."""
        lines = trial_log.of_last_trial(trial_log.read_log(self.path))
        scored = {line["answer"] for line in lines if line["kind"] == "score"}
        for line in lines:
            if line["kind"] == "answer" and not line["is_shadow"]:
                given = Routed(
                    line["answer"], line["version"], self, line["arm"], line["person"], line["why"]
                )
                given.is_scored = given.id in scored
                yield given

    def write(self, kind: str, **what: Any) -> None:
        """Add a line.

        Raises:
            labkit.files.CannotWrite: no permission, or no space; nothing has changed.
        """
        self.path.parent.mkdir(exist_ok=True)
        line = {"kind": kind, "trial": self.trial.name, "at": times.written(self.clock()), **what}
        append(self.path, line, sync=kind in LASTING)

    def decide(self) -> None:
        """Write the verdict down, if there is one, and it is not there."""
        if self.trial.is_over and not self.is_decided:
            self.is_decided = True
            verdict, reason = self.trial.verdict, self.trial.reason
            self.write("decision", verdict=verdict, reason=reason, numbers=self.trial.numbers())

    def overtake(self, reason: str) -> None:
        """End the trial because somebody has moved an alias."""
        if not self.trial.is_over:
            self.trial.end(OVERTAKEN, reason)
            self.decide()

    def see_answer(self, given: Routed, outcome: str, is_shadow: bool) -> None:
        """Take in an answer that has ended, or the shadow's."""
        version, arm = (given.shadow, CANDIDATE) if is_shadow else (given.label, given.arm)
        who = {"answer": given.id, "person": given.person, "arm": arm, "version": version}
        self.write("answer", **who, why=given.why, outcome=outcome, is_shadow=is_shadow)
        self.trial.see_answer(arm)
        self.decide()

    def see_score(self, given: Routed, score: float, by: str) -> bool:
        """Take in the score of an answer. Does it count?"""
        counts = self.trial.admits(given.person) and not self.trial.plan.is_paired
        who = {"answer": given.id, "person": given.person, "arm": given.arm}
        self.write("score", **who, score=score, by=by, counted=counts)
        given.is_scored = True
        if counts:
            self.trial.see_score(given.arm, given.person, score)
            self.decide()
        return counts

    def see_pair(self, given: Routed) -> None:
        """Take in the scores of both answers to a request, once they are there."""
        control, candidate = given.found.get(CONTROL), given.found.get(CANDIDATE)
        if control is None or candidate is None:
            return
        counts = self.trial.admits(given.person)
        who = {"answer": given.id, "person": given.person}
        self.write("pair", **who, control=control, candidate=candidate, counted=counts)
        if counts:
            self.trial.see_pair(given.person, control, candidate)
            self.decide()
