"""How alike two texts are, by the runs of words that they share, for thousands of texts at once.

A text is the set A of its *shingles*, runs of three words. Two texts are compared by

    resemblance |A ∩ B| / |A ∪ B|        containment |A ∩ B| / |A|, how much of A is in B

(Broder 1997, "On the resemblance and containment of documents"). An inverted index, shingle -> texts that have it,
gives |A ∩ B| with every B at once, by counting. Shingles that a tenth of the texts have are left out: they are the
instruction that stands before every question, and make everything alike.
"""

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from labkit.data.chats import messages_of
from labkit.data.encoding import check_texts

LENGTH = 3  # words in a shingle
MAX_WORDS = 5000  # of a text, that are compared
ALIKE = 0.5  # resemblance, from which two texts are near copies
INSIDE = 0.8  # containment, from which one is taken to be in the other …
AT_LEAST = 8  # … if it has so many shingles that this is no accident
# a letter of a script without spaces, a word, or a sign: "17 + 25" is another question than "17 - 25"
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and signs of a text, without regard to case."""
    return [match[0] for match, _ in zip(WORD.finditer(text.casefold()), range(MAX_WORDS))]


def shingles_of(text: str) -> np.ndarray:
    """The set of shingles of a text, as sorted 32-bit hashes; a text of fewer words is one shingle."""
    words = words_of(text)
    runs = [" ".join(words[i : i + LENGTH]) for i in range(max(1, len(words) - LENGTH + 1))] if words else []
    hashes = [zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs]
    return np.unique(np.array(hashes, dtype=np.uint32))


def often(n: int) -> int:
    """Of `n` records, how many may share something before it says nothing about any of them."""
    return max(10, n // 10)


class ShingleIndex:
    """Texts by their shingles.

    Attributes:
        sizes: (n_texts,) shingles of each text, without the common ones.
    """

    def __init__(self, texts: Sequence[str]):
        sets = [shingles_of(text) for text in texts]
        empty = np.zeros(0, dtype=np.uint32)
        values, counts = np.unique(np.concatenate([empty, *sets]), return_counts=True)
        self.common = values[counts > often(len(texts))]
        self.sets = [self.without_common(one) for one in sets]
        self.sizes = np.array([len(one) for one in self.sets], dtype=np.int64)
        joined = np.concatenate([empty, *self.sets])
        order = np.argsort(joined, kind="stable")
        self.values = joined[order]  # (n_pairs,) shingles in order …
        self.owners = np.repeat(np.arange(len(texts)), self.sizes)[order]  # … and whose they are

    def without_common(self, shingles: np.ndarray) -> np.ndarray:
        return shingles[~np.isin(shingles, self.common, assume_unique=True)]

    def alike(self, shingles: np.ndarray, threshold: float = ALIKE) -> tuple[np.ndarray, np.ndarray]:
        """The texts that are near copies of one with these shingles, or hold it.

        Returns:
            their indices in order, and how alike they are: (n_found,) in [threshold, 1].
        """
        starts, ends = np.searchsorted(self.values, shingles), np.searchsorted(self.values, shingles, "right")
        owners = [self.owners[a:b] for a, b in zip(starts, ends) if a < b]
        if not owners:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        found, shared = np.unique(np.concatenate(owners), return_counts=True)
        score = shared / (self.sizes[found] + len(shingles) - shared)
        inside = shared / len(shingles)
        if len(shingles) >= AT_LEAST:
            score = np.where(inside >= max(INSIDE, threshold), np.maximum(score, inside), score)
        near = score >= threshold
        return found[near], score[near]


def asked_and_answered(record: Mapping) -> tuple[str, str]:
    """A record as two texts: what is asked (of a chat, without the system message), and the answer.

    Raises:
        ValueError: it is neither a chat nor a prompt with a completion.
    """
    if "messages" not in record:
        check_texts(record)
        return record["prompt"], record["completion"]
    texts = [str(m.get("content") or "") for m in messages_of(record) if m["role"] != "system"] or [""]
    return "\n".join(texts[:-1]), texts[-1]


def folded(text: str) -> str:
    """A text without regard to case and to the space between words: what must be equal for an exact copy."""
    return " ".join(text.casefold().split())
