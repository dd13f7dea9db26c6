"""A task with one right answer: which part of the standard library does this docstring come from?"""

from labkit.data.passages import DOCUMENT_START
from labkit.data.splits import rows

PACKAGES = {  # label: part of Python's standard library
    "A": "asyncio",
    "B": "xml",
    "C": "multiprocessing and concurrent.futures",
    "D": "testing and debugging",
    "E": "mail, news and file transfer",
    "F": "http and the web",
    "G": "files and archives",
    "H": "numbers",
}


def load_docstrings(split: str) -> list[dict]:
    """Docstrings of the standard library and where each comes from: `{"prompt", "completion", "module"}`.

    The completion is a letter, a key of `PACKAGES`; see data/docstrings/README.md. No module is in two
    splits.

    Args:
        split: "train", "validation" or "test"; each has equally many of each class, in a fixed random order.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: the data folder is missing.
    """
    return [
        {
            "prompt": f"{DOCUMENT_START}{row['text']}\nPackage: ",
            "completion": row["label"],
            "module": row["module"],
        }
        for row in rows("docstrings", split)
    ]
