"""The last gates: a registry that knows its base, and trials on traffic, whose verdict moves the aliases by itself.

    registry    what a fresh base with the published files computes otherwise than the model in memory   = 0
    shadow      both versions answer every visitor, who sees only the old one's answer                   promote
    canary      a share of the visitors is answered by the new one                                       promote

The trials run in `labkit.serving`'s own service, engine and rollouts, without HTTP between: visitors come with a question
that has a known answer, and a judge compares. A version that is worse is rolled back by that machinery, not by a gate.
"""

import copy
import random
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.formats.adapters import load_adapter
from labkit.lab.gates import Gate
from labkit.serving.admission import Base
from labkit.serving.batched import AdapterBank
from labkit.serving.engine import Engine
from labkit.serving.protocol import CompletionBody
from labkit.serving.registry import Registry
from labkit.serving.rollout import Rollouts
from labkit.serving.rows import EngineLimits
from labkit.serving.sequential import PROMOTE
from labkit.serving.service import Service
from labkit.serving.trial import Trial
from labkit.serving.trial_options import GoldJudge
from labkit.serving.versions import Version

AT_ONCE = 8  # visitors that are answered in one batch
LONGEST = 16  # tokens of an answer
PATIENCE = 60.0  # seconds without anything computed, after which an engine is stuck


class InTurn(Executor):
    """Runs what is submitted at once, in the thread that submits it: then a trial is the same each time."""

    def submit(self, function, /, *arguments, **named):
        function(*arguments, **named)
        return Future()


def open_registry(root: str | Path, name: str, base: nn.Module) -> Registry:
    """A new registry for adapters of `base`, which `labkit.models.load` calls `name`."""
    return Registry.create(root, Base.of(name, base))


def publish(
    registry: Registry, name: str, folder: str | Path, author: str, note: str, results: dict | None = None
) -> tuple[Gate, Version | None]:
    """Publish an adapter's folder as the next version. Nothing is kept of one that is refused."""
    try:
        version = registry.publish(name, folder, author, note, results=results)
    except ValueError as error:  # of another base, damaged, or with NaN
        says = str(error).split("\n")[0]
        do = "train it on the registry's base, or open a registry for the base that it was trained on"
        return Gate("registry", "14", False, float("nan"), "refused", "must be admitted", says, do), None
    return Gate(
        "registry", "14", True, 0, "refused", "must be admitted", f"{version.label} is published"
    ), version


def registry_gate(
    registry: Registry,
    name: str,
    folder: str | Path,
    model: nn.Module,
    base: nn.Module,
    ids: torch.Tensor,
    author: str,
    note: str,
    results: dict | None = None,
) -> tuple[Gate, Version | None]:
    """Publish, and load what was published onto a fresh base: are its logits the very same?

    Args:
        registry, name, folder, author, note, results: as for `publish`.
        model: the adapted model in memory.
        base: the same without the adapter; not changed.
        ids: (1, length) a text to compare on.
    """
    answer, version = publish(registry, name, folder, author, note, results)
    if version is None:
        return answer, None
    again = load_adapter(copy.deepcopy(base), version.path).eval()
    with torch.no_grad():
        apart = (again(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max().item()
    says = f"{version.label} is published under its content {version.content[:8]}; loaded onto a fresh base, logits differ by {apart:.0e}"
    do = "do not give it an alias: what was saved is not what was measured"
    return Gate("registry", "14", apart == 0, apart, "change of a logit", "must be 0", says, do), version


def on_trial(
    registry: Registry,
    base: nn.Module,
    tokenizer: Any,
    candidate: Version,
    questions: Sequence[dict],
    mode: str,
    share: float = 0.2,
    visitors: int = 600,
    seed: int = 0,
) -> Trial:
    """Let visitors come until the evidence decides, or `visitors` have come; the aliases are moved by the rollout.

    Args:
        registry: whose production alias of this adapter points to the control.
        base: not changed.
        tokenizer: of the base.
        candidate: the version that is to replace it.
        questions: plain records, `prompt` and `completion`, which visitors draw from.
        mode: "shadow" or "split"; of all the visitors in the first, of `share` of them in the second.
        visitors: who come at most; each asks once.
        seed: of what they ask.
    """
    alias = f"{candidate.name}@production"
    judge = GoldJudge({record["prompt"]: record["completion"] for record in questions})
    rollouts = Rollouts(registry, judge, worker=InTurn())
    try:
        engine = Engine(AdapterBank(copy.deepcopy(base)), {}, EngineLimits(rows=2 * AT_ONCE))
        service = Service(engine, tokenizer, registry.base.name, registry, rollouts=rollouts)
        trial = rollouts.start(
            alias, candidate.number, candidate.owner, share=1.0 if mode == "shadow" else share, mode=mode
        )
        draw = random.Random(seed)
        for first in range(0, visitors, AT_ONCE):
            for visitor in range(first, min(first + AT_ONCE, visitors)):
                body = CompletionBody.model_validate(
                    {
                        "model": alias,
                        "prompt": draw.choice(questions)["prompt"],
                        "max_tokens": LONGEST,
                        "temperature": 0,
                        "user": f"visitor {visitor}",
                    }
                )
                service.submit(body, lambda index, event: None, f"answer {visitor}")
            settle(engine)
            if trial.is_over:
                break
        return trial
    finally:
        rollouts.close()


def settle(engine: Engine) -> None:
    """Answer all that wait."""
    until = time.monotonic() + PATIENCE
    while not engine.is_idle:
        if not engine.step():
            time.sleep(0.002)  # an adapter is on its way from the disk
            if time.monotonic() > until:
                raise RuntimeError(f"the engine has computed nothing for {PATIENCE} s, and answers wait")
        else:
            until = time.monotonic() + PATIENCE


def trial_gate(trial: Trial) -> Gate:
    """Did the trial promote the candidate?"""
    word = "better" if trial.verdict == PROMOTE else "worse"
    says = f"{trial.verdict or 'no decision'} after {sum(trial.answers.values())} answers; {trial.reason}".rstrip(
        "; "
    )
    do = "nothing: production never left the old version; read the answers that differ before you try again"
    return Gate(
        "shadow" if trial.plan.is_paired else "canary",
        "14",
        trial.verdict == PROMOTE,
        trial.strength(word),
        f"evidence that it is {word}",
        f"promote at {1 / trial.plan.alpha:g}",
        says,
        do,
    )
