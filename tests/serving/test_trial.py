"""A trial without a registry: simulated users, and what their scores lead to."""

import json

import numpy as np
import pytest

from labkit.serving.trial import CANDIDATE, CONTROL, NO_DECISION, SHADOW, Trial, TrialPlan, read_score

ALIAS = "support@production"


def plan(**others) -> TrialPlan:
    return TrialPlan(**{"alias": ALIAS, "control": 1, "candidate": 2} | others)


def played(
    seed: int, control: float, candidate: float, users: int = 100_000, answers: int = 10_000, **others
):
    """A trial of two versions with those rates, fed by random users until it is over; and the answers that it took."""
    chance, trial = np.random.default_rng(seed), Trial(f"{ALIAS}#{seed}", plan(**others))
    for n in range(answers):
        user = f"user-{chance.integers(users)}"
        arm, _ = trial.route(user)
        trial.see_answer(arm)
        if trial.admits(user):
            trial.see_score(arm, user, float(chance.random() < (candidate if arm == CANDIDATE else control)))
        if trial.is_over:
            return trial, n + 1
    return trial, answers


def test_a_poisoned_version_is_rolled_back_within_a_few_hundred_answers_of_both():
    trials = [played(seed, 0.85, 0.2) for seed in range(20)]
    assert {trial.verdict for trial, _ in trials} == {"roll back"}
    assert np.median([answers for _, answers in trials]) < 150


def test_a_better_version_is_promoted():
    trials = [played(seed, 0.6, 0.9)[0] for seed in range(10)]
    assert {trial.verdict for trial in trials} == {"promote"}


def test_equal_versions_end_without_a_decision_and_say_so():
    trial, answers = played(0, 0.8, 0.8, most=100)
    assert (trial.verdict, trial.answers[CANDIDATE]) == (NO_DECISION, 100) and 300 < answers < 800
    assert "the candidate has given 100 answers" in trial.reason
    assert "support@v1 mean 0." in trial.reason and "support@v2 mean 0." in trial.reason


def test_nothing_is_decided_before_the_least_number_of_scores():
    early, _ = played(0, 1.0, 0.0, least=1)
    late, _ = played(0, 1.0, 0.0, least=40)
    assert early.scores[CANDIDATE] < 15 and late.scores[CANDIDATE] >= 40
    assert early.verdict == late.verdict == "roll back"


def test_a_reason_has_the_numbers_of_that_moment():
    trial, _ = played(3, 0.85, 0.2)
    numbers = trial.numbers()
    assert trial.reason.startswith("the candidate is worse: evidence of ") and "20 is enough" in trial.reason
    assert (
        f"support@v2 mean {numbers['means'][CANDIDATE]:.3f} of {numbers['scores'][CANDIDATE]} scores"
        in trial.reason
    )
    assert numbers["evidence"]["worse"] >= 20 and json.loads(json.dumps(trial.as_json())) == trial.as_json()


def heavy(seed: int, per_user: int) -> bool:
    """Is there a verdict on equal versions, where ten users ask most questions, each always or never content?"""
    chance = np.random.default_rng(seed)
    trial = Trial(f"{ALIAS}#{seed}", plan(per_user=per_user, share=0.5))
    content = chance.random(10) < 0.7
    for n in range(600):
        often = chance.random() < 0.8
        user = int(chance.integers(10)) if often else 10 + n
        arm, _ = trial.route(f"user-{user}")
        if trial.admits(f"user-{user}"):
            trial.see_score(arm, f"user-{user}", float(content[user] if often else chance.random() < 0.7))
    return trial.is_over


def test_a_few_users_who_ask_a_lot_decide_alone_unless_one_score_a_user_counts():
    once, always = (sum(heavy(seed, per_user) for seed in range(20)) for per_user in (1, 600))
    assert once <= 2 and always >= 10


def test_a_user_stays_with_an_arm_and_the_arms_have_their_shares():
    trial = Trial("t", plan(share=0.2))
    arms = [trial.route(f"user-{n}")[0] for n in range(4000)]
    assert arms == [trial.route(f"user-{n}")[0] for n in range(4000)]
    assert abs(arms.count(CANDIDATE) / 4000 - 0.2) < 0.02
    arm, why = trial.route("user-1")
    assert ("is below the share 0.2" in why) == (arm == CANDIDATE)


def test_scores_of_one_version_that_wait_for_the_other_are_bounded():
    trial = Trial("t", plan(share=0.5, most=10_000))
    for n in range(5000):
        trial.see_score(CONTROL, f"user-{n}", 1.0)
    assert len(trial.waiting[CONTROL]) == 50 and trial.evidence.blocks == 0


def test_a_shadow_trial_goes_by_pairs():
    trial = Trial("t", plan(mode=SHADOW, share=1.0))
    n = 0
    while not trial.is_over:
        trial.see_pair(f"user-{n}", 1.0, float(n % 3 == 0))
        n += 1
    assert (trial.verdict, trial.scores) == ("roll back", {CONTROL: n, CANDIDATE: n}) and n < 30


@pytest.mark.parametrize(
    "others, message",
    [
        ({"share": 0}, "share=0 must be above 0 and below 1"),
        ({"share": 1.0}, "share=1.0 must be above 0 and below 1"),
        ({"share": True}, "share=True must be"),
        ({"share": 1.1, "mode": SHADOW}, "above 0 and at most 1"),
        ({"mode": "splt"}, "did you mean 'split'"),
        ({"candidate": 1}, "control and candidate are both v1"),
        ({"least": 50, "most": 40}, "it could never decide"),
        ({"alpha": 0}, "alpha=0 must be"),
        ({"per_user": 0}, "per_user=0 must be"),
        ({"alias": "support"}, "is not an alias"),
        ({"alias": "Support@production"}, "LATIN CAPITAL LETTER S"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(others, message):
    with pytest.raises(ValueError, match=message):
        plan(**others)


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan"), True, "1", None])
def test_what_is_no_score_is_refused(score):
    with pytest.raises(ValueError, match="must be a number from 0"):
        read_score(score)
