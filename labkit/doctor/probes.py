"""The twelve probes, causes before their effects: the first that is sick is the diagnosis.

What goes in comes first, for a model that learns from wrong labels shows every later symptom too. Then whether it
trains at all, in numbers that can hold it, at a rate that suits it. What the model says comes last.
"""

from collections.abc import Callable
from dataclasses import dataclass

from labkit.doctor.answers import LEAKED, LEARNED, look_at_effect, look_at_generalization, look_at_stopping
from labkit.doctor.case import Case
from labkit.doctor.findings import Finding
from labkit.doctor.inputs import CUT, look_at_labels, look_at_template
from labkit.doctor.origins import look_at_origin
from labkit.doctor.rounding import look_at_precision
from labkit.doctor.sameness import look_at_cache, look_at_reference
from labkit.doctor.sizes import look_at_rate, look_at_size
from labkit.doctor.wiring import look_at_training


@dataclass(frozen=True)
class Probe:
    """A question to a fine-tuned model.

    Attributes:
        name: one word.
        measures: what its number is.
        threshold: from where on it is sick.
        why: the reason for that threshold.
        look: answers it.
    """

    name: str
    measures: str
    threshold: str
    why: str
    look: Callable[[Case], Finding]


PROBES = (
    Probe(
        "origin",
        "what differs between the folder and the model: base, tensors, scaling",
        "anything",
        "an adapter is a difference; on another base, or with a part of it, it is noise that loads without an error",
        look_at_origin,
    ),
    Probe(
        "labels",
        "share of the rows that supervise something else than the answer and its end",
        f"more than {CUT:.0%}",
        "one rule makes all labels, so a wrong rule shows in nearly every row; a few are cut by a maximal length",
        look_at_labels,
    ),
    Probe(
        "template",
        "share of the prompts that are served with other tokens than trained",
        "any",
        "the same function should make both, and then none differs",
        look_at_template,
    ),
    Probe(
        "training",
        "share of the tensors that get a gradient, are in the optimizer, and have moved",
        "under 50 %, or any that the optimizer does not hold",
        "all of them should; experts of a mixture may rest, but not most of what trains",
        look_at_training,
    ),
    Probe(
        "precision",
        "share of steps, or of a merged update, that rounds to nothing; NaN counts as all",
        "steps over 30 %; merged update over 20 %, or an error over half of it",
        "in LoRA half of the entries, A, hardly need to move; beyond that, what is to be learned is lost",
        look_at_precision,
    ),
    Probe(
        "rate",
        "effective learning rate, lr times scaling / 2, beside the swept valley",
        "outside the valley; without one, a loss that falls by less than 2 standard errors",
        "outside of what was swept as good, it is known to be worse; less than 2 errors is no fall at all",
        look_at_rate,
    ),
    Probe(
        "size",
        "rms(dW) / rms(W), and the bits of the data by those of the adapter",
        "above 0.5 or below 2^-9; more bits than it holds, and most of them not learned",
        "recorded runs have 0.01 to 0.2; bf16 resolves 2^-9 of a weight; a parameter holds about 2 bits",
        look_at_size,
    ),
    Probe(
        "cache",
        "difference that a KV cache makes to logits, in their standard deviation",
        "over 0.1",
        "a cache saves work and changes nothing; rounding in 16 bits makes about 0.01",
        look_at_cache,
    ),
    Probe(
        "effect",
        "share of the base's loss on the training records that the adapter takes away",
        f"under {LEARNED:.0%}",
        "these are the very records it was trained on",
        look_at_effect,
    ),
    Probe(
        "reference",
        "KL(policy, reference) before the first step of preference training, in nats",
        "over 0.001",
        "the policy starts as its own reference, so it is zero but for rounding",
        look_at_reference,
    ),
    Probe(
        "generalization",
        "loss on held-out records by that on training records, beside the base's ratio",
        f"over 3, with a gap over 0.05 nats; more than {LEAKED:.0%} of held-out records in training",
        "the base has seen neither, so its ratio says how much harder they are; other phrasings double it, memory does more",
        look_at_generalization,
    ),
    Probe(
        "stopping",
        "share of answers at whose end the end mark is the most likely token",
        "under 50 %, with a median probability under 1 / n, for answers of n tokens",
        "greedy decoding goes on where it is not; a text that cannot tell its end still has one in n tokens",
        look_at_stopping,
    ),
)
