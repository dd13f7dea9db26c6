"""(IA)^3, soft prompts and prefixes on disk, in the format of Hugging Face PEFT.

`adapter_model.safetensors` holds, beside the `adapter_config.json` that says which of the three it is,

    (IA)^3     base_model.model.<layer>.ia3_l    (out, 1) on an output, (1, in) on an input
    prompt     prompt_embeddings                 (length, width)
    prefix     prompt_embeddings                 (length, 2 * layers * kv_width): a layer's keys, its values

A prefix that was trained through an MLP is saved as the prefix that it makes: nothing else is needed to use
it. PEFT does the same. PEFT has no bottleneck adapters, so they have no folder here.

Agrees with: PEFT `utils/save_and_load.py` (a folder from here loads there, and the other way round).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.alternatives.bottleneck import BottleneckConfig
from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers
from labkit.alternatives.methods import base_only, check_unadapted, method_of, require_method
from labkit.alternatives.prefixes import Prefix, PrefixConfig, add_prefix, prefix_shape, prefix_width
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.alternatives.sublayers import embedding_width
from labkit.formats.new_weights import new_in, tell_alone
from labkit.formats.peft_config import meaning, named_base
from labkit.formats.peft_folder import (
    CONFIG,
    PREFIX,
    Expected,
    check_tensors,
    does_not_fit,
    read_folder,
    write_folder,
)
from labkit.formats.peft_settings import (
    are_names_or_pattern,
    check_config,
    check_expressions,
    is_count,
    is_switch,
)
from labkit.formats.provenance import (
    check_base,
    check_saved,
    read_provenance,
    record,
    seal,
)
from labkit.lora.fingerprint import fingerprint
from labkit.models.patterns import matches_whole
from labkit.models.restoring import unchanged_on_error
from labkit.models.shapes import decoder_shape
from labkit.models.walk import places, unwrap
from labkit.quant.layer_kinds import is_conv1d, is_linear, widths

PROMPT = "prompt_embeddings"
KINDS = {"IA3": "(IA)^3", "PROMPT_TUNING": "prompt tuning", "PREFIX_TUNING": "prefix tuning"}
OF_IA3 = {
    "target_modules": are_names_or_pattern,
    "feedforward_modules": are_names_or_pattern,
    "fan_in_fan_out": is_switch,  # PEFT's layers see for themselves, and so do ours
}
# the shape of the model, and how the values began: the file has them
PASSED_OVER = (
    "encoder_hidden_size", "init_ia3_weights", "init_weights", "num_attention_heads", "num_layers",
    "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs",
    "tokenizer_name_or_path",
)  # fmt: skip


def save_alternative(
    model: nn.Module,
    path: str | Path,
    data: object = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save what was trained in `model` as a PEFT folder.

    An old adapter at `path` is replaced whole or not at all; what else lies in the folder stays.

    Args:
        model: with (IA)^3 (merged or not), a soft prompt or a prefix.
        path: folder to write; its parent is made if need be.
        data: what it was trained on, such as a hash; recorded.
        metrics: its results; recorded.

    Returns:
        `path`.

    Raises:
        ValueError: there is nothing to save, it has NaN in it, or it is a bottleneck adapter; or `data` or
            `metrics` are nothing that JSON can hold.
        labkit.files.CannotWrite: no space, no permission; the old adapter is intact.
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
    settings = to_peft(model)
    alone = new_in(model, settings["base_model_name_or_path"])
    tell_alone(alone)
    provenance = record(base, asdict(added.config), data, metrics, depends_on=alone)
    return write_folder(Path(path), tensors, settings, seal(provenance, tensors, settings))


def on_disk(layer) -> Tensor:
    """A vector of (IA)^3 in the shape that PEFT multiplies weights by: (1, in) or (out, 1)."""
    return layer.vector[None, :] if layer.on_input else layer.vector[:, None]


def to_peft(model: nn.Module) -> dict:
    """`adapter_config.json` of what is in `model`."""
    added = method_of(model)
    config, tokens = added.config, added.tokens
    common = named_base(model) | {"inference_mode": True}
    if isinstance(config, IA3Config):
        return common | {
            "peft_type": "IA3",
            "target_modules": [*config.outputs, *config.inputs],
            "feedforward_modules": [*config.inputs],
            "fan_in_fan_out": any(is_conv1d(layer.base) for layer in ia3_layers(model).values()),
        }
    s = tokens.shape if isinstance(tokens, Prefix) else decoder_shape(unwrap(model))
    common |= {
        "num_virtual_tokens": config.length,
        "num_layers": s.num_hidden_layers,
        "num_transformer_submodules": 1,
    }
    if isinstance(config, PromptConfig):
        return common | {
            "peft_type": "PROMPT_TUNING",
            "token_dim": tokens.embedding.shape[1],
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
        ValueError: damaged or edited files, another kind of adapter, or `model` has one already. Nothing is
            changed then.
    """
    path = Path(path)
    raw, tensors = read_folder(path)
    check_settings(raw, path)
    kind = raw["peft_type"]
    check_unadapted(model, KINDS[kind])
    provenance = read_provenance(path)
    check_base(model, path, provenance)
    with unchanged_on_error(model):
        if kind == "IA3":
            config, expected = ia3_of(model, raw, path)
        else:
            length = raw["num_virtual_tokens"]
            width = embedding_width(model) if kind == "PROMPT_TUNING" else prefix_width(prefix_shape(model))
            expected = {PROMPT: Expected((length, width), torch.float32)}
        check_tensors(expected, tensors, path, left_over)
        check_saved(raw, tensors, path, provenance)
        if kind == "IA3":
            add_ia3(model, config)
            values = {f"{PREFIX}{name}.ia3_l": layer.vector for name, layer in ia3_layers(model).items()}
        elif kind == "PROMPT_TUNING":
            add_prompt(model, PromptConfig(length))
            values = {PROMPT: method_of(model).tokens.embedding}
        else:
            add_prefix(model, PrefixConfig(length))
            values = {PROMPT: method_of(model).tokens.prefix}
        with torch.no_grad():
            for key, value in values.items():
                value.copy_(tensors[key].view_as(value))
    return model


def ia3_of(model: nn.Module, raw: dict, path: Path) -> tuple[IA3Config, dict[str, Expected]]:
    """The layers that the configuration of PEFT names, and what a folder has to hold for them."""
    layers = {name: layer for name, _, layer in places(model) if is_linear(layer)}
    meant, on_input = (
        meaning(raw.get("target_modules") or ()),
        ends_one_of(raw.get("feedforward_modules") or ()),
    )
    targets = [name for name in layers if meant(name)]
    inputs = [name for name in targets if on_input(name)]
    if not targets:
        raise does_not_fit(path, ["target_modules of its configuration match no layer of this model"])
    expected = {}
    for name in targets:
        n_in, n_out = widths(layers[name])
        shape = (1, n_in) if name in inputs else (n_out, 1)
        dtype = torch.promote_types(layers[name].weight.dtype, torch.float32)
        expected[f"{PREFIX}{name}.ia3_l"] = Expected(shape, dtype)
    return IA3Config(outputs=[name for name in targets if name not in inputs], inputs=inputs), expected


def ends_one_of(wanted: str | Sequence[str]) -> Callable[[str], bool]:
    """Does PEFT take a name as meant by an expression, or by ends of names, not only at a dot?"""
    if isinstance(wanted, str):
        return lambda name: matches_whole(wanted, name)
    ends = tuple(wanted)
    return lambda name: name.endswith(ends)


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
    of_kind = OF_IA3 if kind == "IA3" else {"num_virtual_tokens": is_count}
    check_config(
        raw,
        path / CONFIG,
        {"peft_type": KINDS.__contains__, **of_kind},
        {} if kind == "IA3" else {"num_transformer_submodules": (None, 1)},
        PASSED_OVER,
        required=() if kind == "IA3" else ("num_virtual_tokens",),
    )
    check_expressions(path / CONFIG, [raw[key] for key in OF_IA3 if isinstance(raw.get(key), str)])
