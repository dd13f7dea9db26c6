"""A server that leads a trial is killed: no score that was acknowledged is lost, and the verdict is the one of the record."""

import json
from pathlib import Path

import numpy as np
import pytest

from labkit.serving import Registry
from labkit.serving.rollout import Rollouts
from labkit.serving.trial import CANDIDATE, Trial, TrialPlan
from labkit.serving.trial_log import log_of, of_last_trial, read_log
from tests.campaign.harness import duration, kill_after, moments, rounds
from tests.serving.cases import make_registry, write_adapter
from tests.serving.engines import AtOnce
from tests.serving.test_rollout import ALIAS, HELPER, ask

ANSWERS = 400


def work(root: Path, round_: int) -> None:
    """Answer users of a trial, and write down each score that was acknowledged."""
    rollouts = Rollouts(Registry(root / "registry", wait=60), worker=AtOnce())
    if ALIAS not in rollouts.records or rollouts.records[ALIAS].is_settled:
        rollouts.start(ALIAS, 2)
    chance = np.random.default_rng(round_)
    with (root / f"log{round_}").open("a", buffering=1) as log:
        for n in range(ANSWERS):
            given = ask(rollouts, f"{round_}-{n}", f"user-{round_}-{n}")
            score = float(chance.random() < (0.6 if given.arm == CANDIDATE else 0.85))
            rollouts.feedback(given.id, score)
            log.write(json.dumps([given.id, score, given.record is not None]) + "\n")


def make(root: Path) -> None:
    registry = make_registry(root / "registry")
    for n in range(2):
        registry.publish("support", write_adapter(root / str(n), n), "ann")
    registry.set_alias(ALIAS, 1)


@pytest.fixture(scope="module")
def seconds(tmp_path_factory) -> float:
    """How long the work takes, undisturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    make(root)
    return duration(work, root, 0)


@pytest.mark.filterwarnings("ignore:the last line")
def test_a_kill_of_the_server_loses_no_score_and_leaves_no_verdict_half_done(tmp_path: Path, seconds):
    make(tmp_path)
    number, killed, over = rounds(5, 100), 0, 0
    for round_, moment in enumerate(moments(number, seconds, seed=2)):
        killed += kill_after(moment, work, tmp_path, round_)
        rollouts = Rollouts(Registry(tmp_path / "registry"), worker=AtOnce())
        rollouts.held.close()
        lines = read_log(log_of(tmp_path / "registry", ALIAS))
        written = {line["answer"]: line["score"] for line in lines if line["kind"] == "score"}
        log = tmp_path / f"log{round_}"
        for text in log.read_text().splitlines() if log.exists() else ():
            if text.endswith("]"):
                id, score, is_in_trial = json.loads(text)
                assert not is_in_trial or written[id] == score
        if ALIAS in rollouts.records:
            over += check(rollouts, lines)
    print(f"{killed} of {number} servers were killed at work; {over} left a trial that was over")
    assert killed > number / 2
    assert 0 < over < number or number < 100, "all kills fell on one side of the verdict"


def check(rollouts: Rollouts, lines: list[dict]) -> bool:
    """Is the last trial what its lines make, and do the aliases say the same?"""
    record, last = rollouts.records[ALIAS], of_last_trial(lines)
    trial = Trial(last[0]["trial"], TrialPlan.read(last[0]))
    for line in last:
        trial.replay(line)
    assert (record.trial.verdict, record.trial.numbers()) == (trial.verdict, trial.numbers())
    kinds = [line["kind"] for line in last]
    over = record.trial.is_over
    assert kinds.count("decision") == kinds.count("settled") == over == record.is_settled
    assert rollouts.registry.aliases() == ({ALIAS: 1} if over else {ALIAS: 1, HELPER: 2})
    return over
