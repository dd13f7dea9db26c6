"""A new version gets a share of the traffic, and evidence decides: promote it, or roll it back.

    rollouts = Rollouts(registry)
    rollouts.start("support@production", candidate=2, share=0.2, author="ann")
    Service(engine, tokenizer, name, registry, rollouts=rollouts)

While a trial runs, `support@production-candidate` points to the candidate; whoever removes that alias, or moves the
production one, ends the trial at once. A verdict moves the aliases in one transaction, in the name of `rollout`, with
its reason: `promote` lets production point to the candidate; after every other verdict it stays where it is.

What counts, and when it is enough: `labkit.serving.trial`, `labkit.serving.sequential`. What is written down:
`labkit.serving.trial_log`.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from labkit.checks import check_whole
from labkit.files.writing import only_one
from labkit.serving import times, trial_aliases, trial_log
from labkit.serving.assignment import person_of
from labkit.serving.drift_watch import DriftWatch, Seen
from labkit.serving.naming import read_alias, read_reference
from labkit.serving.registry import Registry
from labkit.serving.requests import CANCELLED, ERROR, TIMEOUT, Completion
from labkit.serving.routed import AlreadyScored, Gathering, Routed, UnknownAnswer, outcome_of
from labkit.serving.trial import CANDIDATE, Trial, TrialPlan, read_score
from labkit.serving.trial_aliases import candidate_alias, is_candidate
from labkit.serving.trial_record import TrialRecord
from labkit.serving.versions import Version
from labkit.sweeps.records import append

Judge = Callable[[str, str], float | None]  # a prompt and an answer → its score, or None: it cannot say
log = logging.getLogger(__name__)


class Rollouts:
    """The trials of a registry; those that a killed server left are gone on with. Any thread may call it.

    Args:
        registry: of the versions.
        judge: scores answers where it can; a shadow trial needs one. It runs in the worker.
        remember: answers that may still be scored.
        drift: watches what is asked and answered.
        worker: runs what the engine's thread must not wait for, one after the other; by default a thread of its own.

    Attributes:
        records: by alias, the last trial of each.
        alarms: the last alarms of drift.

    Raises:
        labkit.files.InUse: another process leads a trial of this registry.
        ValueError: a record is damaged.
    """

    def __init__(
        self,
        registry: Registry,
        judge: Judge | None = None,
        remember: int = 10_000,
        drift: DriftWatch | None = None,
        worker: Executor | None = None,
    ):
        check_whole("remember", remember)
        self.registry, self.judge, self.remember = registry, judge, remember
        self.drift = drift or DriftWatch()
        self.worker = worker or ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self.records: dict[str, TrialRecord] = {}
        self.known: OrderedDict[str, Routed] = OrderedDict()
        self.alarms: deque[dict[str, Any]] = deque(maxlen=100)
        self.lock, self.settling, self.held = threading.RLock(), threading.Lock(), ExitStack()
        self.is_held = False
        for path in trial_log.logs(registry.root):
            self.resume(path.name.removesuffix(trial_log.SUFFIX))
        led = {alias for alias, record in self.records.items() if not record.is_settled}
        if left := trial_aliases.left_candidates(registry, led):
            self.hold()
            trial_aliases.remove_candidates(registry, left)

    def start(self, alias: str, candidate: int, author: str = "", note: str = "", **settings: Any) -> Trial:
        """Begin a trial of a version against the one that `alias` points to.

        Args:
            alias: "support@production".
            candidate: the number of the version.
            author, note: who begins it, and why.
            settings: of `TrialPlan`.

        Raises:
            labkit.serving.naming.UnknownAdapter: there is no such alias, or no such version.
            ValueError: a trial of this alias is running, a setting is out of its range, or a shadow without a judge.
            labkit.files.InUse: another process leads a trial, or locks the registry.
            labkit.files.CannotWrite: no permission, or no space.
        """
        alias = str(read_alias(alias))
        plan = TrialPlan(alias, self.registry.resolve(alias).number, candidate, **settings)
        if plan.is_paired and self.judge is None:
            raise ValueError("a shadow's answers get no feedback; give Rollouts a judge that scores them")
        with self.lock:
            last = self.records.get(alias)
            if last is not None and not last.is_settled:
                state = "has not moved its aliases yet" if last.trial.is_over else "is running"
                raise ValueError(f"{last.trial.name} {state}; a new trial of {alias} has to wait")
            self.hold()
            path = trial_log.log_of(self.registry.root, alias)
            with trial_aliases.candidate_pointed(self.registry, plan, note):
                self.records[alias] = TrialRecord.begin(plan, path, self.registry.clock, author, note)
        return self.records[alias].trial

    def resume(self, alias: str) -> None:
        """Go on with the last trial of an alias, and finish what a kill cut off."""
        record = TrialRecord.resume(trial_log.log_of(self.registry.root, alias), self.registry.clock)
        if record is None:
            return
        self.records[alias] = record
        for given in record.answers():
            self.keep(given)
        if not record.is_settled:
            self.hold()
            record.decide()
            self.settle_if_over(record)

    def hold(self) -> None:
        """Be the only process that leads trials of this registry, until `close`."""
        if not self.is_held:
            folder = self.registry.root / trial_log.FOLDER
            taken = f"another process, or another Rollouts that is not closed, leads the trials in {folder}"
            self.held.enter_context(only_one(folder / ".lock", taken))
            self.is_held = True

    def close(self) -> None:
        """Finish what the worker has, and let another process lead the trials."""
        self.worker.shutdown()
        self.held.close()
        self.is_held = False

    def route(self, id: str, model: str, user: str | None, source: Version, prompt: str | None) -> Routed:
        """Decide, once, which version answers a request.

        Args:
            id: of the answer.
            model: the name that was asked for.
            user: whose request it is; None for a user of its own.
            source: the version that `model` means now.
            prompt: for the judge; None for one that it cannot judge.
        """
        reference = read_reference(model)
        record = self.records.get(str(reference)) if reference.alias else None
        given = Routed(id, source.label, prompt=prompt if self.judge else None)
        if record is not None and record.trial.is_over:
            self.settle_if_over(record)
        elif record is not None:
            self.join(given, record, user or id, source)
        with self.lock:
            self.keep(given)
        return given

    def join(self, given: Routed, record: TrialRecord, user: str, source: Version) -> None:
        """Make an answer a part of a trial, unless people have moved its aliases."""
        plan = record.trial.plan
        arm, why = record.trial.route(user)
        moved = ""
        if source.number != plan.control:
            moved = f"{plan.alias} points to v{source.number}, and not to v{plan.control}"
        elif arm == CANDIDATE and not is_candidate(self.registry, plan):
            moved = f"{candidate_alias(plan.alias)} does not point to v{plan.candidate} any more"
        if moved:
            self.later(self.overtake, record, moved)
            return
        given.record, given.why, given.person = record, why, person_of(user, record.trial.name)
        if not plan.is_paired:
            given.arm, given.label = arm, plan.label(arm)
        elif arm == CANDIDATE and given.prompt is not None:
            given.shadow = plan.label(CANDIDATE)

    def overtake(self, record: TrialRecord, reason: str) -> None:
        """End a trial because people have moved its aliases."""
        with self.lock:
            record.overtake(reason)
        self.settle_if_over(record)

    def keep(self, given: Routed) -> None:
        """Remember an answer, and forget the oldest ones."""
        self.known[given.id] = given
        while len(self.known) > self.remember:
            self.known.popitem(last=False)

    def forget(self, given: Routed) -> None:
        """Take note that an answer is not given after all."""
        with self.lock:
            self.known.pop(given.id, None)

    def gathering(self, given: Routed, number: int, is_shadow: bool = False) -> Gathering:
        """A listener, for the engine's thread, for the parts of an answer, or of the shadow's."""

        def done(texts: list[str], ends: list[Completion]) -> None:
            self.later(self.ended, given, texts, ends, is_shadow)
            self.later(given.let_go)

        return Gathering(number, done)

    def later(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run something in the worker. What fails there goes to the log, and harms no answer."""

        def run() -> None:
            try:
                work(*arguments)
            except Exception:
                log.exception("a rollout could not take in what has happened")

        try:
            self.worker.submit(run)
        except RuntimeError:  # it is shut down
            log.exception("a rollout is closed, and takes nothing in")

    def ended(self, given: Routed, texts: list[str], ends: list[Completion], is_shadow: bool) -> None:
        """Take in that an answer, or the shadow's, has ended."""
        outcome, record = outcome_of(ends), given.record
        if outcome == CANCELLED and given.stream is not None:
            given.stream.cancel()
        if outcome not in (ERROR, TIMEOUT, CANCELLED):
            self.watch(given.shadow if is_shadow else given.label, ends[0])  # type: ignore[arg-type]
        if record is None or record.trial.is_over:
            return
        score = self.score_of(given, texts, outcome)
        with self.lock:
            record.see_answer(given, outcome, is_shadow)
            if record.trial.plan.is_paired:
                given.found[CANDIDATE if is_shadow else given.arm] = score
                record.see_pair(given)
            elif score is not None and not given.is_scored:
                record.see_score(given, score, "error" if outcome in (ERROR, TIMEOUT) else "judge")
        self.settle_if_over(record)

    def score_of(self, given: Routed, texts: list[str], outcome: str) -> float | None:
        """What is known of an answer without feedback."""
        if outcome in (ERROR, TIMEOUT):
            return 0.0
        if outcome == CANCELLED or self.judge is None or given.prompt is None:
            return None
        score = self.judge(given.prompt, texts[0])
        return None if score is None else read_score(score)

    def feedback(self, id: str, score: float) -> bool:
        """Take in what somebody says about an answer. Does it count in a trial?

        Raises:
            UnknownAnswer: there is no such answer, or it was given too long ago.
            AlreadyScored: it has a score.
            ValueError: no number from 0 to 1.
            labkit.files.CannotWrite: it could not be recorded; nothing has changed.
        """
        score = read_score(score)
        with self.lock:
            given = self.known.get(id)
            if given is None:
                raise UnknownAnswer(f"no answer {id[:100]!r} is known; the last {self.remember:,} are")
            if given.is_scored:
                raise AlreadyScored(f"answer {id} has a score already, and keeps it")
            if given.record is None:
                given.is_scored = True
                return False
            counts = given.record.see_score(given, score, "feedback")
        self.settle_if_over(given.record)
        return counts

    def settle_if_over(self, record: TrialRecord) -> None:
        """Have the aliases moved, if there is a verdict; where that fails, the next request tries again."""
        if record.trial.is_over and not record.is_settled:
            self.later(self.settle, record)

    def settle(self, record: TrialRecord) -> None:
        with self.settling:
            if not record.is_settled:
                points = trial_aliases.carry_out(self.registry, record.trial)
                with self.lock:
                    record.decide()
                    record.write("settled", aliases=points)
                    record.is_settled = True

    def watch(self, version: str, end: Completion) -> None:
        """Look for drift in what a version is asked, and what it answers."""
        first = end.tokens[0].id if end.tokens else -1
        for alarm in self.drift.see(version, Seen(end.prompt_tokens, len(end.tokens), first)):
            line = {"kind": "drift", "at": times.written(self.registry.clock())} | alarm.as_json()
            self.alarms.append(line)
            folder = self.registry.root / trial_log.FOLDER
            folder.mkdir(exist_ok=True)
            append(folder / trial_log.DRIFT, line)

    def as_json(self) -> dict[str, Any]:
        """How all trials stand, and the last alarms of drift."""
        with self.lock:
            trials = [record.trial.as_json() for record in self.records.values()]
            return {"object": "list", "data": trials, "drift": list(self.alarms)}
