"""Gates: what an adapter has to pass before anybody is answered by it. Each is one number against one limit.

    data       faults in the file, and held-out records that are in the training file too      = 0
    size       half the width of the 95 % interval that so many held-out records leave         ≤ 0.15
    parity     how far the losses of the same steps by PEFT and plain PyTorch are              ≤ 1e-4
    seeds      by how much the worst seed beats the best rival, at the low end of its interval > 0
    doctor     probes that find something                                                      = 0
    exports    what the widest way out changes in a logit                                      ≤ 1e-3

Every one asks a part of labkit that a lesson built, and only joins: it measures nothing by itself. A gate that fails says
what to do, and what stands behind it is not begun (`walk`). `labkit.lab.release` has the two that need a registry.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.checks import needed
from labkit.data.batches import endless_batches, make_batch_of
from labkit.data.encoding import encode_all
from labkit.data.own.findings import counted
from labkit.data.own.leaks import find_leaks, hold_out
from labkit.data.own.reading import read_records
from labkit.doctor.examine import doctor
from labkit.formats.adapters import save_adapter
from labkit.formats.audit import TARGETS, TOLERANCE, Sample, cell_of
from labkit.formats.audit_variants import VARIANTS
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.training.config import TrainConfig, learning_rate
from labkit.training.intervals import bootstrap, wilson
from labkit.training.limits import padding_id
from labkit.training.loop import train

WIDEST = 0.15  # half an interval: about 40 held-out records
SAME_LOSS = 1e-4  # in fp32, over a few steps: rounding, and AdamW's signs of gradients near zero
WAYS = ("PEFT", "merged", "GGUF adapter", "vLLM")
HELD_OUT = 100


@dataclass(frozen=True)
class Gate:
    """What one gate says.

    Attributes:
        name: of the gate.
        lesson: that built what it asks.
        passed: may the adapter go on?
        number: what was measured, and `measures` in words.
        limit: what it had to be, in words.
        says: in a sentence.
        do: what to do if it did not pass, in a sentence.
    """

    name: str
    lesson: str
    passed: bool
    number: float
    measures: str
    limit: str
    says: str
    do: str = ""

    def __str__(self) -> str:
        line = f"{'pass' if self.passed else 'STOP'}  {self.name:<9} {self.number:.3g} ({self.limit}): {self.says}"
        return line if self.passed else f"{line}\n      to do: {self.do}"


def walk(gates: Iterable[Callable[[], Gate]]) -> list[Gate]:
    """Ask gate after gate, and stop behind the first that does not let pass."""
    answers: list[Gate] = []
    for ask in gates:
        answers.append(ask())
        if not answers[-1].passed:
            break
    return answers


@dataclass(frozen=True)
class Split:
    """Records to train on and held out, and the file's report; `Any` is a `DataReport`."""

    train: list[dict]
    held: list[dict]
    report: Any


def read_split(
    path: str | Path,
    tokenizer: Any,
    pose: Callable[[dict], dict] = dict,
    test: str | Path | None = None,
    columns: tuple[str, str] | None = None,
    seed: int = 0,
) -> Split:
    """Read a file, and a second one to test on; without one, hold a fifth out, at most `HELD_OUT` records.

    Args:
        path, tokenizer, test, columns: as for `labkit.data.read_records`; faulty lines are left out, and in the report.
        pose: makes of a record of the file the one that is trained on.
        seed: of what is held out.
    """
    found, report = read_records(path, tokenizer, test=test, columns=columns, faulty="leave out")
    records = [pose(record) for record in found]
    if test is not None:
        return Split(records, [pose(record) for record in report.test_records], report)
    if len(records) < 2:
        return Split(records, [], report)
    return Split(*hold_out(records, share=min(0.2, HELD_OUT / len(records)), seed=seed), report)


def data_gate(split: Split) -> Gate:
    """Are there faulty lines, or records on both sides?"""
    leaks = find_leaks(split.train, split.held)
    report = split.report
    faults = report.n_faults + (report.test.n_faults if report.test else 0)
    says = f"{counted(len(split.train), 'record')} to train on, {len(split.held)} held out; {counted(faults, 'faulty line')}, {counted(len(leaks), 'leak')}"
    if leaks:
        worst = leaks[0]
        says += f"; held-out record {worst.test} is training record {worst.train} ({worst.kind})"
    do = (
        "take the copies out of one of the two files, and begin again: a test on them measures memory"
        if leaks
        else "mend or remove the lines that the report names, with report.check()"
    )
    passed = not faults and not leaks
    return Gate("data", "08b", passed, faults + len(leaks), "faults and leaks", "must be 0", says, do)


def size_gate(split: Split) -> Gate:
    """Can so few held-out records decide anything?"""
    n = len(split.held)
    low, high = wilson(n // 2, n) if n else (0.0, 1.0)
    half = (high - low) / 2
    says = f"with {n} held out, a share of 50 % is known to ±{100 * half:.0f} points"
    do = (
        f"label records until at least 45 can be held out; put the {len(split.train)} into a prompt until then, and "
        "train nothing"
    )
    return Gate("size", "08b", half <= WIDEST, half, "half an interval", f"at most {WIDEST:g}", says, do)


def parity_gate(
    base: nn.Module,
    tokenizer: Any,
    records: Sequence[dict],
    lora: LoRAConfig,
    training: TrainConfig,
    steps: int = 4,
) -> Gate:
    """Are the first steps those of PEFT with a loop written by hand, on the same batches?"""
    config = replace(
        training, steps=steps, eval_every=None, patience=None, checkpoint_folder=None, progress=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        mine = add_lora(copy.deepcopy(base), lora)
    peft = needed("peft", "the parity trace")
    with tempfile.TemporaryDirectory() as folder:
        start = save_adapter(mine, Path(folder) / "start")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), start, is_trainable=True)
    ours = train(mine, tokenizer, records, config).losses
    others = plain_losses(theirs, tokenizer, records, config)
    apart = max(abs(a - b) for a, b in zip(ours, others, strict=True))
    says = f"{steps} steps by PEFT and a plain loop, loss {others[0]:.3f} to {others[-1]:.3f}: at most {apart:.0e} apart"
    do = "climb the ladder of lesson 16: tokens, labels, first loss, gradients, in this order; stop at the first that differs"
    return Gate(
        "parity",
        "16",
        apart <= SAME_LOSS,
        apart,
        "nats between two losses",
        f"at most {SAME_LOSS:g}",
        says,
        do,
    )


def plain_losses(
    model: nn.Module, tokenizer: Any, records: Sequence[dict], config: TrainConfig
) -> list[float]:
    """The losses of a loop as people write it: transformers' own loss, AdamW, clipping, a rate for each step."""
    examples, _ = encode_all(records, tokenizer, config.max_length)
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    order = endless_batches([len(one) for one in examples], config.batch_size, config.seed, config.batching)
    losses, total = [], config.total_steps(len(examples))
    model.train()
    for step, chosen in enumerate(islice(order, total)):
        batch = make_batch_of([examples[i] for i in chosen], padding_id(tokenizer, model))
        loss = model(input_ids=batch.ids, labels=batch.targets, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(held, config.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, total, config)
        optimizer.step()
        losses.append(loss.item())
    return losses


def seeds_gate(runs: Mapping[int, Sequence[float]], rivals: Mapping[str, Sequence[float]]) -> Gate:
    """Does the worst of several seeds beat the best of the rivals, record by record?

    Args:
        runs: by seed, the score of each held-out record; higher is better.
        rivals: by name, the same of what needs no training: rules, the nearest record, a prompt.
    """
    means = {seed: sum(scores) / len(scores) for seed, scores in runs.items()}
    worst = min(means, key=means.__getitem__)
    rival = max(rivals, key=lambda name: sum(rivals[name]))
    ahead = [a - b for a, b in zip(runs[worst], rivals[rival], strict=True)]
    low, high = bootstrap(ahead, [1] * len(ahead))
    mean = sum(ahead) / len(ahead)
    listed = ", ".join(f"{share:.0%}" for share in means.values())
    says = (
        f"right in {listed} ({counted(len(runs), 'seed')}); the worst is ahead of {rival} "
        f"({sum(rivals[rival]) / len(ahead):.0%}) by {100 * mean:+.0f} points ({100 * low:+.0f} to {100 * high:+.0f})"
    )
    do = f"use {rival} until more records, or a larger base, beat it"
    return Gate("seeds", "04, 08b", low > 0, low, "points ahead, low end", "above 0", says, do)


def doctor_gate(model: nn.Module, tokenizer: Any, split: Split, **given: Any) -> Gate:
    """Does a probe find something? `given` as for `labkit.doctor.doctor`: history, fed, valley, adapter."""
    report = doctor(model, tokenizer, split.train, held_out=split.held, **given)
    sick = report.of("sick")
    cure = report[report.first].cure if report.first else ""
    return Gate(
        "doctor", "15", not sick, len(sick), "probes that are sick", "must be 0", report.verdict, cure
    )


def export_gate(
    model: nn.Module, base: nn.Module, tokenizer: Any, text: str, ways: Iterable[str] = WAYS
) -> Gate:
    """Does every way out give the model that is in memory?"""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    cells = []
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            sample = Sample(VARIANTS["LoRA"], model, base, tokenizer, ids, Path(folder))
            cells.append(cell_of("LoRA", way, TARGETS[way], sample))
    wrong = [cell for cell in cells if cell.difference is None or cell.difference > TOLERANCE]
    widest = max(float("inf") if cell.difference is None else cell.difference for cell in cells)
    says = "; ".join(f"{cell.target} {cell}" for cell in cells)
    do = (
        f"hand it over by another way than {', '.join(cell.target for cell in wrong)}: {wrong[0].how}"
        if wrong
        else ""
    )
    return Gate(
        "exports", "13", not wrong, widest, "largest change of a logit", f"at most {TOLERANCE:g}", says, do
    )
