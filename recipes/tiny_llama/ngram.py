"""Interpolated Kneser–Ney, the baseline that tiny-llama has to beat, on the same tokens.

An n-gram model of order k discounts the counts of k-grams a little, and gives the mass so freed to the model
of order k − 1:

    P_k(w | h) = (c(hw) − d(c(hw))) / c(h·)  +  γ(h) · P_{k−1}(w | h without its first word)
    γ(h) = Σ_w d(c(hw)) / c(h·)

At the highest order c is the plain count. Below it, c(hw) is the number of different words seen *before* hw.
P_0 is uniform, so every P_k sums to one over w. The discounts are the modified ones, for counts of 1, 2 and 3
or more (Chen and Goodman 1999, section 4.1.6).

A token of a vocabulary of at most 4,096 is 12 bits, so a 5-gram is an integer below 2^60: counting is
`np.unique`, looking up is `np.searchsorted`.
"""

from dataclasses import dataclass

import numpy as np

BITS = 12


@dataclass(frozen=True)
class Level:
    """The k-grams of one order: sorted keys, discounted counts, and for each context its total and its γ."""

    keys: np.ndarray  # (n_kgrams,) int64
    kept: np.ndarray  # (n_kgrams,) count minus discount
    contexts: np.ndarray  # (n_contexts,) int64
    total: np.ndarray  # (n_contexts,)
    gamma: np.ndarray  # (n_contexts,)


@dataclass(frozen=True)
class KneserNey:
    """A fitted model; `levels[k − 1]` is order k."""

    levels: list[Level]
    vocab: int

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """P(token | the order − 1 tokens before it) of every token (n,) but the first: (n − 1,) float64."""
        tokens = np.asarray(tokens, np.int64)
        p = np.full(len(tokens), 1 / self.vocab)
        for k, level in enumerate(self.levels, start=1):
            if len(tokens) < k:
                break
            grams = packed(tokens, k)
            place, known = find(level.contexts, grams >> BITS)
            at, seen = find(level.keys, grams)
            lower = p[k - 1 :]
            higher = np.where(seen, level.kept[at], 0.0) / level.total[place] + level.gamma[place] * lower
            p[k - 1 :] = np.where(known, higher, lower)
        return p[1:]


def packed(tokens: np.ndarray, k: int) -> np.ndarray:
    """The k-grams (n − k + 1,) of tokens (n,), each as one integer, the first token in the highest bits."""
    keys = np.zeros(len(tokens) - k + 1, np.int64)
    for i in range(k):
        keys = keys << BITS | tokens[i : len(tokens) - k + 1 + i]
    return keys


def find(sorted_keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted key is, and whether it is there at all."""
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return at, sorted_keys[at] == wanted


def discounts(counts: np.ndarray) -> np.ndarray:
    """Modified Kneser–Ney's discounts (4,) of a count of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):  # too little text to estimate them
        return np.array([0, 0.75, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    estimated = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(estimated, 0, [0, 1, 2, 3])


def fit(tokens: np.ndarray, order: int, vocab: int, discount: float | None = None) -> KneserNey:
    """Count and discount.

    Args:
        tokens: (n,) token ids below `vocab`.
        order: length of the longest k-grams, at most 5.
        vocab: at most 4,096.
        discount: one discount for every count and order; default: estimated, see `discounts`.

    Raises:
        ValueError: an order or a vocabulary that does not fit in 63 bits, or fewer tokens than `order`.
    """
    if not 1 <= order <= 5 or not 1 <= vocab <= 1 << BITS or len(tokens) < order:
        raise ValueError(
            f"order={order}, vocab={vocab}, {len(tokens)} tokens: order can be 1 to 5, vocab up to 4096, and "
            "there must be at least `order` tokens"
        )
    keys, counts = np.unique(packed(np.asarray(tokens, np.int64), order), return_counts=True)
    levels = []
    for k in range(order, 0, -1):
        table = discounts(counts) if discount is None else np.array([0, discount, discount, discount])
        taken = table[np.minimum(counts, 3)]
        contexts, start = np.unique(keys >> BITS, return_index=True)
        total = np.add.reduceat(counts, start).astype(float)
        gamma = np.add.reduceat(taken, start) / total
        levels.append(Level(keys, counts - taken, contexts, total, gamma))
        # continuation counts: how many different words precede each (k − 1)-gram
        keys, counts = np.unique(keys & ((1 << BITS * (k - 1)) - 1), return_counts=True)
    return KneserNey(levels[::-1], vocab)
