"""What can be had without training a language model: the strongest simple answers, and a loss to compare with.

A result says little by itself. Beside it belong
    majority    always the commonest answer of the training records
    nearest     the answer of the training record that shares the most, and the rarest, words
    solved      the base model, shown a few solved training records before each prompt
    n-grams     for the loss: each token of an answer predicted from the two before it, as often as training showed it

N-grams are smoothed as Witten & Bell (1991) do: with T different tokens seen after a context, and c of them in all,

    p(t | context) = (c(t) + T p(t | shorter context)) / (c + T),      p(t) = 1 / vocabulary at the end
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from labkit.data.encoding import Encoded
from labkit.data.own.shingles import asked_and_answered

CONTEXT = 2  # tokens


def majority_answers(train: Sequence[Mapping], held_out: Sequence[Mapping]) -> list[str]:
    """For every held-out record the commonest answer of `train`; of several, the first."""
    answers = Counter(asked_and_answered(record)[1] for record in train)
    return [answers.most_common(1)[0][0]] * len(held_out)


def nearest_answers(train: Sequence[Mapping], held_out: Sequence[Mapping]) -> list[str]:
    """For every held-out record the answer of the training record whose words are nearest.

    Near is a large share of common words among all words of the two, each weighted by its rarity: a word that is in
    k of n training records weighs log((n + 1) / (k + 1)) + 1.
    """
    known = [(words(asked), answer) for asked, answer in map(asked_and_answered, train)]
    seen = Counter(word for found, _ in known for word in found)

    def weight(found: set[str]) -> float:
        return sum(math.log((len(known) + 1) / (seen[word] + 1)) + 1 for word in found)

    answers = []
    for record in held_out:
        mine = words(asked_and_answered(record)[0])
        shares = [weight(mine & found) / max(weight(mine | found), 1e-9) for found, _ in known]
        answers.append(known[max(range(len(known)), key=shares.__getitem__)][1])
    return answers


def words(text: str) -> set[str]:
    """The different words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def with_solved(record: Mapping, solved: Sequence[Mapping]) -> dict:
    """`record` with solved ones before it: turns of a chat, or text before the prompt.

    Args:
        record: to be answered.
        solved: records of the same form. Of chats, system messages are left out.
    """
    if "messages" in record:
        *before, last = record["messages"]
        system = [message for message in before if message["role"] == "system"]
        turns = [m for one in solved for m in one["messages"] if m["role"] != "system"]
        return {**record, "messages": [*system, *turns, *before[len(system) :], last]}
    shown = "".join(f"{one['prompt']}{one['completion']}\n\n" for one in solved)
    return {**record, "prompt": shown + record["prompt"]}


def ngram_losses(train: Sequence[Encoded], held_out: Sequence[Encoded], vocabulary: int) -> list[float]:
    """The loss of each held-out completion under the n-grams of the completions in `train`, in nats, summed.

    Args:
        train: encoded records (`labkit.data.encoding.encode_all`).
        held_out: likewise. Only completions count, for the loss as for the counts; a record without a prompt has no
            loss for its first token, as in training.
        vocabulary: how many tokens there are.
    """
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for one in train:
        for context, token in contexts(one):
            for n in range(len(context) + 1):
                counts[context[n:]][token] += 1

    def probability(token: int, context: tuple[int, ...]) -> float:
        shorter = probability(token, context[1:]) if context else 1 / vocabulary
        seen = counts.get(context)
        if not seen:
            return shorter
        return (seen[token] + len(seen) * shorter) / (seen.total() + len(seen))

    return [
        sum(-math.log(probability(token, context)) for context, token in contexts(one)) for one in held_out
    ]


def contexts(example: Encoded) -> list[tuple[tuple[int, ...], int]]:
    """Of each supervised token, the tokens of the completion just before it, and the token."""
    ids = example.completion
    return [
        (tuple(ids[max(0, i - CONTEXT) : i]), ids[i])
        for i in range(len(ids) - example.n_supervised, len(ids))
    ]
