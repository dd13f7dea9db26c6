"""Which number says whether a model does what its records show, and what that number is.

    fields    every answer is a JSON object with the same keys: right as a whole, and field by field
    exact     answers recur, as labels do: right word for word
    loss      answers are free text, where two right ones share few words: how probable the written one is

The loss is measured in all three cases, as the mean over the answers' tokens in nats. It is the only one that
moves before the first answer is right, and it needs no generation.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from labkit.checks import check_choice
from labkit.data.encoding import encode_all
from labkit.data.own.shingles import asked_and_answered
from labkit.data.records import records_of
from labkit.training.evaluate import chat_prompts, check_measurable, generate, loss_of_examples
from labkit.training.intervals import bootstrap, wilson
from labkit.training.limits import padding_id
from labkit.training.metrics import parse_json

METRICS = ("fields", "exact", "loss")
RECURRING = 0.5  # of the records: their answer is another's too
ROOM = 1.25  # times the longest known answer may be generated


@dataclass(frozen=True)
class Metric:
    """What to count: its `name` (`METRICS`), `why` in words, and of JSON the `fields`."""

    name: str
    why: str
    fields: tuple[str, ...] = ()

    def __post_init__(self):
        check_choice("metric", self.name, METRICS)

    @property
    def title(self) -> str:
        """As an axis or a table calls it."""
        return {"fields": "exact match, all fields", "exact": "exact match", "loss": "loss, nats per token"}[
            self.name
        ]


def choose_metric(records: Sequence[dict]) -> Metric:
    """The metric that fits the answers of these records, and why.

    Args:
        records: to train on and held out, together.

    Raises:
        ValueError: no records.
    """
    pairs = [asked_and_answered(record) for record in records_of(records)]
    if not pairs:
        raise ValueError("there are no records, so no metric fits them")
    answers = [answer.strip() for _, answer in pairs]
    if not any(asked for asked, _ in pairs) or not any(answers):
        return Metric("loss", "the records are texts without a question, so that no answer can be right")
    objects = [parse_json(answer) for answer in answers]
    keys = dict.fromkeys(tuple(one) for one in objects if one is not None)  # in the order of the answers
    if None not in objects and len({frozenset(one) for one in keys}) == 1 and all(keys):
        fields = next(iter(keys))
        why = f"every answer is a JSON object with the fields {', '.join(fields)}: an answer is right if all are"
        return Metric("fields", why, fields)
    often = Counter(answers)
    recurring = sum(n for n in often.values() if n > 1) / len(answers)
    if recurring >= RECURRING:
        why = f"the {len(answers)} answers are only {len(often)} different ones: an answer is right word for word, or wrong"
        return Metric("exact", why)
    why = (
        f"{len(often)} of {len(answers)} answers are different texts: a good answer need not be the written one word for "
        "word, so the measure is how probable the written one is"
    )
    return Metric("loss", why)


@dataclass(frozen=True)
class Measurement:
    """What a model makes of held-out records.

    Attributes:
        nats: of each record, the summed loss of its answer.
        tokens: of each record, the supervised tokens of its answer.
        answers: what was generated for each, [] for none.
        right: of each answer, is it right? [] where no answer can be right word for word.
        per_field: of JSON answers, the share that has this field right.
    """

    nats: list[float]
    tokens: list[int]
    answers: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    per_field: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean over the tokens of all records, in nats."""
        return sum(self.nats) / sum(self.tokens)

    @property
    def loss_interval(self) -> tuple[float, float]:
        """95 %, from draws of whole records."""
        return bootstrap(self.nats, self.tokens)

    @property
    def share(self) -> float | None:
        """Of right answers; None where none can be right word for word."""
        return sum(self.right) / len(self.right) if self.right else None

    @property
    def share_interval(self) -> tuple[float, float] | None:
        """95 %, Wilson's."""
        return wilson(sum(self.right), len(self.right)) if self.right else None

    def __str__(self) -> str:
        text = f"loss {loss_in_words(self.loss, self.loss_interval)}"
        if self.right:
            share = share_in_words(self.share, self.share_interval)
            text = f"{sum(self.right)} of {len(self.right)} right = {share}, {text}"
        return text + "".join(f", {name} {share:.0%}" for name, share in self.per_field.items())


def share_in_words(share: float, interval: tuple[float, float]) -> str:
    """A share with its interval.

    >>> share_in_words(0.5, (0.25, 0.75))
    '50% (25% to 75%)'
    """
    return f"{share:.0%} ({interval[0]:.0%} to {interval[1]:.0%})"


def loss_in_words(loss: float, interval: tuple[float, float]) -> str:
    """A loss with its interval."""
    return f"{loss:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def measure(
    model: nn.Module,
    tokenizer,
    records: Sequence[dict],
    metric: Metric,
    max_length: int = 512,
    batch_size: int = 32,
    progress: bool = False,
) -> Measurement:
    """The loss of each record, and where the metric asks for it, generated answers and whether they are right.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        records: held out from training.
        metric: of `choose_metric`.
        max_length: tokens; a longer record is an error here, since a measurement on fewer records is another.
        batch_size: prompts answered at a time.
        progress: show a bar while generating.

    Raises:
        ValueError: no records, one that is too long or cannot be encoded, or a model that cannot take one.
    """
    examples, left_out = encode_all(records, tokenizer, max_length)
    if left_out:
        raise ValueError(
            f"records {left_out[:5]} are longer than max_length={max_length} tokens; raise it, or leave them out before "
            "and after alike"
        )
    check_measurable(model, examples)
    pad_id = padding_id(tokenizer, model)
    nats, tokens = [], []
    for one in examples:  # alone, so that each has a number of its own
        mean, n = loss_of_examples(model, [one], pad_id, batch_size=1)
        nats.append(mean * n)
        tokens.append(n)
    if metric.name == "loss":
        return Measurement(nats, tokens)
    room = round(ROOM * max(len(one.completion) for one in examples)) + 1
    answers = answer(model, tokenizer, records, room, batch_size, progress)
    return Measurement(nats, tokens, answers, *judged(answers, records, metric))


def answer(
    model: nn.Module,
    tokenizer,
    records: Sequence[dict],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: bool = False,
) -> list[str]:
    """What the model answers to the prompts of `records`, whose own answers it does not see."""
    is_chat = "messages" in records[0]
    prompts = chat_prompts(records, tokenizer) if is_chat else [record["prompt"] for record in records]
    return generate(model, tokenizer, prompts, max_new_tokens, batch_size, progress)


def judged(
    answers: Sequence[str], records: Sequence[dict], metric: Metric
) -> tuple[list[bool], dict[str, float]]:
    """Of each answer whether it is right, and of JSON the share of records that have each field right.

    Raises:
        ValueError: not one answer for each record.
    """
    if len(answers) != len(records) or not answers:
        raise ValueError(
            f"{len(answers)} answers for {len(records)} records; give one for each, at least one"
        )
    gold = [asked_and_answered(record)[1].strip() for record in records]
    if metric.name != "fields":
        return [given.strip() == wanted for given, wanted in zip(answers, gold)], {}
    pairs = [(parse_json(given), parse_json(wanted)) for given, wanted in zip(answers, gold)]
    per_field = {
        name: sum(has(given, name, wanted) for given, wanted in pairs) / len(pairs) for name in metric.fields
    }
    return [canonical(given) == canonical(wanted) for given, wanted in pairs], per_field


def has(given: dict | None, name: str, wanted: dict) -> bool:
    """Has an answer this field, with the wanted value? True is not 1 here, as in JSON."""
    return given is not None and name in given and canonical(given[name]) == canonical(wanted[name])


def canonical(value: object) -> str:
    """One text for equal JSON values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True)
