"""Who is asked, and when evidence is enough: false alarms and detections counted over simulated streams."""

import math

import numpy as np
import pytest

from labkit.serving.rollout import PROMOTE, ROLL_BACK, Evidence, assign

USERS = [f"user-{n}" for n in range(4000)]


def passed(control: float, candidate: float, blocks: int, streams: int, per_block: int = 1, seed: int = 0):
    """(share of streams that are rolled back, that are promoted, blocks until the rollback), looking after each block."""
    chance = np.random.default_rng(seed)
    evidence, limit = Evidence(per_block), math.log(20)
    first = np.full(streams, np.inf)
    promoted = np.zeros(streams, dtype=bool)
    for n in range(1, blocks + 1):
        evidence = evidence.after(
            chance.binomial(per_block, control, streams), chance.binomial(1, candidate, streams)
        )
        first = np.where((evidence.worse >= limit) & np.isinf(first), n, first)
        promoted |= evidence.better >= limit
    return np.isfinite(first).mean(), promoted.mean(), first


@pytest.mark.parametrize("per_block", [1, 4])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.81, 0.99])
def test_equal_versions_raise_false_alarms_in_at_most_five_percent_however_often_one_looks(rate, per_block):
    rolled_back, promoted, _ = passed(rate, rate, blocks=600, streams=1000, per_block=per_block)
    assert rolled_back <= 0.05 and promoted <= 0.05


def test_a_better_version_is_rolled_back_even_less_often():
    rolled_back, promoted, _ = passed(0.75, 0.85, blocks=1000, streams=500)
    assert rolled_back <= 0.02 and promoted >= 0.9


def test_a_usual_test_at_every_look_accuses_equal_versions_far_more_often():
    """Why the evidence is needed: a z-test at 5 %, made after each answer, as dashboards invite to do."""
    chance, streams = np.random.default_rng(0), 1000
    outcomes = chance.binomial(1, 0.81, (2, 1000, streams)).cumsum(axis=1)
    n = np.arange(1, 1001)[:, None]
    rates = outcomes / n
    pooled = rates.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (rates[0] - rates[1]) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert (z[20:] > 1.645).any(axis=0).mean() > 0.2


@pytest.mark.parametrize(("candidate", "most"), [(0.25, 40), (0.61, 300)])
def test_a_worse_version_is_rolled_back_after_as_many_answers_as_the_difference_asks_for(candidate, most):
    rolled_back, promoted, first = passed(0.81, candidate, blocks=800, streams=300, per_block=4)
    assert rolled_back >= 0.99 and promoted <= 0.05 and np.median(first) <= most


def test_evidence_of_one_trial_decides():
    worse = better = Evidence(2)
    while worse.decision() is None:
        worse, better = worse.after(2, 0), better.after(0, 1)
    assert worse.decision() == ROLL_BACK and better.decision() == PROMOTE
    assert worse.blocks < 20 and (worse.control, worse.candidate) == (2 * worse.blocks, 0)
    assert worse.decision(alpha=1e-9) is None


def test_evidence_is_the_product_of_likelihood_ratios():
    """Against the formula of the source, step by step, with plain probabilities."""
    chance = np.random.default_rng(3)
    evidence, product, s, x, k = Evidence(3), 1.0, 0, 0, 3
    for n in range(200):
        control, candidate = int(chance.binomial(k, 0.8)), int(chance.binomial(1, 0.4))
        a, b = (x + 0.5) / (n + 1), (s + 0.5) / (k * n + 1)
        m = (a + k * b) / (1 + k)
        if a < b:
            product *= (a if candidate else 1 - a) / (m if candidate else 1 - m)
            product *= (b / m) ** control * ((1 - b) / (1 - m)) ** (k - control)
        evidence = evidence.after(control, candidate)
        s, x = s + control, x + candidate
    assert math.isclose(math.exp(evidence.worse), product, rel_tol=1e-9) and product > 20


@pytest.mark.parametrize(
    ("control", "candidate"), [(3, 0), (-1, 0), (1, 2), (0.5, 1), (0, 0.5), (math.nan, 0)]
)
def test_what_cannot_be_a_block_is_refused(control, candidate):
    with pytest.raises(ValueError, match="must be a whole number from 0 to"):
        Evidence(2).after(control, candidate)


def test_users_stay_with_their_version_and_the_shares_are_kept():
    shares = {"a@v3": 0.2, "a@v2": 0.8}
    given = [assign(user, shares) for user in USERS]
    assert given == [assign(user, shares) for user in USERS]
    assert abs(given.count("a@v3") / len(USERS) - 0.2) < 3 * math.sqrt(0.16 / len(USERS))


def test_a_growing_share_takes_nobody_back():
    before = {user for user in USERS if assign(user, {"a@v3": 0.2, "a@v2": 0.8}) == "a@v3"}
    after = {user for user in USERS if assign(user, {"a@v3": 0.5, "a@v2": 0.5}) == "a@v3"}
    assert before < after


def test_another_trial_draws_other_users():
    one, other = ({u for u in USERS if assign(u, {"a": 0.5, "b": 0.5}, salt) == "a"} for salt in ("x", "y"))
    assert abs(len(one & other) / len(USERS) - 0.25) < 0.03


def test_a_version_without_a_share_is_never_given():
    assert {assign(user, {"a": 0.0, "b": 1.0, "c": 0}) for user in USERS} == {"b"}


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 0.7, "b": 0.7}, {"a": -0.5, "b": 1.5}, {"a": math.nan, "b": 1}]
)
def test_shares_that_do_not_add_up_are_refused(shares):
    with pytest.raises(ValueError, match="must"):
        assign("user", shares)
