"""Which layers of a model get an adapter: from names and patterns to the layers that they mean.

Every kind of linear layer can have one: see `labkit.quant.layer_kinds`. Two layers are apart. The **output
layer** makes the logits; it is adapted only when it is named. And where its weight is the embedding's
(**tied** embeddings, as in most small models), neither is: an adapter on one leaves the other as it is, and
merging it would change both. `untie_embeddings` makes two weights of the one.

Agrees with: PEFT `tuners/tuners_utils.py`, `check_target_module_exists`, but a target that matches nothing is
an error here.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from labkit.models.surgery import (
    ends_with,
    inside,
    is_output_layer,
    no_match_message,
    tied_partner,
    weight_holders,
)
from labkit.quant.layer_kinds import is_linear
from labkit.quant.linear import QuantLinear

PRESETS = {"all-linear": r".*", "attention": r".*(attn|attention).*", "mlp": r".*(mlp|ffn|feed_forward).*"}


def matching_layers(model: nn.Module, targets: str | Sequence[str], besides: Sequence[str] = ()) -> list[str]:
    """Full names of the layers that `targets` means, in the order of the model; see `labkit.LoRAConfig`.

    Presets and regular expressions choose among the linear layers; names reach embeddings and the output
    layer too.

    Args:
        model: any module.
        targets: a preset, a name, names, or a regular expression of full names.
        besides: names of modules that are trained in full; presets and expressions leave out what is in them.

    Raises:
        ValueError: a target matches nothing, a layer that cannot have an adapter, a tied weight, or (an
            expression) the output layer too.
    """
    modules = {name: module for name, module in model.named_modules() if not inside(name, besides)}
    linears = {name: m for name, m in modules.items() if is_linear(m) and not is_output_layer(model, m)}
    if isinstance(targets, str) and (targets in PRESETS or not targets.isidentifier()):
        matches = matching_pattern(model, targets, linears)
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        matches = [n for n in modules if any(ends_with(n, w) for w in wanted)]
        unmatched = [w for w in wanted if not any(ends_with(n, w) for n in modules)]
        if unmatched:
            raise ValueError(no_match_message(f"targets={unmatched}", unmatched[0], model, linears, PRESETS))
    holders = weight_holders(model)
    for name in matches:
        check_adaptable(model, name, holders)
    return matches


def matching_pattern(model: nn.Module, targets: str, linears: dict[str, nn.Module]) -> list[str]:
    """Names of the `linears` that a preset or a regular expression matches."""
    try:
        pattern = re.compile(PRESETS.get(targets, targets))
    except re.error as error:
        raise ValueError(f"targets={targets!r} is not a regular expression: {error}") from None
    matches = [name for name in linears if pattern.fullmatch(name)]
    if not matches:
        raise ValueError(no_match_message(f"targets={[targets]}", targets, model, linears, PRESETS))
    output = [n for n, m in model.named_modules() if is_output_layer(model, m)]
    if targets not in PRESETS and any(pattern.fullmatch(name) for name in output):
        raise ValueError(
            f"targets={targets!r} also matches {output[0]}, the output layer, which is rarely meant: write "
            "'all-linear' for every linear layer but that one, or name the layers in a list"
        )
    return matches


def check_adaptable(model: nn.Module, name: str, holders: Mapping[int, list]) -> None:
    """Raise a `ValueError` that says why the module `name` cannot have an adapter, if it cannot."""
    module = model.get_submodule(name)
    if not is_linear(module) and not isinstance(module, nn.Embedding):
        raise ValueError(
            f"{name} is a {type(module).__name__}, and LoRA adapts linear layers, Conv1D and embeddings; to "
            f"train it in full, give modules_to_save=[{name.rpartition('.')[2]!r}]"
        )
    partner = tied_partner(model, module, holders)
    if partner:
        raise ValueError(
            f"{name} and {partner} share one weight: an adapter on {name} would leave {partner} as it is, "
            f"and merging it would change both. Take {name} out of targets, or make two weights of the one: "
            "labkit.untie_embeddings(model)"
        )


def saved_names(model: nn.Module, wanted: tuple[str, ...] | list[str]) -> list[str]:
    """Full names of the modules that `modules_to_save` means, by the last parts of their names.

    Raises:
        ValueError: one matches nothing, has nothing to train, or shares its weight with another layer.
    """
    found = []
    for part in wanted:
        names = [name for name, _ in model.named_modules() if ends_with(name, part)]
        for name in names:
            module = model.get_submodule(name)
            if not any(True for _ in module.parameters()) or any(
                isinstance(m, QuantLinear) for m in module.modules()
            ):
                raise ValueError(
                    f"modules_to_save={part!r}: {name} has no weight that could train; leave it out of "
                    f"quantization with quantize_model(model, skip=({part!r},))"
                )
            if tied_partner(model, module):
                raise ValueError(
                    f"modules_to_save={part!r}: {name} shares its weight with "
                    f"{tied_partner(model, module)}, and a copy to train would part them; call "
                    "labkit.untie_embeddings(model) first"
                )
        if not names:
            raise ValueError(f"modules_to_save={part!r} matches no module of {type(model).__name__}")
        found += names
    return found
