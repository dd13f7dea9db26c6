"""Do the requests, or the answers, of a version still look like its first ones?

The first `window` answers of a version are what later windows are compared with, by lengths of prompts, lengths of
answers, and the first tokens of answers. A full window is looked at once and let go, so the memory is bounded, and of
windows without any change a share `alpha` raises an alarm. An alarm says that something has changed, not that it is
worse: it goes on record, and moves no alias.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

from labkit.checks import check_number, check_whole
from labkit.serving.drift import Drift, find_class_drift, find_drift

LENGTHS, CLASSES = ("prompt_tokens", "answer_tokens"), ("first_token",)
VERSIONS = 64  # that are watched at once; the one not seen for longest is forgotten


class Seen(NamedTuple):
    """What is watched of an answer; `first_token` is -1 of an empty one."""

    prompt_tokens: int
    answer_tokens: int
    first_token: int


class Alarm(NamedTuple):
    """A feature of the answers of a version that has changed."""

    version: str
    feature: str
    drift: Drift

    def as_json(self) -> dict[str, Any]:
        psi, threshold, p_value, _ = self.drift
        numbers = {"psi": psi, "threshold": threshold, "p_value": p_value}
        return {"version": self.version, "feature": self.feature} | numbers


class DriftWatch:
    """Watches the answers of all versions; one thread at a time.

    Args:
        window: answers of a version that are compared at once.
        alpha: the share of windows that raise an alarm when nothing has changed.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(self, window: int = 200, alpha: float = 0.001):
        check_whole("window", window, at_least=50)
        check_number("alpha", alpha, at_least=1e-12, below=1)
        self.window, self.alpha = window, alpha
        self.first: OrderedDict[str, list[Seen]] = OrderedDict()
        self.now: dict[str, list[Seen]] = {}

    def see(self, version: str, seen: Seen) -> list[Alarm]:
        """Take in an answer; the alarms that it completes, mostly none."""
        if version not in self.first and len(self.first) == VERSIONS:
            self.now.pop(self.first.popitem(last=False)[0], None)
        first = self.first.setdefault(version, [])
        self.first.move_to_end(version)
        if len(first) < self.window:
            first.append(seen)
            return []
        now = self.now.setdefault(version, [])
        now.append(seen)
        if len(now) < self.window:
            return []
        del self.now[version]
        return compare(version, first, now, self.alpha)


def compare(version: str, first: list[Seen], now: list[Seen], alpha: float) -> list[Alarm]:
    """The features that differ between two windows; of all together a share `alpha` by chance."""
    each, found = alpha / (len(LENGTHS) + len(CLASSES)), []
    for feature in (*LENGTHS, *CLASSES):
        before, later = ([getattr(one, feature) for one in part] for part in (first, now))
        drift = (find_drift if feature in LENGTHS else find_class_drift)(before, later, alpha=each)
        if drift.found:
            found.append(Alarm(version, feature, drift))
    return found
