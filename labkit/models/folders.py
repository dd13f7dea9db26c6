"""Is a folder a whole model in Hugging Face's format? Asked before it is loaded, and of what was loaded.

Before: every file is a regular one of a bounded size, the weights are safetensors, the index names what is there,
and no adapter lies beside them, which transformers would put on without a word. After: transformers' own account of
the loading (`output_loading_info`) must be empty. Weights that are missing would be random numbers, and weights that
are too many belong to another model than the one that config.json describes, such as one whose layers have biases.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from labkit.files.reading import check_regular, read_header, read_json
from labkit.models.fetching import ModelUnavailable

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    INDEX,
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "tekken.json")  # may be larger than a config
VOCABULARY_KINDS = (".jinja", ".model", ".txt", ".tiktoken")
MAX_VOCABULARY = 256 * 2**20  # bytes


def check_files(folder: Path) -> None:
    """Check the files of a model before it is loaded.

    Raises:
        ModelUnavailable: no weights or only pickled ones, no config, an adapter; a file that is no regular one, too
            large, damaged, or missing from what the index names.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelUnavailable(
            f"the folder {folder} holds an adapter (adapter_config.json); load its base model and put the adapter on "
            "with load_adapter, or move the adapter to a folder of its own"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        why = (
            f"only pickle files ({', '.join(pickled)}), which can run code when loaded"
            if pickled
            else "no weights"
        )
        raise ModelUnavailable(
            f"the folder {folder} holds {why}; save the model as safetensors and try again"
        )
    try:
        if not isinstance(read_json(folder / "config.json"), dict):
            raise ValueError("config.json is no object")
        for path in sorted(folder.iterdir()):
            if path.name in CONFIGS:
                read_json(path)
            elif path.name in VOCABULARIES or path.suffix in VOCABULARY_KINDS:
                check_regular(path, path.stat(), MAX_VOCABULARY)
        for path in weight_files(folder):
            read_header(path)
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f"the model in {folder} has no {Path(error.filename).name}; save it with save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f"the model in {folder} cannot be read ({error}); check that its files are complete"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights: one, or those that the index names.

    Raises:
        FileNotFoundError: one that the index names is missing.
        ValueError: there is neither, or the index makes no sense.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
        raise ValueError(f"neither {WEIGHTS} nor {INDEX} is there, only {found}")
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{INDEX} does not say which file holds which weight")
    for place in places.values():
        if Path(place).name != place:
            raise ValueError(f"{INDEX} names {place!r}, which is outside of the folder")
    return [folder / place for place in sorted(set(places.values()))]


def check_loaded(model: nn.Module, info: Mapping[str, Any], place: str | Path) -> None:
    """Check what transformers made of a folder.

    Args:
        model: as loaded.
        info: transformers' account of it: the missing, unexpected and mismatched keys, and errors.
        place: the folder, or the id on the hub, for the message.

    Raises:
        ModelUnavailable: the account is not empty; the message names the weights, and what to do.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelUnavailable(
            f"{place} is an adapter, not a model; load its base model and put the adapter on with load_adapter"
        )
    missing, extra = set(info["missing_keys"]), set(info["unexpected_keys"])
    resized = {
        f"{key} {tuple(given)} in place of {tuple(own)}" for key, given, own in info["mismatched_keys"]
    }
    problems = [
        f"{what} {len(names)} ({listed(names)})"
        for what, names in (
            ("weights that are missing:", missing),
            ("weights for which it has no place:", extra),
            ("weights of another shape:", resized),
            ("errors:", set(info["error_msgs"])),
        )
        if names
    ]
    if problems:
        raise ModelUnavailable(
            f"{place} does not hold the {type(model).__name__} that its config.json describes: "
            f"{'; '.join(problems)}. {advice(missing, extra)}"
        )


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few of `names`."""
    first = sorted(names)
    return ", ".join(first[:most]) + (", …" if len(first) > most else "")


def advice(missing: set[str], extra: set[str]) -> str:
    """What to do about weights that are missing or too many, from where the others are."""
    layers = {name.removesuffix("weight") for name in missing if name.endswith(".weight")}
    kept = {name.removeprefix(layer) for layer in layers for name in extra if name.startswith(layer)}
    if any(name.startswith(("lora_", "base.", "base_layer.")) for name in kept):
        return (
            "It was saved with an adapter on: keep that with save_adapter, or merge it for good and save what unload "
            "gives back"
        )
    if kept:
        return (
            "Its layers are quantized, a form that only a quantized model can read: save it before quantize_model or "
            "after dequantize_model, and call quantize_model after loading"
        )
    if missing:
        return (
            "What is missing would be random numbers; save the whole model with save_pretrained and try again"
        )
    return "A model of these sizes would give other numbers; config.json and the weights must be of one model"
