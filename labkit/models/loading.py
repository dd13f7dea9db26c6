"""Base models by name, from a local folder, or from the hub; the named ones work offline once fetched.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0), which `labkit.models.fetching` gets. Its linear weights
had been quantized to Q4_1 in the published file, so do not judge quantizers by it.

`tiny-llama` (4.0 M parameters, never quantized) was pretrained for this course and is in `data/tiny-llama`.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from labkit.checks import nearest
from labkit.hardware import compute_dtype
from labkit.models.fetching import SOURCES, ModelUnavailable, fetch
from labkit.paths import data_folder

SHIPPED = ("tiny-llama",)  # in the checkout's data folder


def load(name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
    """Load a base model and its tokenizer.

    Args:
        name: "smollm2-135m" (see `SOURCES`), "tiny-llama" (see `SHIPPED`), a local folder with a model in
            Hugging Face's format (safetensors only), or the id of a model on the hub
            ("HuggingFaceTB/SmolLM2-360M-Instruct").
        dtype: of the weights; default: what the device computes fast (`labkit.hardware.compute_dtype`).
        device: default "cpu".

    Returns:
        (model, tokenizer): the model in eval mode, the tokenizer with its chat template if it has one.

    Raises:
        ModelUnavailable: unknown name, not there and no network, a wrong checksum, no space, or damaged
            files.
    """
    device = torch.device(device or "cpu")
    dtype = dtype or compute_dtype(device)
    with collector_paused():
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            LlamaForCausalLM,
            PreTrainedTokenizerFast,
        )

        folder: str | Path
        if name in SOURCES:
            folder, model_class, tokenizer_class = fetch(name), LlamaForCausalLM, PreTrainedTokenizerFast
        elif name in SHIPPED:
            folder, model_class, tokenizer_class = shipped(name), LlamaForCausalLM, PreTrainedTokenizerFast
        else:
            folder, model_class, tokenizer_class = elsewhere(name), AutoModelForCausalLM, AutoTokenizer
        try:
            tokenizer = tokenizer_class.from_pretrained(folder)
            model = model_class.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        except Exception as error:  # transformers, safetensors and the hub raise many kinds
            raise ModelUnavailable(not_loaded_message(name, folder, error)) from error
    model.config.name_or_path = name
    return model.to(device).eval(), tokenizer


def shipped(name: str) -> Path:
    """The folder of a model that comes with the checkout.

    Raises:
        ModelUnavailable: its weights are missing.
    """
    folder = data_folder() / name
    if not (folder / "model.safetensors").is_file():
        raise ModelUnavailable(
            f"{name} comes with the checkout of the course, but {folder / 'model.safetensors'} is missing; "
            "run from a full checkout, set LABKIT_DATA to its data/ folder, or make the model again as "
            "data/tiny-llama/README.md says"
        )
    return folder


def elsewhere(name: str) -> str:
    """A local folder as it is, a hub id (`owner/name`) as it is; anything else is an unknown name."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            pickled = [p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth"))]
            why = (
                f"only pickle files ({', '.join(pickled)}), which can run code when loaded"
                if pickled
                else "no weights"
            )
            raise ModelUnavailable(
                f"the folder {name} holds {why}; save the model as safetensors and try again"
            )
        return str(path)
    if name.count("/") == 1 and all(part.strip(".") for part in name.split("/")):
        return name
    known = (*SOURCES, *SHIPPED)
    raise ModelUnavailable(
        f"{name!r} is not a known model{nearest(name, known)} Known names: {', '.join(known)}. Also "
        "possible: a local folder that exists, or a hub id such as 'HuggingFaceTB/SmolLM2-360M-Instruct'"
    )


def not_loaded_message(name: str, folder: str | Path, error: Exception) -> str:
    """Why a model could not be loaded, and what to do about it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if name in SOURCES:
        return (
            f"the cached files of {name} cannot be read ({reason}); delete {folder} and run `make lab` again"
        )
    if Path(folder).is_dir():
        return f"the model in {folder} cannot be read ({reason}); check that its files are complete"
    return (
        f"could not get {name!r} from the hub ({reason}); check the name and the network, or use a name that "
        f"works offline: {', '.join((*SOURCES, *SHIPPED))}"
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
