"""Make data/results/rollout.jsonl: what trials of new versions do, over simulated users.

    python -m recipes.rollout_figures
    python -m recipes.rollout_figures --good 0.9 --poisoned 0.5 --share 0.1

Every user asks once and says whether the answer was right. A line for each figure:

    poisoned, worse, better    trials as the server leads them (`labkit.serving.trial`), seed by seed: requests until the
                        verdict
    shuffled labels     the same, where the answers are those of two adapters of tiny-llama: users ask about orders, and
                        the candidate was trained with the labels of other messages
    equal               verdicts on equal versions, looking after every answer; beside them a z-test at each look
    drift               windows of unchanged traffic that raise an alarm, by the threshold that knows the sizes of the
                        samples, and by the customary .1 and .25

On one thread; under four minutes.
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from labkit.checks import check_number
from labkit.doctor.specimens import (
    STEPS,
    adapted,
    fed_batches,
    held_records,
    teach,
    tiny_llama,
    train_records,
    trained,
)
from labkit.paths import data_folder
from labkit.serving.drift import find_class_drift, find_drift, psi, psi_threshold
from labkit.serving.sequential import Evidence
from labkit.serving.trial import CANDIDATE, Trial, TrialPlan
from labkit.training.evaluate import generate
from recipes import jsonl

ALIAS, ALPHA = "support@production", 0.05
STREAMS, BLOCKS = 4000, 500  # of equal versions
LOOKS_FROM = 5  # blocks before the z-test is looked at: fewer say nothing of a normal distribution
WINDOWS, SIZES = 2000, (50, 200, 1000)


def lead(seed: int, control: Sequence[float], candidate: Sequence[float], share: float) -> tuple[Trial, int]:
    """A trial, and how many requests of both versions it took.

    Args:
        seed: of the users and the questions they draw.
        control, candidate: for each question, how often that version's answer is right.
        share: of the users, for the candidate.
    """
    chance, trial = np.random.default_rng(seed), Trial(f"{ALIAS}#{seed}", TrialPlan(ALIAS, 1, 2, share))
    n = 0
    while not trial.is_over:
        arm, _ = trial.route(f"user-{n}")
        trial.see_answer(arm)
        rates = candidate if arm == CANDIDATE else control
        right = chance.random() < rates[int(chance.integers(len(rates)))]
        trial.see_score(arm, f"user-{n}", float(right))
        n += 1
    return trial, n


def verdicts(
    figure: str, seeds: int, control: Sequence[float], candidate: Sequence[float], share: float
) -> dict:
    """How trials end, and after how many requests: median, quartiles and the most."""
    led = [lead(seed, control, candidate, share) for seed in range(seeds)]
    means = {"control": float(np.mean(control)), "candidate": float(np.mean(candidate))}
    wanted = "roll back" if means["candidate"] < means["control"] else "promote"
    line: dict[str, Any] = {"figure": figure, **means, "share": share, "seeds": seeds}
    line |= {"verdicts": dict(Counter(trial.verdict for trial, _ in led))}
    for what, counts in (
        ("requests", [n for trial, n in led if trial.verdict == wanted]),
        ("candidate_answers", [trial.answers[CANDIDATE] for trial, _ in led if trial.verdict == wanted]),
    ):
        quarters = np.percentile(counts, [0, 25, 50, 75, 100]).tolist() if counts else []
        line[what] = dict(zip(("least", "lower", "median", "upper", "most"), quarters))
    return line


def shuffled_labels(seeds: int, share: float) -> dict:
    """The same, for an adapter trained on shuffled labels against one trained on the right ones."""
    train, held = train_records(), held_records()
    labels = [record["completion"] for record in train]
    random.Random(0).shuffle(labels)
    poisoned = adapted(0)
    teach(poisoned, fed_batches([r | {"completion": c} for r, c in zip(train, labels)], 0, STEPS))
    right = []
    for model in (trained(0)[0], poisoned):
        prompts = [record["prompt"] for record in held]
        said = generate(model, tiny_llama()[1], prompts, max_new_tokens=12, progress=False)
        right.append([float(a.strip() == r["completion"].strip()) for a, r in zip(said, held)])
    good, bad = right
    return verdicts("shuffled labels", seeds, good, bad, share) | {"questions": len(held)}


def equal(rate: float, share: float) -> dict:
    """False alarms on equal versions: by the evidence, and by a one-sided z-test at 5 % at every look."""
    per_block = max(1, round((1 - share) / share))
    chance, evidence = np.random.default_rng(0), Evidence(per_block)
    found = {name: np.zeros(STREAMS, dtype=bool) for name in ("rolled_back", "promoted", "z_rolled_back")}
    enough = -math.log(ALPHA)
    for n in range(1, BLOCKS + 1):
        evidence = evidence.after(
            chance.binomial(per_block, rate, STREAMS), chance.binomial(1, rate, STREAMS)
        )
        found["rolled_back"] |= ~found["promoted"] & (evidence.worse >= enough)
        found["promoted"] |= ~found["rolled_back"] & (evidence.better >= enough)
        if n >= LOOKS_FROM:
            found["z_rolled_back"] |= z_of(evidence) > stats.norm.ppf(1 - ALPHA)
    line = {"figure": "equal", "rate": rate, "share": share, "streams": STREAMS, "alpha": ALPHA}
    line |= {"requests": BLOCKS * (per_block + 1)}
    return line | {name: with_interval(int(alarms.sum()), STREAMS) for name, alarms in found.items()}


def z_of(evidence: Evidence) -> np.ndarray:
    """The usual statistic: how far the candidate's rate is below the control's."""
    n = evidence.blocks
    m = n * evidence.per_block
    pooled = (evidence.candidate + evidence.control) / (n + m)
    spread = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    below = evidence.control / m - evidence.candidate / n
    return np.divide(below, spread, out=np.zeros_like(below), where=spread > 0)


def with_interval(count: int, of: int) -> dict:
    """A share with its 95 % interval (Clopper and Pearson)."""
    exact = stats.binomtest(count, of).proportion_ci(0.95)
    return {"share": count / of, "low": exact.low, "high": exact.high}


def drift(size: int, alpha: float = 0.01) -> dict:
    """False alarms of two windows of `size` from one distribution: lengths, first tokens, and ten equal bins."""
    chance, alarms = np.random.default_rng(size), Counter[str]()
    words = 1 / np.arange(1, 201)
    words /= words.sum()
    for _ in range(WINDOWS):
        one, other = np.ceil(chance.gamma(2.0, 20.0, (2, size)))
        alarms["lengths"] += find_drift(one, other, alpha=alpha).found
        first, second = chance.choice(200, (2, size), p=words)
        alarms["first_tokens"] += find_class_drift(first.tolist(), second.tolist(), alpha=alpha).found
        index = psi(*chance.multinomial(size, [0.1] * 10, 2))
        alarms["psi"] += index > psi_threshold(size, size, 10, alpha)
        alarms["psi_above_0.1"] += index > 0.1
        alarms["psi_above_0.25"] += index > 0.25
    line = {"figure": "drift", "window": size, "alpha": alpha, "windows": WINDOWS}
    names = ("lengths", "first_tokens", "psi", "psi_above_0.1", "psi_above_0.25")
    return line | {name: with_interval(alarms[name], WINDOWS) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--good", type=float, default=0.81, help="rate of right answers of the control")
    parser.add_argument(
        "--poisoned", type=float, default=0.25, help="of a version trained on shuffled labels"
    )
    parser.add_argument("--worse", type=float, default=0.61)
    parser.add_argument("--better", type=float, default=0.9)
    parser.add_argument("--share", type=float, default=0.2, help="of the users who get the candidate")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=data_folder() / "results" / "rollout.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("good", "poisoned", "worse", "better"):
        check_number(name, getattr(given, name), at_least=0, below=1 + 1e-9)
    lines = [
        *(
            verdicts(name, given.seeds, [given.good], [getattr(given, name)], given.share)
            for name in ("poisoned", "worse", "better")
        ),
        shuffled_labels(given.seeds, given.share),
        *(equal(rate, given.share) for rate in (0.5, given.good, 0.95)),
        *map(drift, SIZES),
    ]
    jsonl.write(given.out, lines)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
