"""A task with one right answer: which part of Python's library is this docstring from? See data/docstrings/README.md."""

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
    """Docstrings of Python's library and the part that each is from: `{"prompt", "completion", "module"}`.

    The completion is a letter, a key of `PACKAGES`; see data/docstrings/README.md. No module is in two splits.

    Args:
        split: "train", "validation" or "test"; as many of each class. The order is random and fixed.

    Raises:
        ValueError: another split.
        FileNotFoundError: the data folder is not there.
    """
    return [
        {
            "prompt": f"{DOCUMENT_START}{row['text']}\nPackage: ",
            "completion": row["label"],
            "module": row["module"],
        }
        for row in rows("docstrings", split)
    ]
