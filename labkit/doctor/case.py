"""What is known of a patient, and what the model says when it is asked: measured once, for all probes.

Bounded: at most 100 records are read, and of these as many go through the model as `WORK` allows, at most 24. All
runs in evaluation mode, one record at a time, so padding plays no part.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labkit.data.encoding import Encoded, encode
from labkit.data.records import records_of
from labkit.doctor.findings import Missing
from labkit.doctor.rows import Row, matched, rows_of
from labkit.lora.adapters import base_only
from labkit.lora.count import trainable
from labkit.lora.inject import lora_layers
from labkit.lora.layer import LoRALinear
from labkit.lora.merging import unmerged
from labkit.lora.mounting import mounted_adapter
from labkit.models.walk import unwrap
from labkit.sweeps.valleys import Valley
from labkit.training.history import History
from labkit.training.limits import context_of

RECORDS = 100  # that are read
PASSES = 24  # of them that go through the model
WORK = 7e10  # parameters times tokens of one pass over records: 1.5 s at 100 GFLOP/s


@dataclass(frozen=True)
class Heard:
    """What the model says of one record.

    Attributes:
        loss: sum over the supervised tokens, in nats.
        tokens: how many these are.
        first: the logits of the answer's first token, (vocabulary).
        end: the probability of the end mark behind the answer; None if the record has none.
        stops: is that the most likely token?
    """

    loss: float
    tokens: int
    first: Tensor
    end: float | None
    stops: bool | None


@dataclass
class Case:
    """All that was given; see `labkit.doctor.examine.doctor`."""

    model: nn.Module
    tokenizer: Any
    data: Any = None
    history: History | None = None
    folder: Path | None = None
    held_out: Any = None
    fed: Any = None
    served: Sequence[Any] | None = None
    optimizer: torch.optim.Optimizer | None = None
    reference: nn.Module | str | None = None
    valley: tuple[float, float] | Valley | None = None

    @cached_property
    def records(self) -> list[Mapping]:
        """The training records that are looked at."""
        return list(records_of(self.data if self.data is not None else [], "data"))[:RECORDS]

    @cached_property
    def n_records(self) -> int:
        """How many training records there are."""
        return len(records_of(self.data if self.data is not None else [], "data"))

    @cached_property
    def read(self) -> tuple[list[Encoded], list[str]]:
        """The records that can be encoded and fit, and what is wrong with the others."""
        return self.encoded(self.records)

    @cached_property
    def examples(self) -> list[Encoded]:
        """The encoded training records, at least one."""
        examples, problems = self.read
        if not examples:
            raise Missing("no data was given" if not problems else f"no record can be read: {problems[0]}")
        return examples

    @cached_property
    def held_examples(self) -> list[Encoded]:
        """The encoded held-out records, at least one."""
        if self.held_out is None:
            raise Missing("no held_out records were given")
        examples, problems = self.encoded(list(records_of(self.held_out, "held_out"))[:RECORDS])
        if not examples:
            raise Missing(f"no held-out record can be read: {problems[0] if problems else 'there is none'}")
        return examples

    def encoded(self, records: Sequence[Mapping]) -> tuple[list[Encoded], list[str]]:
        """Records as token ids, and the problems of those that cannot be."""
        context, examples, problems = context_of(self.model), [], []
        for i, record in enumerate(records):
            try:
                one = encode(record, self.tokenizer)
            except ValueError as error:
                problems.append(f"record {i}: {error}")
                continue
            if context is not None and len(one) > context:
                problems.append(f"record {i} has {len(one)} tokens, and the model takes {context}")
            else:
                examples.append(one)
        return examples, problems

    @cached_property
    def rows(self) -> list[Row]:
        """What the trainer feeds, row by row, each with its record; as many as there are records."""
        if self.fed is None:
            raise Missing("the trainer's batches (fed) were not given")
        rows = rows_of(self.fed)[:RECORDS]
        found = matched(rows, self.examples)
        if not found:
            raise Missing(f"none of the {len(rows)} rows in fed was made of one of the records in data")
        return found

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def layers(self) -> dict[str, LoRALinear]:
        """The adapted layers of the model, by name; none if no adapter is mounted."""
        return lora_layers(self.model)

    @cached_property
    def is_merged(self) -> bool:
        return any(layer.is_merged for layer in self.layers.values())

    @cached_property
    def is_trained(self) -> bool:
        """Has somebody trained this model, as far as can be seen?"""
        if (self.history is not None and self.history.steps) or self.folder is not None:
            return True
        return any(layer.lora_B.any() and layer.lora_A.any() for layer in self.layers.values())

    @cached_property
    def losses(self) -> list[float]:
        """The losses of the steps."""
        if self.history is None or not self.history.steps:
            raise Missing("no history was given")
        return self.history.losses

    @cached_property
    def heard(self) -> list[Heard]:
        """What the model says of training records."""
        return self.hear(self.model, self.examples)

    @cached_property
    def heard_base(self) -> list[Heard]:
        """What the base alone says of them."""
        with base_alone(self.model):
            return self.hear(self.model, self.examples)

    @cached_property
    def heard_held_out(self) -> list[Heard]:
        """What the model says of held-out records."""
        return self.hear(self.model, self.held_examples)

    @cached_property
    def heard_held_out_base(self) -> list[Heard]:
        """What the base alone says of them."""
        with base_alone(self.model):
            return self.hear(self.model, self.held_examples)

    def chosen(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """Examples from all over the list, as many as may go through the model; at least two, if there are two."""
        step = max(1, len(examples) // PASSES)
        spread = list(examples[::step])[:PASSES]
        size = trainable(self.model).total  # a weight in four bits is as much work as another
        chosen: list[Encoded] = []
        tokens = 0
        for example in spread:
            tokens += len(example)
            if len(chosen) >= 2 and size * tokens > WORK:
                break
            chosen.append(example)
        return chosen

    @torch.no_grad()
    def hear(self, model: nn.Module, examples: Sequence[Encoded]) -> list[Heard]:
        """What `model` says of as many of the examples as may go through it."""
        model.eval()
        return [heard_of(model, example) for example in self.chosen(examples)]


def heard_of(model: nn.Module, example: Encoded) -> Heard:
    """What the model says of one example."""
    device = next(model.parameters()).device
    ids = example.prompt + example.completion
    start = max(1, len(example.prompt))
    logits = last_logits(model, torch.tensor([ids], device=device), len(ids) - start + 1)
    scores = logits[:-1].float()  # (supervised, vocabulary)
    targets = torch.tensor(ids[start:], device=device)
    logs = scores.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    place = len(targets) - example.end
    end = stops = None
    if example.end and 0 <= place < len(targets):
        end, stops = logs[place].exp().item(), bool(scores[place].argmax() == targets[place])
    return Heard(-logs.sum().item(), len(targets), scores[0].cpu(), end, stops)


def last_logits(model: nn.Module, ids: Tensor, n: int, **rest: Any) -> Tensor:
    """The logits of the last `n` places of a row, (n, vocabulary). A model that can, computes no others: of a long
    prompt with a short answer the output layer is a fifth of the work.
    """
    return with_logits(model, ids, n, use_cache=False, **rest).logits[0, -n:]


def with_logits(model: nn.Module, ids: Tensor, n: int, **rest: Any) -> Any:
    """What the model returns of a row, with the logits of at least its last `n` places."""
    if "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters:
        rest["logits_to_keep"] = n
    return model(input_ids=ids, **rest)


def mean_loss(heard: Sequence[Heard]) -> float:
    """Nats per supervised token."""
    return sum(one.loss for one in heard) / sum(one.tokens for one in heard)


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes without its adapter, merged or not.

    Raises:
        Missing: it has none, or the base cannot be had alone.
    """
    adapter = mounted_adapter(model)
    if adapter is None:
        raise Missing(
            f"{type(unwrap(model)).__name__} has no adapter mounted, so there is no base to compare with"
        )
    if not adapter.keeps_base:
        raise Missing(
            f"the adapter (init={adapter.config.init!r}) did not keep the base that it started from"
        )
    with unmerged(model), base_only(model):
        yield
