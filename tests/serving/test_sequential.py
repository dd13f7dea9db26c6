"""When evidence is enough: false alarms and detections, counted over simulated streams."""

import math

import numpy as np
import pytest

from labkit.serving.sequential import PROMOTE, ROLL_BACK, Evidence, PairedEvidence


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


@pytest.mark.parametrize(("control", "candidate"), [(3, 0), (-1, 0), (1, 2), (0, -0.5), (math.nan, 0)])
@pytest.mark.parametrize("kind", [Evidence(2), PairedEvidence()], ids=["blocks", "pairs"])
def test_what_cannot_be_scores_is_refused(kind, control, candidate):
    with pytest.raises(ValueError, match="must be from 0 to"):
        kind.after(control, candidate)


@pytest.mark.parametrize("spread", [0.5, 5])
def test_scores_between_right_and_wrong_raise_false_alarms_as_seldom(spread):
    """Equal versions, scored from 0 to 1 by a beta distribution, which is nearly right or wrong for a small `spread`."""
    chance, streams = np.random.default_rng(4), 500
    evidence, alarms = Evidence(2), np.zeros(streams, dtype=bool)
    for _ in range(400):
        control = chance.beta(0.7 * spread, 0.3 * spread, (2, streams)).sum(axis=0)
        evidence = evidence.after(control, chance.beta(0.7 * spread, 0.3 * spread, streams))
        alarms |= (evidence.worse >= math.log(20)) | (evidence.better >= math.log(20))
    assert alarms.mean() <= 0.05


def test_questions_that_get_harder_for_both_versions_accuse_neither():
    """The rate of both rises and falls together, as the traffic changes in a day."""
    chance, streams = np.random.default_rng(5), 500
    evidence, alarms = Evidence(4), np.zeros(streams, dtype=bool)
    for n in range(500):
        rate = 0.7 + 0.25 * math.sin(n / 25)
        evidence = evidence.after(chance.binomial(4, rate, streams), chance.binomial(1, rate, streams))
        alarms |= evidence.worse >= math.log(20)
    assert alarms.mean() <= 0.05


def pairs(control: float, candidate: float, both: float, number: int, streams: int):
    """Right or wrong answers of two versions to the same requests: in a share `both` of them they agree."""
    chance = np.random.default_rng(6)
    agree = chance.random((number, streams)) < both
    shared = chance.random((number, streams)) < (control + candidate) / 2
    one, other = (chance.random((number, streams)) < rate for rate in (control, candidate))
    return np.where(agree, shared, one) * 1.0, np.where(agree, shared, other) * 1.0


def test_pairs_of_equal_versions_raise_false_alarms_in_at_most_five_percent():
    alarms, evidence = np.zeros(1000, dtype=bool), PairedEvidence()
    for one, other in zip(*pairs(0.8, 0.8, 0.5, 500, 1000)):
        evidence = evidence.after(one, other)
        alarms |= evidence.worse >= math.log(20)
    assert alarms.mean() <= 0.05


def test_pairs_of_versions_that_mostly_agree_decide_sooner_than_two_separate_groups():
    found = {}
    for name, evidence in (("pairs", PairedEvidence()), ("groups", Evidence(1))):
        first = np.full(200, np.inf)
        for n, (one, other) in enumerate(zip(*pairs(0.85, 0.45, 0.75, 800, 200)), 1):
            evidence = evidence.after(one, other)
            first = np.where((evidence.worse >= math.log(20)) & np.isinf(first), n, first)
        found[name] = np.median(first)
    assert found["pairs"] < 0.7 * found["groups"]


def test_pairs_that_differ_are_bets_against_a_half():
    """Against the formula, with plain probabilities: only the pairs that differ count."""
    evidence, product, wins, n = PairedEvidence(), 1.0, 0, 0
    for control, candidate in [(1, 0), (1, 1), (0, 0), (1, 0), (0, 1), (1, 0), (1, 0), (1, 0), (1, 0)] * 3:
        q = (wins + 0.5) / (n + 1)
        if control != candidate:
            product *= 1 if q >= 0.5 else 2 * (q if candidate > control else 1 - q)
            wins, n = wins + (candidate > control), n + 1
        evidence = evidence.after(control, candidate)
    assert math.isclose(math.exp(evidence.worse), product, rel_tol=1e-9) and product > 20
    assert evidence.decision() == ROLL_BACK and evidence.blocks == 27 and evidence.unequal == 21
