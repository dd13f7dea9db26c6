"""Which run is this? All that decides its numbers, in values that JSON can hold, compared part by part.

A saved state holds what training changes. Everything else must be the same when a run goes on: settings,
data, and of the model what the state does not hold. The base goes in by its *values* (tied or untied,
compiled or not) in its precision, an adapter by its settings, and the rest of the model by its config and by
the plain numbers in its modules, such as the scaling of a correction or the rate of a dropout.

What may differ: where checkpoints are kept and how often, the bar, the optimizer's budget of memory, device,
threads and versions of packages. None changes more than the last bits. The random start of what trains may
differ too: a saved state replaces it.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import nn

from labkit.data.encoding import Encoded, fingerprint
from labkit.lora.fingerprint import update
from labkit.lora.mounting import mounted_adapter
from labkit.models.walk import own_name, unwrap
from labkit.training.config import TrainConfig

MAY_DIFFER = ("checkpoint_folder", "checkpoint_every", "progress", "state_budget_bytes")
SINCE_0_2 = (
    "held_out",
    "autocast",
    "base",
    "adapter",
    "config",
    "modules",
)  # older checkpoints do not have them
BEFORE = {"batching": "similar"}  # what older checkpoints do not say
HASHES = ("data", "held_out", "base values")  # of no use to a reader
SHOWN = 4  # differences in a message
# what a forward pass or the place of a file leaves on a module
PASSING = (
    "training",
    "gradient_checkpointing",
    "is_used",
    "cut",
    "own_cache",
    "max_seq_len_cached",
    "name_or_path",
)
# keys of a config that change no loss: its origin, how text is generated, how the base is stored or tied
BESIDE = re.compile(
    r"_?name_or_path|transformers_version|architectures|(torch_)?dtype|use_cache|tie_word_embeddings|"
    r"\w+_token_ids?|id2label|label2id|return_dict|output_\w+|quantization_config|gradient_checkpointing|"
    r"pruned_heads"
)


def identity_of(
    model: nn.Module,
    config: TrainConfig,
    examples: list[Encoded],
    total: int,
    held_out: Iterable[Encoded] = (),
) -> dict:
    """What must be the same for a run to go on where another stopped; see the module docstring.

    Args:
        model: as it is when the run starts.
        config: of the run.
        examples: what is trained on.
        total: steps of the whole run.
        held_out: examples on which early stopping decides.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_DIFFER}
    settings |= {"betas": list(config.betas), "data": fingerprint(examples), "total": total}
    settings["held_out"] = fingerprint(list(held_out)) if config.eval_every else None
    device = next(model.parameters()).device.type
    settings["autocast"] = (
        str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    )
    return settings | identity_of_model(model)


def identity_of_model(model: nn.Module) -> dict:
    """The part of `identity_of` that is the model's: base, adapter, config and modules."""
    return {
        "base": hash_frozen(model),
        "adapter": adapter_settings(model),
        "config": config_settings(model),
        "modules": module_settings(model),
    }


def hash_frozen(model: nn.Module) -> dict[str, str]:
    """The dtypes of what does not train, buffers included, and a short hash of names, dtypes, shapes and
    values.
    """
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    held = model.state_dict() | dict(model.named_buffers(remove_duplicate=False))
    frozen = sorted((own_name(model, name), name) for name in held.keys() - trained)
    digest, dtypes = hashlib.sha256(), set()
    for name, path in frozen:
        value = held[path]
        if isinstance(value, torch.Tensor):
            dtypes.add(str(value.dtype).removeprefix("torch."))
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            update(digest, value)
        else:
            digest.update(f"{name} {value!r}".encode())
    return {"dtypes": " and ".join(sorted(dtypes)), "values": digest.hexdigest()[:16]}


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """The method by which the model trains, and its settings; `targets` count by the layers that they choose."""
    adapter, added = mounted_adapter(unwrap(model)), getattr(unwrap(model), "added_method", None)
    config = adapter.config if adapter is not None else getattr(added, "config", None)
    if config is None:
        return {"method": "none"}
    values = plain(config)
    values.pop("targets", None)
    return {"method": type(config).__name__.removesuffix("Config"), **values}


def config_settings(model: nn.Module) -> dict[str, Any]:
    """The config of a model of transformers, without what changes no loss; {} if there is none."""
    config = getattr(unwrap(model), "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    kept = {key: value for key, value in config.to_dict().items() if not BESIDE.fullmatch(key)}
    return kept | {"attention": getattr(config, "_attn_implementation", None)}


def module_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name, with * for the numbers of blocks: the class of the modules and the plain values they hold.

    A value that is the same in all modules of a name stands there once; otherwise there is a list.
    """
    alike: dict[str, list[dict]] = defaultdict(list)
    for path, module in unwrap(model).named_modules():
        alike[re.sub(r"(?<![^.])\d+(?![^.])", "*", path)].append(settings_of(module))
    found: dict[str, dict[str, Any]] = {}
    for name, modules in alike.items():
        values = {key: [held.get(key) for held in modules] for held in modules for key in held}
        found[name] = {k: v[0] if all(one == v[0] for one in v) else v for k, v in values.items()}
    return found


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The class of a module, and its plain attributes; of a module of labkit, its plain properties too."""
    held = dict(vars(module))
    for kind in type(module).__mro__:
        if kind.__module__.startswith("labkit."):
            held |= {k: getattr(module, k) for k, v in vars(kind).items() if isinstance(v, property)}
    shown = {k: plain(v) for k, v in held.items() if k[0] != "_" and k not in PASSING and is_plain(v)}
    return {"class": type(module).__name__, **shown}


def is_plain(value: object) -> bool:
    """Is it a number, a text, or a list of such?"""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return isinstance(value, (bool, int, float, str, torch.dtype, type(None)))


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: lists for tuples, dicts for dataclasses, text for what JSON has no word
    for.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain(one) for key, one in asdict(value).items()}
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in value]
    if isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def differences(recorded: dict, here: dict) -> list[str]:
    """What differs between an identity that was recorded and that of the run at hand, in words; [] if nothing
    does.

    Of the config and the modules only what both know is compared: another version of a library may know more.

    >>> differences({"lr": 0.01, "data": "a"}, {"lr": 0.001, "data": "b"})
    ['lr 0.01 there, 0.001 here', 'data']
    """
    here, found = plain(here), []
    for part, now in here.items():
        if part not in recorded and part in SINCE_0_2:
            continue
        was = recorded.get(part, BEFORE.get(part))
        if isinstance(now, dict) and isinstance(was, dict):
            found += differences_within(part, was, now)
        elif was != now:
            found.append(part if part in HASHES else f"{part} {was} there, {now} here")
    return found


def differences_within(part: str, was: dict, now: dict) -> list[str]:
    """`differences` of a part that has parts."""
    if part != "modules":
        pairs = [(f"{part} {key}", was[key], now[key]) for key in now if key in was]
        return [name if name in HASHES else f"{name} {a} there, {b} here" for name, a, b in pairs if a != b]
    found = [
        f"{key} of {name or 'the model'} {was[name][key]} there, {value} here"
        for name in now
        if name in was
        for key, value in now[name].items()
        if key in was[name] and was[name][key] != value
    ]
    found += [f"a module {name} there, none here" for name in was if name not in now]
    return found + [f"no module {name} there, one here" for name in now if name not in was]


def in_words(different: list[str]) -> str:
    """A list of differences for a message, the first few of them."""
    more = len(different) - SHOWN
    return "; ".join(different[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
