"""Kneser–Ney: probabilities that sum to one, and the closed form."""

import numpy as np
import pytest

from recipes.tiny_llama import ngram


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_sums_to_one_after_seen_and_unseen_contexts(order):
    train = np.random.default_rng(1).zipf(1.5, 4000) % 50
    model = ngram.fit(train, order, vocab=64)
    for context in ([7, 1, 2, 1], list(train[100:104]), [63, 62, 61, 60], [1]):
        last = [model.probabilities(np.array([*context, w]))[-1] for w in range(64)]
        assert sum(last) == pytest.approx(1, abs=1e-12)


def test_kneser_ney_bigram_equals_the_closed_form():
    # "a b a c a b", D = 0.5, V = 4. Bigrams: ab 2, ba 1, ac 1, ca 1. Continuation counts: a 2 (b, c), b 1, c
    # 1; all: 4.
    a, b, c, d = range(4)
    model = ngram.fit(np.array([a, b, a, c, a, b]), order=2, vocab=4, discount=0.5)

    def lower(n):  # 3 words discounted by a half; d was never seen
        return max(n - 0.5, 0) / 4 + 3 * 0.5 / 4 / 4

    expected = {
        (a, b): (2 - 0.5) / 3 + 2 * 0.5 / 3 * lower(1),
        (a, c): (1 - 0.5) / 3 + 2 * 0.5 / 3 * lower(1),
        (a, a): 2 * 0.5 / 3 * lower(2),
        (a, d): 2 * 0.5 / 3 * lower(0),
        (b, a): (1 - 0.5) / 1 + 0.5 * lower(2),
        (d, a): lower(2),  # a context that was never seen
    }
    for (first, second), p in expected.items():
        assert model.probabilities(np.array([first, second]))[0] == pytest.approx(p, rel=1e-12)


def test_kneser_ney_trigram_equals_a_recursion_over_strings():
    train = np.random.default_rng(2).integers(5, size=300)
    model = ngram.fit(train, order=3, vocab=5, discount=0.75)
    text = "".join(map(str, train))

    def count(gram: str, order: int) -> int:
        seen = [text[i : i + order] for i in range(len(text) - order + 1)]
        if order == 3:
            return seen.count(gram)
        longer = {text[i : i + len(gram) + 1] for i in range(len(text) - len(gram))}
        return sum(one.endswith(gram) for one in longer)

    def p(word: str, history: str) -> float:
        lower = p(word, history[1:]) if history else 1 / 5
        counts = [count(history + w, len(history) + 1) for w in "01234"]
        if not sum(counts):
            return lower
        return (
            max(counts[int(word)] - 0.75, 0) / sum(counts)
            + 0.75 * sum(n > 0 for n in counts) / sum(counts) * lower
        )

    probe = np.array([0, 1, 2, 3, 4, 4, 1, 0, 0, 3])
    expected = [p(str(probe[1]), str(probe[0]))]
    expected += [p(str(probe[i]), f"{probe[i - 2]}{probe[i - 1]}") for i in range(2, len(probe))]
    assert model.probabilities(probe) == pytest.approx(expected, rel=1e-12)


def test_kneser_ney_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="order can be 1 to 5"):
        ngram.fit(np.arange(10), order=6, vocab=16)
