"""A PEFT folder: its files are written whole or not at all, read with suspicion, and compared with a model.

    adapter_config.json          what the adapter is: see `labkit.formats.peft_config` for the LoRA family
    adapter_model.safetensors    its tensors
    labkit.json                  ours, which PEFT ignores: see `labkit.formats.provenance`

Loading never guesses: a tensor too many, one too few, or one of another shape is an error that names it. That
is how other loaders come to act as the identity, with an adapter of which no key matched.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from labkit.formats.provenance import PROVENANCE
from labkit.lora.fingerprint import AdapterMismatch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OURS = (WEIGHTS, CONFIG, PROVENANCE)
PREFIX = "base_model.model."  # of the names of modules in a folder
NAMED_PROBLEMS = 3  # of a folder that does not fit; the others are counted


def write_folder(path: Path, tensors: dict[str, Tensor], config: dict, provenance: dict) -> Path:
    """Write a PEFT folder with a `labkit.json`. An old adapter at `path` is replaced whole or not at all, and
    whatever else lies in that folder (a tokenizer, notes, a checkpoint) stays.

    Raises:
        ValueError: a tensor holds NaN or infinity; nothing is written then.
        NotADirectoryError: there is a file at `path`.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{broken[0]} and {len(broken) - 1} more tensors hold NaN or infinity; nothing was saved"
        )
    place = path.resolve()  # where a link leads to
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"{path} is a file; an adapter is saved as a folder, so give another name")
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.parent / f".{place.name}-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()  # not tempfile's, which nobody else on the machine could read
    try:
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2))
        (scratch / PROVENANCE).write_text(json.dumps(provenance, indent=2))
        # safetensors lets only the owner read; whoever may read the other two may read this one
        (scratch / WEIGHTS).chmod((scratch / CONFIG).stat().st_mode)
        if not place.exists() or any((place / name).exists() for name in OURS):
            link_others(place, scratch)
            replace_folder(scratch, place)
        else:  # somebody's folder, without an adapter to replace: leave it where it is
            for name in OURS:
                os.replace(scratch / name, place / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def link_others(path: Path, scratch: Path) -> None:
    """Give `scratch` what lies in the folder `path` and is not part of an adapter: the same files, not copies."""
    for entry in path.iterdir() if path.exists() else ():
        if entry.name in OURS:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, scratch / entry.name, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(entry, scratch / entry.name)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Another name for a file; a copy where the file system knows no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def replace_folder(new: Path, path: Path) -> None:
    """Move the folder `new` to `path`; what was there before goes only once `new` is in its place."""
    old = new.with_name(new.name + "-old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_folder(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder of any kind.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is a pickle file, or damaged.
    """
    if not (path / WEIGHTS).exists():
        if (path / "adapter_model.bin").exists():
            raise ValueError(
                f"{path} holds adapter_model.bin, a pickle file, which can run any code when it is loaded. "
                "Save the adapter again with safe_serialization=True, PEFT's default for years, and load "
                "that"
            )
        raise FileNotFoundError(f"there is no {WEIGHTS} in {path}; give the folder that labkit or PEFT wrote")
    try:
        raw = json.loads((path / CONFIG).read_text())
        tensors = load_file(path / WEIGHTS)
        raw["peft_type"]
    except (OSError, ValueError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"the adapter in {path} is damaged or incomplete ({error!r}); save or copy it again"
        ) from None
    return raw, tensors


def refuse_settings(path: Path, raw: Mapping, keys: Iterable[str], instead: str = "") -> None:
    """Raise a `ValueError` that names the settings `keys` of a configuration, unless there are none.

    Args:
        path: of the folder, for the message.
        raw: the configuration.
        keys: settings that would change what the model computes, and that the loader does not implement.
        instead: what to say after that.
    """
    what = ", ".join(f"{key}={raw.get(key)!r}" for key in keys)
    if what:
        raise ValueError(f"the adapter in {path} has {what}, which this loader does not know{instead}")


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    path: Path,
    left_over: Callable[[str], str | None],
    problems: Iterable[str] = (),
) -> None:
    """Raise an `AdapterMismatch` that names every tensor that is missing, of another shape, or left over.

    Args:
        expected: names and shapes of what the model takes.
        tensors: what the folder holds.
        path: of the folder, for the message.
        left_over: what to say of a tensor that is not expected, by its name; None if it does no harm.
        problems: what else is known not to fit.
    """
    problems = list(problems)
    for key, shape in expected.items():
        if key not in tensors:
            problems.append(f"{key} is missing")
        elif tuple(tensors[key].shape) != shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, not {shape}")
    problems += [text for key in sorted(set(tensors) - set(expected)) if (text := left_over(key))]
    if problems:
        raise does_not_fit(path, problems)


def does_not_fit(path: Path, problems: Sequence[str]) -> AdapterMismatch:
    """The error that names the first few `problems`."""
    others = len(problems) - NAMED_PROBLEMS
    more = f" (and {others} more)" if others > 0 else ""
    return AdapterMismatch(
        f"the adapter in {path} does not fit: {'; '.join(problems[:NAMED_PROBLEMS])}{more}"
    )
