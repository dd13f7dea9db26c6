"""The watch over what versions are asked and answer: what it compares, how often it errs, and how little it remembers."""

import numpy as np
import pytest

from labkit.serving.drift import find_class_drift
from labkit.serving.drift_watch import VERSIONS, DriftWatch, Seen


def windows(watch: DriftWatch, chance, number: int, version="a", words=50, mean=30.0) -> list:
    """The alarms of that many windows of one distribution."""
    found = []
    for _ in range(number * watch.window):
        lengths = 1 + chance.poisson(mean), 1 + chance.poisson(12)
        found += watch.see(version, Seen(*map(int, lengths), int(chance.integers(words) ** 2)))
    return found


def test_unchanged_traffic_raises_as_few_alarms_as_was_asked_for():
    chance, alarmed = np.random.default_rng(0), set()
    watch = DriftWatch(window=60, alpha=0.05)
    for version in range(15):  # each with a first window of its own
        for n in range(11):
            if windows(watch, chance, 1, str(version)):
                alarmed.add((version, n))
    assert len(alarmed) / 150 <= 0.05 + 3 * (0.05 * 0.95 / 150) ** 0.5


@pytest.mark.parametrize(
    "change, feature", [({"mean": 45.0}, "prompt_tokens"), ({"words": 20}, "first_token")]
)
def test_what_has_changed_is_named(change, feature):
    chance, watch = np.random.default_rng(1), DriftWatch()
    assert not windows(watch, chance, 2)
    assert {alarm.feature for alarm in windows(watch, chance, 1, **change)} == {feature}


def test_versions_are_compared_with_themselves_and_the_longest_unseen_is_forgotten():
    watch = DriftWatch(window=50)
    for n in range(VERSIONS + 5):
        watch.see(f"v{n}", Seen(n, 1, 1))
    assert len(watch.first) == VERSIONS and "v0" not in watch.first and f"v{VERSIONS}" in watch.first


@pytest.mark.parametrize("settings", [{"window": 49}, {"window": 2.5}, {"alpha": 0}, {"alpha": 1}])
def test_a_watch_that_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        DriftWatch(**settings)


@pytest.mark.parametrize("size", [50, 300])
def test_classes_with_a_long_tail_raise_false_alarms_as_often_as_was_asked_for(size):
    chance = np.random.default_rng(2)
    shares = 1 / np.arange(1, 301)
    found = [
        find_class_drift(*chance.choice(300, (2, size), p=shares / shares.sum()).tolist(), alpha=0.05).found
        for _ in range(400)
    ]
    assert np.mean(found) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_classes_that_change_are_found_and_those_that_do_not_are_not():
    assert find_class_drift(["yes"] * 80 + ["no"] * 20, ["yes"] * 40 + ["no"] * 60).found
    assert find_class_drift(["yes"] * 100, ["yes"] * 100) == (
        0.0,
        *find_class_drift(["a"] * 100, ["a"] * 100)[1:],
    )
    assert find_class_drift([f"old {n}" for n in range(100)], ["new"] * 100).found
    with pytest.raises(ValueError, match="must be at least 50 each"):
        find_class_drift(["yes"] * 49, ["yes"] * 100)
