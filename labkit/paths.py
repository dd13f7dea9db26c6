"""Where things are on disk: the data of the course, and the models that are fetched once and kept.

Two environment variables say otherwise. A `~` in them is the home folder, also where no shell has expanded it (a
notebook's kernel, a settings file). A relative path is taken from the checkout, so that a notebook, a test and a
command mean the same folder wherever they were started.
"""

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def person_folder() -> Path:
    """Where the progress of those who use this account is kept: the user's data folder for labkit.

    Raises:
        ValueError: there is no home folder to put it in.
    """
    try:
        import platformdirs

        folder = platformdirs.user_data_dir("labkit")
    except ImportError:
        folder = os.path.join(os.environ.get("XDG_DATA_HOME") or "~/.local/share", "labkit")
    return absolute("XDG_DATA_HOME", folder)


def user_cache_dir(name: str) -> str:
    """The user's cache folder for `name`, where the system has it; without platformdirs, where Linux has it."""
    try:
        import platformdirs
    except ImportError:
        return os.path.join(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), name)
    return platformdirs.user_cache_dir(name)


def cache_folder() -> Path:
    """Where fetched models are kept: LABKIT_CACHE, or the user's cache folder for labkit.

    Raises:
        ValueError: there is no home folder to put it in.
    """
    return absolute("LABKIT_CACHE", os.environ.get("LABKIT_CACHE") or user_cache_dir("labkit"))


def data_folder() -> Path:
    """Where the data of the course is: LABKIT_DATA, or the folder `data/` of the checkout.

    Raises:
        ValueError: LABKIT_DATA begins with `~`, and there is no such home folder.
    """
    return absolute("LABKIT_DATA", os.environ.get("LABKIT_DATA") or "data")


def absolute(variable: str, path: str) -> Path:
    """`path` with variables and `~` expanded; if it is relative, in the checkout."""
    try:
        return CHECKOUT / Path(os.path.expandvars(path)).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path} is in a home folder that this system does not know; set {variable} to an absolute path"
        ) from None
