"""(IA)^3, soft prompts and prefixes on disk, in the format of Hugging Face PEFT.

`adapter_model.safetensors` holds, beside the `adapter_config.json` that says which of the three it is,

    (IA)^3     base_model.model.<layer>.ia3_l      (out, 1) on an output, (1, in) on an input
    prompt     prompt_embeddings                   (length, width)
    prefix     prompt_embeddings                   (length, 2 * layers * kv_width): for each layer its keys, then its values

A prefix that was trained through an MLP is saved as the prefix that it makes: nothing else is needed to use it. PEFT does the same.
`labkit.json`, which PEFT ignores, records the fingerprint of the base, the configuration, data, metrics and versions.

Loading never guesses: a tensor too many, one too few, or one of another shape is an error that names it. PEFT has no bottleneck
adapters, so that they have no folder here.

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
from labkit.formats.peft_folder import PREFIX, read_files, write_folder
from labkit.formats.provenance import check_base, read_provenance, versions
from labkit.lora.fingerprint import AdapterMismatch, fingerprint
from labkit.models.shapes import decoder_shape
from labkit.quant.linears import is_conv1d, is_linear, widths

PROMPT = "prompt_embeddings"
KINDS = {"IA3": "(IA)^3", "PROMPT_TUNING": "prompt tuning", "PREFIX_TUNING": "prefix tuning"}


def save_beyond(
    model: nn.Module,
    path: str | Path,
    data: object = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save what was trained in `model` as a PEFT folder: written under a temporary name and renamed, so that an old one at `path` is
    replaced whole or not at all.

    Args:
        model: with (IA)^3 (merged or not), a soft prompt or a prefix.
        path: folder to write; its parent is made if need be.
        data: what it was trained on, such as a hash; recorded.
        metrics: its results; recorded.

    Raises:
        ValueError: there is nothing to save, it has NaN in it, or it is a bottleneck adapter.
    """
    added = require_method(model)
    if isinstance(added.config, BottleneckConfig):
        raise ValueError(
            "PEFT knows no bottleneck adapters, so that no other stack could load them. Keep the parameters that train yourself, with "
            "safetensors' save_file({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, path)"
        )
    tensors = {f"{PREFIX}{name}.ia3_l": on_disk(layer) for name, layer in ia3_layers(model).items()}
    if added.tokens is not None:
        tensors[PROMPT] = (
            added.tokens.values() if isinstance(added.tokens, Prefix) else added.tokens.embedding
        )
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    with base_only(model):
        base = fingerprint(model)
    provenance = {
        "base": base,
        "config": asdict(added.config),
        "data": data,
        "metrics": metrics,
        "versions": versions(),
    }
    return write_folder(Path(path), tensors, peft_config(model), provenance)


def on_disk(layer) -> Tensor:
    """A vector of (IA)^3 in the shape that PEFT multiplies weights by: (1, in) or (out, 1)."""
    return layer.vector[None, :] if layer.on_input else layer.vector[:, None]


def peft_config(model: nn.Module) -> dict:
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


def load_beyond(model: nn.Module, path: str | Path) -> nn.Module:
    """Add what is in the PEFT folder `path` to a bare base model; in place. Values are loaded bit for bit.

    Args:
        model: a base without adapters, in 32 or 16 bits or quantized.
        path: folder written by `save_beyond` or by PEFT, of (IA)^3, prompt tuning or prefix tuning.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: there is no adapter.
        AdapterMismatch: made for another base, or tensors missing, left over or of another shape. Nothing is changed then.
        ValueError: damaged files, another kind of adapter, or `model` has one already.
    """
    path = Path(path)
    raw, tensors = read(path)
    kind = raw["peft_type"]
    check_unadapted(model, KINDS[kind])
    check_base(model, path, read_provenance(path))
    if kind == "IA3":
        return load_ia3(model, raw, tensors, path)
    s, length = decoder_shape(model), raw.get("num_virtual_tokens")
    width = s.hidden_size if kind == "PROMPT_TUNING" else 2 * s.num_hidden_layers * s.kv_width
    check_tensors({PROMPT: (length, width)}, tensors, path)
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
    targets = [name for name in layers if names_it(raw.get("target_modules"), name, dotted=True)]
    inputs = [name for name in targets if names_it(raw.get("feedforward_modules"), name, dotted=False)]
    expected = {}
    for name in targets:
        n_in, n_out = widths(layers[name])
        expected[f"{PREFIX}{name}.ia3_l"] = (1, n_in) if name in inputs else (n_out, 1)
    check_tensors(expected, tensors, path)
    add_ia3(model, IA3Config(outputs=[name for name in targets if name not in inputs], inputs=inputs))
    with torch.no_grad():
        for name, layer in ia3_layers(model).items():
            layer.vector.copy_(tensors[f"{PREFIX}{name}.ia3_l"].flatten())
    return model


def names_it(wanted: str | list[str] | None, name: str, dotted: bool) -> bool:
    """Does PEFT take the layer `name` as meant by `wanted`? An expression, or ends of names: at a dot for targets only."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    if dotted:
        return any(f".{name}".endswith(f".{end}") for end in wanted or ())
    return any(name.endswith(end) for end in wanted or ())


def check_tensors(expected: dict[str, tuple], tensors: dict[str, Tensor], path: Path) -> None:
    """Compare names and shapes of what a folder holds with what the model takes."""
    problems = [] if expected else ["target_modules of its configuration matches no layer of this model"]
    problems += [f"{key} is missing" for key in expected if key not in tensors]
    problems += [
        f"{key} is none that the configuration names" for key in sorted(set(tensors) - set(expected))
    ]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AdapterMismatch(f"the adapter in {path} does not fit: {'; '.join(problems[:3])}{more}")


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder of one of the three kinds.

    Raises:
        FileNotFoundError, ValueError: see `load_beyond`.
    """
    raw, tensors = read_files(path)
    kind = raw["peft_type"]
    if kind not in KINDS:
        hint = "; load it with labkit.load_adapter" if kind == "LORA" else ""
        raise ValueError(
            f"the adapter in {path} has peft_type={kind!r}; this loader reads {', '.join(KINDS)}{hint}"
        )
    unknown = [key for key in ("modules_to_save", "exclude_modules") if raw.get(key)]
    unknown += (
        ["num_transformer_submodules"] if raw.get("num_transformer_submodules") not in (None, 1) else []
    )
    if unknown:
        what = ", ".join(f"{key}={raw[key]!r}" for key in unknown)
        raise ValueError(f"the adapter in {path} has {what}, which this loader does not know")
    return raw, tensors
