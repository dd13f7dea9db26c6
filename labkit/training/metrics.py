"""What a trained model gets right: JSON answers, labels, and bits of random facts.

*Exact match* is strict on purpose: one wrong field makes a wrong answer.

*Bits learned.* A model that gives the digits of n facts the probabilities p has learned

    bits = n d log2(10) - sum over facts and digits of -log2 p(digit | name, digits before it),

the length by which the model shortens a message that states the digits. Source: Allen-Zhu & Li 2024
(arXiv:2404.05405); see `labkit.data.facts`.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from labkit.data.batches import collate
from labkit.data.docstrings import PACKAGES
from labkit.data.encoding import encode
from labkit.files.reading import unique_keys
from labkit.training.evaluate import check_measurable, loss_of_examples
from labkit.training.limits import padding_id
from labkit.training.readiness import own_modes


def bits_learned(model: nn.Module, tokenizer, facts: Sequence[dict], batch_size: int = 64) -> float:
    """Bits that a model knows of the numbers in `facts`; see the module docstring for the equation.

    Only digits count, not the end-of-text token after them. A model that knows nothing has 0 bits; one that
    bets on wrong digits would have fewer, and is given 0.

    Returns:
        0 to n * digits * log2(10).

    Raises:
        ValueError: no facts, a completion that is not digits, or a tokenizer that merges digits.
    """
    if not facts:
        raise ValueError("there are no facts to measure; make some with make_facts(n)")
    examples, n_digits = [], 0
    for fact in facts:
        answer = fact["completion"]
        if not re.fullmatch("[0-9]+", answer):
            raise ValueError(f"the completion of a fact must be digits, not {answer!r}")
        one = encode(fact, tokenizer).without_end()
        if [tokenizer.decode([i]) for i in one.completion] != list(answer):
            pieces = [tokenizer.decode([i]) for i in one.completion]
            raise ValueError(
                f"bits are counted digit by digit, but this tokenizer cuts {answer!r} into {pieces}; use a "
                "model whose tokenizer makes a token of every digit, such as tiny-llama"
            )
        examples.append(one)
        n_digits += len(one.completion)
    check_measurable(model, examples)
    mean, tokens = loss_of_examples(model, examples, padding_id(tokenizer, model), batch_size)
    return max(0.0, n_digits * math.log2(10) - mean * tokens / math.log(2))


@torch.no_grad()
def classification_accuracy(
    model: nn.Module,
    tokenizer,
    records: Sequence[dict],
    labels: Sequence[str] = tuple(PACKAGES),
    batch_size: int = 16,
) -> float:
    """Share of records whose completion is the label with the highest logit after the prompt.

    Only the labels compete: a model that would rather go on with another word is asked for its best label all
        the same.

    Raises:
        ValueError: no records, a completion that is not among `labels`, or labels that are not distinct
            single tokens.
    """
    unknown = {record["completion"] for record in records} - set(labels)
    if unknown or not records:
        raise ValueError(
            f"there must be records, and every completion one of {tuple(labels)}; got {sorted(unknown)}"
        )
    tokens = [
        encode({**records[0], "completion": label}, tokenizer).without_end().completion for label in labels
    ]
    if any(len(ids) != 1 for ids in tokens) or len({ids[0] for ids in tokens}) < len(labels):
        raise ValueError(f"labels must be distinct single tokens; {dict(zip(labels, tokens))} are not")
    ids = torch.tensor([token for (token,) in tokens])  # (n_labels,)
    examples = [encode(record, tokenizer).without_end() for record in records]
    gold = [list(labels).index(record["completion"]) for record in records]
    for i, (one, label) in enumerate(zip(examples, gold)):
        if one.completion != tokens[label]:
            raise ValueError(
                f"labels must be the same tokens behind every prompt; {labels[label]!r} is {tokens[label]} in record 0 "
                f"and {one.completion} in record {i}; end all prompts alike"
            )
    check_measurable(model, examples)
    order = sorted(range(len(records)), key=lambda i: len(examples[i]))
    device, pad_id, right = next(model.parameters()).device, padding_id(tokenizer, model), 0
    with own_modes(model):
        model.eval()
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([examples[i] for i in chosen], pad_id)
            # the position that predicts the label
            last = torch.tensor([len(examples[i].prompt) - 1 for i in chosen])
            logits = model(input_ids=batch.ids.to(device), use_cache=False).logits  # (batch, time, vocab)
            scores = logits[torch.arange(len(chosen)), last].cpu()[:, ids]  # (batch, n_labels)
            right += (scores.argmax(dim=1) == torch.tensor([gold[i] for i in chosen])).sum().item()
    return right / len(records)


def parse_json(text: str) -> dict | None:
    """The JSON object in `text`, or None. Nothing is repaired: an answer that needs repair is a wrong one, and so is
    one that has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Score:
    """Exact match of JSON answers: `exact` of `n` right in all fields, the share per field, and which were
    wrong.
    """

    exact: int
    n: int
    per_field: dict[str, float]
    valid_json: int
    wrong: list[int]

    @property
    def exact_match(self) -> float:
        return self.exact / self.n

    def __str__(self) -> str:
        fields = ", ".join(f"{name} {share:.0%}" for name, share in self.per_field.items())
        return (
            f"exact match {self.exact}/{self.n} = {self.exact_match:.0%} "
            f"(valid JSON {self.valid_json}/{self.n}; {fields})"
        )


def score_json(answers: Sequence[str], gold: Sequence[dict]) -> Score:
    """Compare JSON answers with the objects they should be.

    Raises:
        ValueError: no answers, or not as many as gold objects.
    """
    if not answers or len(answers) != len(gold):
        raise ValueError(
            f"{len(answers)} answers for {len(gold)} gold objects; give one answer for each, at least one"
        )
    parsed = [parse_json(answer) for answer in answers]
    # True == 1 in Python: compare as JSON text, where they differ
    same = [
        p is not None and json.dumps(p, sort_keys=True) == json.dumps(g, sort_keys=True)
        for p, g in zip(parsed, gold)
    ]
    per_field = {
        name: sum((p or {}).get(name, ...) == g[name] for p, g in zip(parsed, gold)) / len(gold)
        for name in gold[0]
    }
    wrong = [i for i, ok in enumerate(same) if not ok]
    return Score(sum(same), len(gold), per_field, sum(p is not None for p in parsed), wrong)
