"""A PEFT folder: its files are written whole or not at all, read with suspicion, and compared with a model.

    adapter_config.json          what the adapter is: see `labkit.formats.peft_config` for the LoRA family
    adapter_model.safetensors    its tensors
    labkit.json                  ours, which PEFT ignores: see `labkit.formats.provenance`

Loading never guesses: a tensor too many, one too few, one of another shape, of whole numbers or with NaN in it is
an error that names it. That is how other loaders come to act as the identity, with an adapter of which no key
matched.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from labkit.files import reading, writing
from labkit.formats.peft_settings import MAX_CONFIG
from labkit.formats.provenance import PROVENANCE
from labkit.lora.fingerprint import AdapterMismatch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OURS = (WEIGHTS, CONFIG, PROVENANCE)
PREFIX = "base_model.model."  # of the names of modules in a folder
NAMED_PROBLEMS = 3  # of a folder that does not fit; the others are counted
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Expected(NamedTuple):
    """What a model takes for one tensor of a folder: its shape, and the dtype that it will have here."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_folder(path: Path, tensors: dict[str, Tensor], config: dict, provenance: dict) -> Path:
    """Write a PEFT folder with a `labkit.json`. An old adapter at `path` is replaced whole or not at all, and
    whatever else lies in that folder (a tokenizer, notes, a checkpoint) stays.

    Raises:
        ValueError: a tensor holds NaN or infinity, or `path` is not for an adapter; nothing is written then.
        NotADirectoryError: there is a file at `path`.
        labkit.files.CannotWrite: no space, no permission; the old adapter is intact.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{broken[0]} and {len(broken) - 1} more tensors hold NaN or infinity; nothing was saved"
        )
    check_place(path)
    with writing.new_folder(path, take_along=link_others) as made:
        save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})
        (made / CONFIG).write_text(json.dumps(config, indent=2))
        (made / PROVENANCE).write_text(json.dumps(provenance, indent=2))
    return path


def check_place(path: Path) -> None:
    """Raise unless an adapter may be saved in the folder `path`: what would be replaced there must be an adapter's.

    Raises:
        ValueError: the folder that the process is in, which would be gone under its feet; a `labkit.json` of
            something else, such as a fetched model; a folder that has the name of a file of an adapter.
        NotADirectoryError: a file.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; an adapter is saved as a folder, so give another name")
    refuse_folder_of_process(path, "the adapter")
    for name in OURS:
        if (path / name).is_dir():
            raise ValueError(f"{path / name} is a folder, which is not of an adapter; give another name")
    try:
        recorded = reading.read_json(path / PROVENANCE, MAX_CONFIG)
    except (OSError, ValueError):
        return  # none, or a damaged one
    if not isinstance(recorded, dict) or "base" not in recorded:
        raise ValueError(f"{path / PROVENANCE} is not of an adapter; give the adapter a folder of its own")


def refuse_folder_of_process(path: Path, what: str = "the model") -> None:
    """Raise a `ValueError` if `path` is the folder that the process is in, or around it: it would be gone under its feet."""
    if Path(os.path.realpath(path)) in (here := Path.cwd(), *here.parents):
        raise ValueError(
            f"{path} is the folder that you are in, or around it; give {what} a folder of its own"
        )


def link_others(old: Path, new: Path) -> None:
    """Give the folder `new` what lies in `old`, is not part of an adapter, and is not there yet: the same files, not
    copies."""
    for entry in old.iterdir():
        if entry.name in OURS or os.path.lexists(new / entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(entry, new / entry.name)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Another name for a file; a copy where the file system knows no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def read_folder(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder of any kind.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is a pickle file, or damaged.
    """
    try:
        if not path.exists():  # a writer that was killed may have moved it out of the way
            writing.clear_leftovers(Path(os.path.realpath(path)))
        names = set(os.listdir(path))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no adapter in {path} ({error}); give the folder that labkit or PEFT wrote"
        ) from None
    if WEIGHTS not in names:
        if "adapter_model.bin" in names:
            raise ValueError(
                f"{path} holds adapter_model.bin, a pickle file, which can run any code when it is loaded. "
                "Save the adapter again with safe_serialization=True, PEFT's default for years, and load "
                "that"
            )
        raise FileNotFoundError(f"there is no {WEIGHTS} in {path}; give the folder that labkit or PEFT wrote")
    try:
        raw = reading.read_json(path / CONFIG, MAX_CONFIG)
        if not isinstance(raw, dict) or not isinstance(raw.get("peft_type"), str):
            raise ValueError(f"{CONFIG} does not say the peft_type")
        tensors = reading.read_tensors(path / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the adapter in {path} is damaged or incomplete ({error}); save or copy it again"
        ) from None
    return raw, tensors


def check_tensors(
    expected: Mapping[str, Expected],
    tensors: Mapping[str, Tensor],
    path: Path,
    left_over: Callable[[str], str | None],
    problems: Iterable[str] = (),
) -> None:
    """Raise an `AdapterMismatch` that names every tensor that is missing, does not fit, or is left over.

    Args:
        expected: what the model takes, by name.
        tensors: what the folder holds.
        path: of the folder, for the message.
        left_over: what to say of a tensor that is not expected, by its name; None if it does no harm.
        problems: what else is known not to fit.
    """
    problems = list(problems)
    for key, wanted in expected.items():
        if key not in tensors:
            problems.append(f"{key} is missing")
        elif (wrong := misfit(tensors[key], wanted)) is not None:
            problems.append(f"{key} {wrong}")
    problems += [text for key in sorted(set(tensors) - set(expected)) if (text := left_over(key))]
    if problems:
        raise does_not_fit(path, problems)


def misfit(tensor: Tensor, wanted: Expected) -> str | None:
    """What is wrong with a tensor of a folder, in words that follow its name; None if nothing is."""
    if tuple(tensor.shape) != wanted.shape:
        return f"has shape {tuple(tensor.shape)}, not {wanted.shape}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not wanted.dtype.is_floating_point:
        return None if tensor.dtype == wanted.dtype else f"is of {dtype}, not {wanted.dtype}"
    if tensor.dtype not in FLOATS:
        return f"is of {dtype}; weights are in {', '.join(str(d).removeprefix('torch.') for d in FLOATS)}"
    if not torch.isfinite(tensor.to(wanted.dtype)).all():
        return f"holds NaN, infinity, or what is too large for {wanted.dtype}"
    return None


def does_not_fit(path: Path, problems: Sequence[str]) -> AdapterMismatch:
    """The error that names the first few `problems`."""
    others = len(problems) - NAMED_PROBLEMS
    more = f" (and {others} more)" if others > 0 else ""
    return AdapterMismatch(
        f"the adapter in {path} does not fit: {'; '.join(problems[:NAMED_PROBLEMS])}{more}"
    )
