"""Random facts to remember: how many bits fit into an adapter?

A fact states the number of an invented name. The number has d digits drawn uniformly, so only memory helps,
and it holds d log2(10) bits. `labkit.training.metrics.bits_learned` measures how many of them a model has
learned.

Source: Allen-Zhu & Li, "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws" (2024,
arXiv:2404.05405), who find about 2 bits per parameter in pretrained models. Their count includes the names
and ours does not: here the prompt gives the name.
"""

import random

from labkit.checks import check_whole, is_whole
from labkit.data.passages import DOCUMENT_START

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"  # 80 syllables, 512,000 names of three
MAX_FACTS = 250_000


def make_facts(n: int, seed: int = 0, digits: int = 4) -> list[dict]:
    """Random facts: `{"prompt": "<|endoftext|>The number of Bakilo is ", "completion": "0471"}`.

    Names are invented, distinct, and the same for every `digits`; numbers may begin with zeros. For one seed,
    the facts for a smaller n are the first of those for a larger n.

    Raises:
        ValueError: n or digits is not a whole number of at least 1, or n is close to the number of possible
            names.
    """
    if not is_whole(n) or n > MAX_FACTS:
        raise ValueError(f"n={n!r} must be a whole number from 1 to {MAX_FACTS:,}")
    check_whole("digits", digits)
    draw_name, draw_digit = random.Random(f"names {seed}"), random.Random(f"digits {seed} {digits}")
    names: dict[str, None] = {}  # a set that keeps its order
    while len(names) < n:
        syllables = (draw_name.choice(CONSONANTS) + draw_name.choice(VOWELS) for _ in range(3))
        names["".join(syllables).capitalize()] = None
    return [
        {
            "prompt": f"{DOCUMENT_START}The number of {name} is ",
            "completion": "".join(draw_digit.choice("0123456789") for _ in range(digits)),
        }
        for name in names
    ]
