"""Where the files of versions lie.

    contents/3f0c…/           the files of one content: a PEFT folder, named after the hash of what is in it
    adapters/support/v2       a link to it: a PEFT folder for whoever reads without us
    adapters/support/v2.md    its model card

Two versions of the same files share them. What is named after its hash cannot be half there without being seen, and
nobody who loads it needs the database. A content comes before the record that needs it, and goes after it; a link is
made after. So a kill leaves a record whose files are there, or files without a record, which nobody asks for.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from labkit.files.reading import open_regular, sha256
from labkit.files.writing import bring_to_disk, new_folder
from labkit.formats.peft_folder import CONFIG, WEIGHTS, link_or_copy

DATABASE, CONTENTS, ADAPTERS = "registry.sqlite", "contents", "adapters"
KEPT = (".json", ".safetensors", ".md", ".txt", ".jinja", ".model")  # an adapter, its card, its tokenizer


def check_free(root: Path) -> None:
    """Raise a `FileExistsError` if there is a registry in the folder `root`, or what is left of one."""
    database_file = root / DATABASE
    begun = database_file.is_file() and database_file.stat().st_size == 0  # by a process that was killed
    if (database_file.exists() and not begun) or (root / CONTENTS).exists() or (root / ADAPTERS).exists():
        raise FileExistsError(
            f"{root} holds a registry, or the files of one; it is left as it is. Give another folder, or put back a copy "
            f"of {DATABASE} if that was lost"
        )


class Changed(RuntimeError):
    """A folder changed while it was copied."""


def kept_files(folder: Path) -> list[str]:
    """The names of the files in `folder` that a version keeps, in order; no folders, no pickle files.

    Raises:
        FileNotFoundError: there is no folder, or no adapter in it.
    """
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no adapter in {folder} ({error}); give the folder that labkit or PEFT wrote"
        ) from None
    return [n for n in names if n.endswith(KEPT) and not n.startswith(".") and not (folder / n).is_dir()]


def left_out(folder: Path) -> list[str]:
    """The names of what lies in `folder` and is not kept: a checkpoint's optimizer, scripts, folders."""
    return sorted(set(os.listdir(folder)) - set(kept_files(folder)))


def hash_files(folder: Path) -> dict[str, str]:
    """The sha256 of each file that is kept, by its name.

    Raises:
        ValueError: one is no regular file.
        OSError: one cannot be read.
    """
    return {name: digest(folder / name) for name in kept_files(folder)}


def digest(path: Path) -> str:
    """The sha256 of a regular file."""
    with open_regular(path):  # a pipe would be read for ever
        return sha256(path)


def content_of(files: Mapping[str, str]) -> str:
    """The hash of a content: of the names and hashes of its files. It is the identity of an adapter's version."""
    lines = "".join(f"{digest} {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def place_of(root: Path, content: str) -> Path:
    return root / CONTENTS / content


def link_of(root: Path, name: str, number: int) -> Path:
    return root / ADAPTERS / name / f"v{number}"


def card_of(root: Path, name: str, number: int) -> Path:
    return root / ADAPTERS / name / f"v{number}.md"


def store(root: Path, folder: Path, files: Mapping[str, str]) -> Path:
    """Copy the `files` of `folder` to the place of their content, unless they are there.

    Raises:
        Changed: a file is not what it was when it was hashed.
        labkit.files.CannotWrite: no space, no permission.
    """
    place = place_of(root, content_of(files))
    if not wrong_with(place, files):
        return place
    with new_folder(place) as made:
        for name in files:
            with open_regular(folder / name) as source, (made / name).open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
        if wrong_with(made, files):
            raise Changed(f"{folder} changed while it was copied; publish it again when nobody writes there")
    if os.name == "posix":  # elsewhere what is read-only cannot be taken away
        with suppress(FileNotFoundError):  # another process has deleted it: who records it looks again
            for name in files:
                (place / name).chmod((place / name).stat().st_mode & ~0o222)
    return place


def wrong_with(place: Path, files: Mapping[str, str]) -> str:
    """What is wrong with the content in `place`, in words; "" if it is whole."""
    try:
        there = set(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    for name, expected in files.items():
        if name not in there:
            return f"lacks {name}"
        try:
            if digest(place / name) != expected:
                return f"has another {name} than was published"
        except (OSError, ValueError) as error:
            return f"has a {name} that cannot be read ({error})"
    return f"has {min(there - set(files))} too many" if there - set(files) else ""


def is_there(place: Path) -> bool:
    """Is there a content, as far as names tell? (`wrong_with` reads it.)"""
    return (place / WEIGHTS).is_file() and (place / CONFIG).is_file()


def discard(root: Path, content: str) -> None:
    """Take a content away; whoever looks sees all of it or nothing."""
    place = place_of(root, content)
    gone = place.parent / f".{content}.{uuid.uuid4().hex[:8]}.part"
    try:
        os.replace(place, gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def link(root: Path, name: str, number: int, content: str) -> None:
    """Make `adapters/NAME/vNUMBER`, unless something is there: a link to the content; where links are not permitted, a
    folder with the same files."""
    place = link_of(root, name, number)
    if os.path.lexists(place):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(Path("..", "..", CONTENTS, content), place, target_is_directory=True)
    except FileExistsError:
        return
    except OSError:
        with new_folder(place) as made:
            for file in place_of(root, content).iterdir():
                link_or_copy(file, made / file.name)
    bring_to_disk(place.parent)


def unlink(root: Path, name: str, number: int) -> None:
    """Take away what `link` made, and the card; the folder of a name that has nothing left too."""
    place = link_of(root, name, number)
    if place.is_symlink():
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    card_of(root, name, number).unlink(missing_ok=True)
    if place.parent.is_dir() and not any(place.parent.iterdir()):
        place.parent.rmdir()


def leads_to(root: Path, name: str, number: int, content: str, files: Mapping[str, str]) -> bool:
    """Does `adapters/NAME/vNUMBER` hold this content?"""
    place = link_of(root, name, number)
    if place.is_symlink():
        return os.path.realpath(place) == os.path.realpath(place_of(root, content))
    return not wrong_with(place, files)


def scratch_folders(root: Path) -> Iterator[tuple[Path, Path]]:
    """The scratch folders of writers, alive or killed, and the place that each is for (`labkit.files.writing`)."""
    for part in sorted(root.glob("**/.*.????????.part")):
        yield part, part.parent / part.name[1:].rsplit(".", 2)[0]
