"""The options with which a server begins a trial, and the judge that knows the right answers."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from labkit.data.splits import read_jsonl
from labkit.serving.naming import USUAL_ALIAS, read_version
from labkit.serving.registry import Registry
from labkit.serving.rollout import Rollouts
from labkit.serving.trial import SHADOW, SPLIT


class GoldJudge:
    """Scores an answer 1 if it is the right one, and 0 if not; it cannot say where it does not know the prompt.

    Args:
        answers: the right one by prompt, or by the last message of a chat. Spaces at both ends do not count.
    """

    def __init__(self, answers: Mapping[str, str]):
        self.answers = {prompt: answer.strip() for prompt, answer in answers.items()}

    @classmethod
    def read(cls, path: str | Path) -> "GoldJudge":
        """From a file of JSON lines with `prompt` and `completion`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line is not such an object.
        """
        lines = read_jsonl(path)
        for number, line in enumerate(lines, 1):
            if not all(isinstance(line.get(key), str) for key in ("prompt", "completion")):
                raise ValueError(f"{path}, line {number}: give the texts 'prompt' and 'completion'")
        return cls({line["prompt"]: line["completion"] for line in lines})

    def __call__(self, prompt: str, answer: str) -> float | None:
        gold = self.answers.get(prompt)
        return None if gold is None else float(answer.strip() == gold)


def add_trial_options(parser: argparse.ArgumentParser) -> None:
    """The options of a trial, to those of a server."""
    group = parser.add_argument_group(
        "trial of a new version", "one that was begun before goes on without them"
    )
    group.add_argument("--candidate", metavar="NAME@v2", help="try this version against NAME@production")
    group.add_argument("--share", type=float, default=0.2, help="of the users who get it (default: 0.2)")
    group.add_argument("--shadow", action="store_true", help="it answers unseen; needs --gold")
    group.add_argument(
        "--gold", type=Path, help="JSON lines of prompt and completion, by which answers are scored"
    )


def rollouts_of(registry: Registry | None, chosen: argparse.Namespace) -> Rollouts | None:
    """The rollouts that the options ask for; those of the registry that are running go on in any case.

    A candidate is tried once: a server that is started again with the same options does not bring back a version that
    was rolled back.

    Raises:
        ValueError: a candidate without a registry, one that there is not, or a trial that cannot be.
        labkit.files.InUse: another server leads a trial of this registry.
    """
    if registry is None:
        if chosen.candidate or chosen.gold:
            raise ValueError("--candidate and --gold are for versions of a --registry")
        return None
    made = Rollouts(registry, GoldJudge.read(chosen.gold) if chosen.gold else None)
    if chosen.candidate:
        version = read_version(chosen.candidate)
        alias, number = f"{version.name}@{USUAL_ALIAS}", version.number or 0
        last = made.records.get(alias)
        if last is None or last.trial.plan.candidate != number:
            mode = SHADOW if chosen.shadow else SPLIT
            try:
                made.start(alias, number, "labkit.serve", share=chosen.share, mode=mode)
            except LookupError as error:
                raise ValueError(f"--candidate {chosen.candidate}: {error}") from None
    return made
