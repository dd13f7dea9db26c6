"""(IA)^3, soft prompts and prefixes on disk, in the format of Hugging Face PEFT.

`adapter_model.safetensors` holds, beside the `adapter_config.json` that says which of the three it is,

    (IA)^3     base_model.model.<layer>.ia3_l    (out, 1) on an output, (1, in) on an input
    prompt     prompt_embeddings                 (length, width)
    prefix     prompt_embeddings                 (length, 2 * layers * kv_width): a layer's keys, its values

A prefix that was trained through an MLP is saved as the prefix that it makes: nothing else is needed to use
it. PEFT does the same. PEFT has no bottleneck adapters, so they have no folder here.

Agrees with: PEFT `utils/save_and_load.py` (a folder from here loads there, and the other way round).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.alternatives.bottleneck import BottleneckConfig
from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers
from labkit.alternatives.methods import base_only, check_unadapted, method_of, require_method
from labkit.alternatives.prefixes import Prefix, PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.formats.peft_config import matches
from labkit.formats.peft_folder import (
    PREFIX,
    check_tensors,
    does_not_fit,
    read_folder,
    refuse_settings,
    write_folder,
)
from labkit.formats.provenance import check_base, read_provenance, record
from labkit.lora.fingerprint import fingerprint
from labkit.models.shapes import decoder_shape
from labkit.quant.layer_kinds import is_conv1d, is_linear, widths

PROMPT = "prompt_embeddings"
KINDS = {"IA3": "(IA)^3", "PROMPT_TUNING": "prompt tuning", "PREFIX_TUNING": "prefix tuning"}


def save_alternative(
    model: nn.Module,
    path: str | Path,
    data: object = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save what was trained in `model` as a PEFT folder.

    The folder is written under a temporary name and renamed, so an old one at `path` is replaced whole or not
    at all.

    Args:
        model: with (IA)^3 (merged or not), a soft prompt or a prefix.
        path: folder to write; its parent is made if need be.
        data: what it was trained on, such as a hash; recorded.
        metrics: its results; recorded.

    Returns:
        `path`.

    Raises:
        ValueError: there is nothing to save, it has NaN in it, or it is a bottleneck adapter.
    """
    added = require_method(model)
    if isinstance(added.config, BottleneckConfig):
        raise ValueError(
            "PEFT knows no bottleneck adapters, so no other stack could load them. Save the parameters that "
            "train yourself, with safetensors' save_file({n: p.detach() for n, p in "
            "model.named_parameters() if p.requires_grad}, path)"
        )
    tensors = {f"{PREFIX}{name}.ia3_l": on_disk(layer) for name, layer in ia3_layers(model).items()}
    if added.tokens is not None:
        tensors[PROMPT] = (
            added.tokens.values() if isinstance(added.tokens, Prefix) else added.tokens.embedding
        )
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    with base_only(model):
        base = fingerprint(model)
    provenance = record(base, asdict(added.config), data, metrics)
    return write_folder(Path(path), tensors, to_peft(model), provenance)


def on_disk(layer) -> Tensor:
    """A vector of (IA)^3 in the shape that PEFT multiplies weights by: (1, in) or (out, 1)."""
    return layer.vector[None, :] if layer.on_input else layer.vector[:, None]


def to_peft(model: nn.Module) -> dict:
    """`adapter_config.json` of what is in `model`."""
    config = method_of(model).config
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", ""),
        "inference_mode": True,
    }
    if isinstance(config, IA3Config):
        return common | {
            "peft_type": "IA3",
            "target_modules": [*config.outputs, *config.inputs],
            "feedforward_modules": [*config.inputs],
            "fan_in_fan_out": any(is_conv1d(layer.base) for layer in ia3_layers(model).values()),
        }
    s = decoder_shape(model)
    common |= {
        "num_virtual_tokens": config.length,
        "num_layers": s.num_hidden_layers,
        "num_transformer_submodules": 1,
    }
    if isinstance(config, PromptConfig):
        return common | {
            "peft_type": "PROMPT_TUNING",
            "token_dim": s.hidden_size,
            "num_attention_heads": s.num_attention_heads,
            "prompt_tuning_init": "RANDOM",  # PEFT has no use for it once there are values
        }
    return common | {
        "peft_type": "PREFIX_TUNING",
        "token_dim": s.kv_width,
        "num_attention_heads": s.num_key_value_heads,
        "encoder_hidden_size": config.projection or s.kv_width,
        "prefix_projection": False,  # the file holds the prefix itself
    }


def load_alternative(model: nn.Module, path: str | Path) -> nn.Module:
    """Add what is in the PEFT folder `path` to a base model; in place. Values are loaded bit for bit.

    Args:
        model: a base without adapters, in 32 or 16 bits or quantized.
        path: folder written by `save_alternative` or by PEFT, of (IA)^3, prompt tuning or prefix tuning.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: there is no adapter.
        AdapterMismatch: made for another base, or tensors missing, left over or of another shape. Nothing is
            changed then.
        ValueError: damaged files, another kind of adapter, or `model` has one already.
    """
    path = Path(path)
    raw, tensors = read_folder(path)
    check_settings(raw, path)
    kind = raw["peft_type"]
    check_unadapted(model, KINDS[kind])
    check_base(model, path, read_provenance(path))
    if kind == "IA3":
        return load_ia3(model, raw, tensors, path)
    s, length = decoder_shape(model), raw.get("num_virtual_tokens")
    width = s.hidden_size if kind == "PROMPT_TUNING" else 2 * s.num_hidden_layers * s.kv_width
    check_tensors({PROMPT: (length, width)}, tensors, path, left_over)
    if kind == "PROMPT_TUNING":
        add_prompt(model, PromptConfig(length))
        value = method_of(model).tokens.embedding
    else:
        add_prefix(model, PrefixConfig(length))
        value = method_of(model).tokens.prefix
    with torch.no_grad():
        value.copy_(tensors[PROMPT])
    return model


def load_ia3(model: nn.Module, raw: dict, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """The vectors in `tensors`, on the layers that the configuration of PEFT names."""
    layers = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
    targets = [name for name in layers if matches(name, raw.get("target_modules") or ())]
    inputs = [name for name in targets if ends_one_of(name, raw.get("feedforward_modules"))]
    expected = {}
    for name in targets:
        n_in, n_out = widths(layers[name])
        expected[f"{PREFIX}{name}.ia3_l"] = (1, n_in) if name in inputs else (n_out, 1)
    if not targets:
        raise does_not_fit(path, ["target_modules of its configuration match no layer of this model"])
    check_tensors(expected, tensors, path, left_over)
    add_ia3(model, IA3Config(outputs=[name for name in targets if name not in inputs], inputs=inputs))
    with torch.no_grad():
        for name, layer in ia3_layers(model).items():
            layer.vector.copy_(tensors[f"{PREFIX}{name}.ia3_l"].flatten())
    return model


def ends_one_of(name: str, wanted: str | list[str] | None) -> bool:
    """Does PEFT take `name` as meant by an expression, or by ends of names, not only at a dot?"""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name.endswith(end) for end in wanted or ())


def left_over(key: str) -> str:
    """What to say of a tensor that nothing in the model takes."""
    return f"{key} is not one that the configuration names"


def check_settings(raw: dict, path: Path) -> None:
    """Raise a `ValueError` that names the settings which `load_alternative` cannot follow, if any."""
    kind = raw["peft_type"]
    if kind not in KINDS:
        hint = "; load it with labkit.load_adapter" if kind == "LORA" else ""
        raise ValueError(
            f"the adapter in {path} has peft_type={kind!r}; this loader reads {', '.join(KINDS)}{hint}"
        )
    unknown = [key for key in ("modules_to_save", "exclude_modules") if raw.get(key)]
    if raw.get("num_transformer_submodules") not in (None, 1):
        unknown.append("num_transformer_submodules")
    refuse_settings(path, raw, unknown)
