"""A model with its adapter merged as a folder that transformers, vLLM and every converter load: no LoRA is left in it.

    config.json, generation_config.json    of the model
    model*.safetensors                     its weights, in several files with an index if they are large
    tokenizer.json, …                      and the chat template
    README.md                              the model card
    labkit.json                            what it was made from, and the sha256 of each file

Weights are merged and rounded file by file, so that beside the model no more than one file is in memory.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from labkit.checks import check_whole, needed
from labkit.files import reading
from labkit.files.writing import new_folder
from labkit.formats.card import CARD, CardFacts, is_free
from labkit.formats.merged_card import merged_card
from labkit.formats.merged_weights import MergedWeight, check_mergeable, merged_weights
from labkit.formats.peft_config import base_place
from labkit.formats.peft_folder import refuse_folder_of_process
from labkit.formats.peft_settings import MAX_CONFIG
from labkit.formats.provenance import PROVENANCE, record
from labkit.lora.fingerprint import fingerprint
from labkit.lora.mounting import mounted_adapter
from labkit.models.loading import floating_dtype
from labkit.models.walk import unwrap

MERGED = "merged"  # the key of `labkit.json` under which a merged model's provenance stands
GIGABYTE = 10**9


def save_merged(
    model: nn.Module,
    tokenizer,
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    facts: CardFacts | None = None,
    metrics: Mapping[str, float] | None = None,
    max_file: int = GIGABYTE,
) -> Path:
    """Write the model with its adapter merged, its tokenizer and a model card as a new folder. The model is not changed.

    The sum W + s B A is taken in fp32 and rounded once. A 4-bit base is dequantized, and the merged weight stays in
    `dtype`: to quantize it again would round the correction away.

    Args:
        model: of transformers, with an adapter mounted or without any, in 32, 16 or 4 bits.
        tokenizer: its own.
        path: a folder that is not there yet or is empty, or an earlier merged model, which is replaced.
        dtype: of the weights; default: that of the model's first weight.
        facts: for the card; hashes and counts go into `labkit.json` too.
        metrics: results, for `labkit.json`.
        max_file: bytes of the largest file of weights.

    Returns:
        `path`.

    Raises:
        FileExistsError: `path` holds something else.
        ValueError: adapters that cannot be merged, a tokenizer with tokens that have no embedding, a model that is
            not what its config describes, NaN, or numbers too
            large for `dtype`. Nothing is written.
        labkit.files.CannotWrite: no space, no permission; what was there is intact.
    """
    path = Path(path)
    check_whole("max_file", max_file)
    check_mergeable(model)
    check_place(path)
    weights, inner = merged_weights(model), unwrap(model)
    check_tokens(inner, tokenizer)
    kind = floating_dtype(dtype) or weights[0].compute().dtype
    adapter = mounted_adapter(model)
    base = (facts.base if facts else None) or base_place(inner)
    settings = asdict(adapter.config) if adapter else {}
    data = {"files": dict(facts.files), **facts.counts} if facts else None
    made_from = record(fingerprint(model, replaced(adapter)), settings, data, metrics)
    config = copy.deepcopy(inner.config)
    config.dtype, config.architectures = kind, [type(inner).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with new_folder(path, refuse_others) as made:
        write_weights(made, weights, kind, max_file)
        config.save_pretrained(made)
        if inner.can_generate():
            inner.generation_config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        dtype_name = str(kind).removeprefix("torch.")
        (made / CARD).write_text(
            merged_card(path.name, base, dtype_name, adapter.config if adapter else None, facts),
            encoding="utf-8",
        )
        files = {file.name: reading.sha256(file) for file in sorted(made.iterdir())}
        (made / PROVENANCE).write_text(
            json.dumps({MERGED: made_from, "files": files}, indent=2), encoding="utf-8"
        )
    return path


def replaced(adapter) -> list[str]:
    """Own names of modules that the adapter brings whole."""
    return sorted(set(adapter.modules) - set(adapter.layers)) if adapter else []


def write_weights(folder: Path, weights: list[MergedWeight], dtype: torch.dtype, max_file: int) -> None:
    """Write the weights into one or several safetensors files of at most `max_file` bytes, with an index."""
    hub = needed("huggingface_hub", "a folder of weights")
    by_name = {weight.name: weight for weight in weights}
    shapes = {w.name: torch.empty(w.shape, dtype=dtype, device="meta") for w in weights}
    plan = hub.split_torch_state_dict_into_shards(shapes, max_shard_size=max_file)
    for file, names in plan.filename_to_tensors.items():
        save_file({n: by_name[n].rounded(dtype) for n in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def check_place(path: Path) -> None:
    """Raise unless a merged model may be written at `path`.

    Raises:
        FileExistsError: there is a file, or a folder with anything but an earlier merged model.
        ValueError: it is the folder that the process is in.
    """
    refuse_folder_of_process(path)
    if is_free(path):
        return
    if not path.is_dir():
        raise FileExistsError(f"{path} is a file; a merged model is a folder, so give another name")
    refuse_others(path)


def check_tokens(model: nn.Module, tokenizer) -> None:
    """Raise a `ValueError` if the tokenizer makes tokens that the model has no embedding for; spare rows are common."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "base", embedding).weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ValueError(
            f"the tokenizer has a token {highest:,}, and the model's embedding {rows:,} rows, from 0. Call "
            f"model.resize_token_embeddings({highest + 1}) before training, or use the tokenizer that the model was "
            "trained with"
        )


def refuse_others(old: Path, new: Path | None = None) -> None:
    """Raise a `FileExistsError` if the folder `old` holds what is not part of a merged model that was written here.

    Args:
        old: the folder that would be replaced, or has been.
        new: what replaces it; not needed, and given by `new_folder`.
    """
    if is_free(old):
        return
    try:
        said = reading.read_json(old / PROVENANCE, MAX_CONFIG)
        files = set(said["files"]) | {PROVENANCE} if MERGED in said else set()  # type: ignore[index,operator,arg-type]
    except (OSError, ValueError, TypeError, KeyError):
        files = set()
    others = sorted(entry.name for entry in old.iterdir() if entry.name not in files)
    if others:
        raise FileExistsError(
            f"{old} holds {others[0]}"
            + (f" and {len(others) - 1} more" if others[1:] else "")
            + ", not part of a merged model that was saved there, and is left as it is; give another name"
        )
