"""How two texts are compared: by the runs of words that they share."""

import re


def words(text, n):
    found = re.findall(r"\w+", text.lower())
    return set(zip(*(found[i:] for i in range(n)), strict=False))
