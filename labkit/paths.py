"""Where things are on disk: the data of the course, and the models that are fetched once and kept."""

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_folder() -> Path:
    """Where fetched models are kept: LABKIT_CACHE, or the user's cache folder for labkit."""
    return Path(os.environ.get("LABKIT_CACHE") or user_cache_dir("labkit"))


def data_folder() -> Path:
    """Where the data of the course is: LABKIT_DATA, or the folder `data/` of the checkout."""
    return Path(os.environ.get("LABKIT_DATA") or Path(__file__).resolve().parent.parent / "data")
