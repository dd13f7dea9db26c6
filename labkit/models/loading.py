"""Base models by name, from a local folder, or from the hub; the named ones work offline once fetched.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0), which `labkit.models.fetching` gets. Its linear weights
had been quantized to Q4_1 in the published file, so do not judge quantizers by it.

`tiny-llama` (4.0 M parameters, never quantized) was pretrained for this course and is in `data/tiny-llama`.

transformers fills what a file lacks with random numbers, passes over what it has no place for, and says so in its
log only. Here both are errors: a model is loaded whole, with nothing left, or not at all (`labkit.models.folders`
says why).
"""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.checks import check_choice, nearest
from labkit.files.reading import read_json
from labkit.hardware import best_device, compute_dtype
from labkit.models.fetching import SOURCES, ModelUnavailable, differing, fetch
from labkit.models.folders import check_files, check_loaded
from labkit.models.hub import is_reachable
from labkit.paths import data_folder

SHIPPED = ("tiny-llama",)  # in the checkout's data folder
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load(name: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None):
    """Load a base model and its tokenizer.

    Code that a model brings with it is never run.

    Args:
        name: "smollm2-135m" (see `SOURCES`), "tiny-llama" (see `SHIPPED`), a local folder with a model in
            Hugging Face's format (safetensors only), or the id of a model on the hub
            ("HuggingFaceTB/SmolLM2-360M-Instruct").
        dtype: of the weights, one of `DTYPES` or its name; default: what the device computes fast
            (`labkit.hardware.compute_dtype`).
        device: default "cpu".

    Returns:
        (model, tokenizer): the model in eval mode, the tokenizer with its chat template if it has one.

    Raises:
        ModelUnavailable: unknown name, not there and no network, a wrong checksum, no space, or files that
            are damaged, missing, too many, or of another model.
        ValueError: a dtype or device that cannot be used.
    """
    device = usable_device(device)
    dtype = floating_dtype(dtype) or compute_dtype(device)
    if not isinstance(name, (str, Path)):
        raise ValueError(f"name={name!r} must be the name of a model, its folder, or its id on the hub")
    folder = local_folder(name)
    with collector_paused():
        model, tokenizer, info = read(name, folder, dtype)
    check_loaded(model, info, folder or name)
    if getattr(model.config, "auto_map", None):
        warnings.warn(
            f"{name} brings code of its own, which was not run; it is loaded as transformers' own "
            f"{type(model).__name__}",
            stacklevel=2,
        )
    model.config.name_or_path = str(name)
    return model.to(device).eval(), tokenizer


def read(name: str | Path, folder: Path | None, dtype: torch.dtype) -> tuple[nn.Module, Any, dict]:
    """Read a model from its folder, or from the hub if that is None.

    Returns:
        (model, tokenizer, info): `info` is transformers' account of what was missing, too much, or of another shape.

    Raises:
        ModelUnavailable: transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

    ours = name in SOURCES or name in SHIPPED
    model_class = LlamaForCausalLM if ours else AutoModelForCausalLM
    tokenizer_class = PreTrainedTokenizerFast if ours else AutoTokenizer
    place = folder or str(name)
    offline = {"local_files_only": folder is None and not is_reachable()}
    part = "tokenizer"
    try:
        tokenizer = tokenizer_class.from_pretrained(place, trust_remote_code=False, **offline)
        part = "model"
        model, info = model_class.from_pretrained(
            place,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `info` has them, by name
            adapter_kwargs=offline,
            **offline,
        )
    except Exception as error:  # transformers, tokenizers, safetensors and the hub raise many kinds
        raise ModelUnavailable(not_loaded_message(name, folder, error, part)) from error
    return model, tokenizer, info


def local_folder(name: str | Path) -> Path | None:
    """The folder of the model called `name`, checked as far as it can be before loading; None for an id on the hub.

    Raises:
        ModelUnavailable: see `load`.
    """
    if name in SOURCES:
        return fetch(str(name))
    if name in SHIPPED:
        return shipped(str(name))
    path = Path(name).expanduser()
    if path.is_dir():
        check_files(path)
        return path
    if isinstance(name, str) and name.count("/") == 1 and all(part.strip(".~") for part in name.split("/")):
        return None
    if path.is_file():
        raise ModelUnavailable(f"{name} is a file; give the folder of a model in Hugging Face's format")
    known = (*SOURCES, *SHIPPED)
    raise ModelUnavailable(
        f"{str(name)!r} is not a known model{nearest(name, known)} Known names: {', '.join(known)}. Also "
        "possible: a local folder that exists, or a hub id such as 'HuggingFaceTB/SmolLM2-360M-Instruct'"
    )


def shipped(name: str) -> Path:
    """The folder of a model that comes with the checkout.

    Raises:
        ModelUnavailable: its weights are missing, or not those that its provenance.json lists.
    """
    folder = data_folder() / name
    again = (
        "run from a full checkout, set LABKIT_DATA to its data/ folder, or make the model again as "
        "data/tiny-llama/README.md says"
    )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelUnavailable(
            f"{name} comes with the checkout of the course, but {weights} is missing; {again}"
        )
    try:
        provenance: Any = read_json(folder / "provenance.json")
        damaged = differing(folder, {weights.name: provenance["sha256"][weights.name]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(f"{weights} cannot be checked ({error!r}); {again}") from None
    if damaged:
        raise ModelUnavailable(f"{weights} is damaged: it has not the sha256 in provenance.json; {again}")
    return folder


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device to load to.

    Raises:
        ValueError: there is no such device, here or at all.
    """
    try:
        made = torch.device("cpu" if device is None else device)
        torch.empty(0, device=made)
        if made.type == "meta":
            raise RuntimeError("it holds shapes, and no weights; see labkit.models.meta_model")
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"device={device!r} cannot be used here ({reason}); this machine has {str(best_device())!r}"
        ) from None
    return made


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, also from its name.

    Raises:
        ValueError: not one of `DTYPES`.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    check_choice("dtype", name, DTYPES)
    return DTYPES[name]


def not_loaded_message(name: str | Path, folder: Path | None, error: Exception, part: str) -> str:
    """Why the `part` of a model (its tokenizer, or itself) could not be loaded, and what to do about it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "custom code" in reason:
        return (
            f"the {part} of {name} can only be loaded by code that it brings with it, which labkit never runs; use "
            "one whose class is part of transformers"
        )
    if name in SOURCES:
        return f"{name} could not be loaded ({reason}), although the files in {folder} are as they were made"
    if folder is not None and part == "tokenizer":
        return (
            f"there is no tokenizer in {folder} that can be read ({reason}); save the model's own there with "
            "tokenizer.save_pretrained"
        )
    if folder is not None:
        return f"the model in {folder} cannot be read ({reason}); check that its files are complete"
    return (
        f"could not get {name!r} from the hub ({reason}), and there is no folder of that name; check the name and "
        f"the network, or use a name that works offline: {', '.join((*SOURCES, *SHIPPED))}"
    )


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector: scanning the million objects that transformers makes takes a second."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
