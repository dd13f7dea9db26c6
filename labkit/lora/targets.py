"""Which layers of a model get an adapter: from names and patterns to the layers that they mean.

Every kind of linear layer can have one: see `labkit.quant.layer_kinds`. Two layers are apart. The **output
layer** makes the logits; it is adapted only when it is named. And where its weight is the embedding's
(**tied** embeddings, as in most small models), neither is: an adapter on one leaves the other as it is, and
merging it would change both. `untie_embeddings` makes two weights of the one.

Agrees with: PEFT `tuners/tuners_utils.py`, `check_target_module_exists`, but a target that matches nothing is
an error here.
"""

import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.models.surgery import ends_with, inside, no_match_message, tied_partner, weight_holders
from labkit.models.walk import (
    ATTENTION,
    CONV1D,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    PACKED,
    SUBCLASS,
    Layer,
    describe,
    kind_of,
    places,
    unwrap,
    walk,
)
from labkit.quant.linear import QuantLinear

PRESETS = {"all-linear": r".*", "attention": r".*(attn|attention).*", "mlp": r".*(mlp|ffn|feed_forward).*"}
LINEARS = (LINEAR, SUBCLASS, CONV1D, PACKED)  # kinds of layers that are a matrix


def matching_layers(model: nn.Module, targets: str | Sequence[str], besides: Sequence[str] = ()) -> list[str]:
    """Own names of the layers that `targets` means, in the order of the model; see `labkit.LoRAConfig`.

    Presets and regular expressions choose among the linear layers; names reach embeddings and the output
    layer too. A layer in several places is meant by any of its names, and given by the first.

    Args:
        model: any module; names are those of the innermost one (see `labkit.models.walk`).
        targets: a preset, a name, names, or a regular expression of full names.
        besides: names of modules that are trained in full; presets and expressions leave out what is in them.

    Raises:
        ValueError: a target matches nothing, a layer that cannot have an adapter, a tied weight, or (an
            expression) the output layer too.
    """
    layers = [layer for layer in walk(model) if not inside(layer.name, besides)]
    linears = [layer for layer in layers if is_matrix(layer.module) and not layer.is_output]
    if any(layer.name == "" for layer in linears):
        raise ValueError(
            f"the model itself is a {type(unwrap(model)).__name__}, and an adapter takes the place of a layer in a model; "
            "put it into one: nn.Sequential(layer)"
        )
    if isinstance(targets, str) and (targets in PRESETS or not targets.isidentifier()):
        matches = matching_pattern(model, targets, linears)
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        first = first_names(model)
        named = {name: first[id(module)] for name, _, module in places(model) if not inside(name, besides)}
        matches = list(dict.fromkeys(own for n, own in named.items() if any(ends_with(n, w) for w in wanted)))
        unmatched = [w for w in wanted if not any(ends_with(n, w) for n in named)]
        if unmatched:
            names = [layer.name for layer in linears]
            raise ValueError(no_match_message(f"targets={unmatched}", unmatched[0], model, names, PRESETS))
    holders, modules = weight_holders(model), {name: module for name, _, module in places(model)}
    for name in matches:
        check_adaptable(model, name, modules[name], holders)
    return matches


def is_matrix(module: nn.Module) -> bool:
    """Is `module` a linear layer of some kind, so that s B A can be added to what it computes?

    A subclass of `nn.Linear` may have a forward pass that does more, as routers do. It is asked with one x.
    """
    if kind_of(module) != SUBCLASS or type(module).forward is nn.Linear.forward:
        return kind_of(module) in LINEARS
    weight, bias = module.weight, module.bias
    x = torch.linspace(-1, 1, module.in_features, device=weight.device, dtype=weight.dtype)[None]  # (1, in)
    try:
        with torch.no_grad():
            y, expected = module(x), F.linear(x, weight, bias)  # (1, out)
    except Exception:  # whatever it wants, it is not x alone
        return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    return y.is_meta or torch.allclose(y, expected, rtol=1e-2, atol=1e-3)


def first_names(model: nn.Module) -> dict[int, str]:
    """The first own name of each module, by its id."""
    return {id(module): name for name, _, module in reversed(list(places(model)))}


def matching_pattern(model: nn.Module, targets: str, linears: Sequence[Layer]) -> list[str]:
    """Names of the `linears` that a preset or a regular expression matches."""
    try:
        pattern = re.compile(PRESETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"targets={targets!r} is not a regular expression: {error}") from None
    matches = [layer.name for layer in linears if any(map(pattern.fullmatch, layer.names))]
    if not matches:
        names = [layer.name for layer in linears]
        raise ValueError(no_match_message(f"targets={[targets]}", targets, model, names, PRESETS))
    output = [name for layer in walk(model) if layer.is_output for name in layer.names]
    if targets not in PRESETS and any(map(pattern.fullmatch, output)):
        raise ValueError(
            f"targets={targets!r} also matches {output[0]}, the output layer, which is rarely meant: write "
            "'all-linear' for every linear layer but that one, or name the layers in a list"
        )
    return matches


def tell_fused(model: nn.Module, targets: str | Sequence[str], besides: Sequence[str]) -> None:
    """Warn, with the bytes, of matrices that a preset means and that are no layers of their own.

    Args: as for `matching_layers`.
    """
    if not isinstance(targets, str) or targets not in PRESETS:
        return
    passed_by = [
        layer
        for layer in walk(model)
        if (layer.kind in (EXPERTS, ATTENTION) or (layer.kind == SUBCLASS and not is_matrix(layer.module)))
        and re.fullmatch(PRESETS[targets], layer.name)
        and not inside(layer.name, besides)
    ]
    if passed_by:
        warnings.warn(
            f"targets={targets!r} does not reach {describe(passed_by)}: LoRA adapts layers that compute W x + b, and "
            "these hold several matrices as one parameter, or compute more. They stay frozen and as they were",
            stacklevel=5,  # the line that calls add_lora
        )


def check_adaptable(model: nn.Module, name: str, module: nn.Module, holders: Mapping[int, list]) -> None:
    """Raise a `ValueError` that says why `module`, called `name`, cannot have an adapter, if it cannot."""
    if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
        raise ValueError(f"{name} has no weight yet: let the model compute once before it is adapted")
    if kind_of(module) == SUBCLASS and not is_matrix(module):
        raise ValueError(
            f"{name} is a {type(module).__name__}, a linear layer whose forward pass is not W x + b, so a correction of W "
            f"would be one of something else. Take it out of targets; to train it in full, give modules_to_save="
            f"[{name.rpartition('.')[2]!r}]"
        )
    if kind_of(module) not in (*LINEARS, EMBEDDING):
        raise ValueError(
            f"{name} is a {type(module).__name__}, and LoRA adapts linear layers, Conv1D and embeddings; to "
            f"train it in full, give modules_to_save=[{name.rpartition('.')[2]!r}]"
        )
    partner = tied_partner(model, module, holders)
    if partner is not None:
        raise ValueError(
            f"{name} and {partner or type(unwrap(model)).__name__} share one weight: an adapter on {name} would leave the other as it is, "
            f"and merging it would change both. Take {name} out of targets, or make two weights of the one: "
            "labkit.untie_embeddings(model)"
        )


def saved_names(model: nn.Module, wanted: tuple[str, ...] | list[str]) -> list[str]:
    """Own names of the modules that `modules_to_save` means, by the last parts of their names.

    Raises:
        ValueError: one matches nothing, has nothing to train, or shares its weight with another layer.
    """
    found = []
    modules, first = {name: module for name, _, module in places(model)}, first_names(model)
    for part in wanted:
        names = list(dict.fromkeys(first[id(m)] for name, m in modules.items() if ends_with(name, part)))
        for name in names:
            module = modules[name]
            if not any(True for _ in module.parameters()) or any(
                isinstance(m, QuantLinear) for m in module.modules()
            ):
                raise ValueError(
                    f"modules_to_save={part!r}: {name} has no weight that could train; leave it out of "
                    f"quantization with quantize_model(model, skip=({part!r},))"
                )
            if tied_partner(model, module) is not None:
                raise ValueError(
                    f"modules_to_save={part!r}: {name} shares its weight with "
                    f"{tied_partner(model, module)}, and a copy to train would part them; call "
                    "labkit.untie_embeddings(model) first"
                )
        if not names:
            raise ValueError(f"modules_to_save={part!r} matches no module of {type(unwrap(model)).__name__}")
        found += names
    return found
