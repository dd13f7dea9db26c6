"""Adapters out of what is there already: of a full fine-tune by SVD, and of lower rank out of a trained one.

    extract_adapter      W_tuned - W of each layer, in rank r
    compress_adapter     s B A of each layer, in a lower rank

Of all corrections of rank r, the SVD's is nearest to the whole change. That is not the lowest loss: an adapter
that was trained at rank r has adjusted to it.

Agrees with: PEFT `convert_to_lora`, whose rank below 1 is `energy` here.
"""

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from labkit.lora.combining import combine, config_of
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import check_arguments, make_adapter
from labkit.lora.low_rank import check_rank, decompose, rank_for, truncate
from labkit.lora.mounting import Adapter, attach, check_name, refuse_adapted, standing
from labkit.models.surgery import inside
from labkit.models.walk import adapters_in, walk
from labkit.quant.layer_kinds import dense_weight, is_four_bit


def extract_adapter(
    model: nn.Module,
    tuned: nn.Module,
    r: int | None = 16,
    *,
    energy: float | None = None,
    targets: str | list[str] = "all-linear",
    modules_to_save: list[str] | tuple[str, ...] = (),
    name: str = "default",
) -> nn.Module:
    """Give `model` an adapter that does, in low rank, what full fine-tuning did to `tuned`.

    Args:
        model: the base, from before the fine-tuning; changed in place.
        tuned: after it, with the same layers; stays as it is.
        r: the highest rank; None for no limit but `energy`.
        energy: the share of the squared change that each layer keeps: its rank is the smallest that does.
        targets: which layers, as for `LoRAConfig`. Those that did not change get no correction.
        modules_to_save: modules to take over whole, such as ["lm_head"].
        name: of the adapter.

    Returns:
        `model`. A warning names weights that changed too, and that the adapter does not hold.

    Raises:
        ValueError: r and energy are both None or out of range; either model has adapters or 4-bit weights; the
            layers differ; no layer changed; or a change is NaN or infinite. Nothing is changed then.
    """
    check_rank(r, energy)
    if r is None and energy is None:
        raise ValueError(
            "r and energy are both None; give a rank, such as r=16, or a share, such as energy=0.95"
        )
    config = LoRAConfig(r=1, alpha=1, targets=targets, modules_to_save=modules_to_save)
    check_arguments(model, config)
    check_arguments(tuned, config)
    check_name(name)
    refuse_adapted(model, "extract_adapter")
    if adapters_in(tuned):
        raise ValueError(
            f"tuned has {' and '.join(adapters_in(tuned))} adapters already; save those, or make them part of its "
            "weights with labkit.unload(tuned) first"
        )
    adapter = make_adapter(model, config)
    for path in list(adapter.layers):
        change = change_of(path, model, tuned)
        if not change.any():
            del adapter.modules[path]
            continue
        parts = decompose(change)
        A, B = truncate(parts, rank_for(parts[1], r, energy))
        old = adapter.layers[path]
        layer = type(old)(old.base, LoRAConfig(r=len(A), alpha=len(A)))
        layer.lora_A.data, layer.lora_B.data = A.to(layer.lora_A), B.to(layer.lora_B)
        adapter.modules[path] = layer.train(old.training)
    if not adapter.layers:
        raise ValueError(
            f"no layer of targets={targets!r} differs between the two models; give the base first and the "
            "fine-tuned model second"
        )
    for path in adapter.originals:  # the modules to take over whole
        adapter.modules[path].load_state_dict(standing(tuned, path).state_dict())
    adapter.config = replace(config_of(adapter.layers), modules_to_save=modules_to_save)
    tell_left_out(model, tuned, adapter)
    attach(model, name, adapter)
    return model


@torch.no_grad()
def change_of(name: str, model: nn.Module, tuned: nn.Module) -> Tensor:
    """How the weight of the layer `name` differs in `tuned` from that in `model`, (out, in), in float64."""
    weights = []
    for which, where in (("model", model), ("tuned", tuned)):
        try:
            layer = standing(where, name)
        except KeyError:
            raise ValueError(f"{which} has no layer {name}; give two models of one architecture") from None
        if is_four_bit(layer):
            raise ValueError(
                f"{name} of {which} is in 4 bits, and its rounding errors would count as a change. Give both models "
                "in full precision; labkit.unload(model, dequantize=True) makes one of a QLoRA model"
            )
        weights.append(dense_weight(layer).double())
    before, after = weights
    if before.shape != after.shape:
        raise ValueError(
            f"{name} is {tuple(before.shape)} in model and {tuple(after.shape)} in tuned; give two models of one base"
        )
    change = after - before
    if not change.isfinite().all():
        raise ValueError(
            f"{name} holds NaN or infinity in one of the models; give weights of a run that did not diverge"
        )
    return change


def tell_left_out(model: nn.Module, tuned: nn.Module, adapter: Adapter) -> None:
    """Warn of weights that the fine-tuning changed and `adapter` does not hold."""
    after = {layer.name: layer.module for layer in walk(tuned)}
    changed = []
    for layer in walk(model):
        if inside(layer.name, list(adapter.originals)) or layer.name not in after:
            continue
        held = ("weight",) if layer.name in adapter.layers else ()
        theirs = dict(after[layer.name].named_parameters(recurse=False))
        for part, weight in layer.module.named_parameters(recurse=False):
            if part not in held and part in theirs and not torch.equal(weight, theirs[part]):
                changed.append(f"{layer.name}.{part}")
    if changed:
        warnings.warn(
            f"{len(changed)} weights changed too, and are not in the adapter: {', '.join(changed[:3])}"
            f"{', …' * (len(changed) > 3)}. To take modules over whole, name them in modules_to_save",
            stacklevel=3,
        )


def compress_adapter(
    model: nn.Module, name: str, into: str, r: int | None = None, *, energy: float | None = None
) -> nn.Module:
    """Make the adapter `into`, the best approximation of the adapter `name` of lower rank, and mount it.

    Args:
        model: with the adapter, which stays as it is; changed in place.
        name: of the adapter to compress, of any variant that is a change of the base's weights.
        into: the name of the new one.
        r: the highest rank; None for no limit but `energy`.
        energy: the share of the squared correction that each layer keeps; its rank is the smallest that does.

    Returns:
        `model`.

    Raises:
        ValueError: r and energy are both None or out of range; or see `combine`. Nothing is changed then.
    """
    if r is None and energy is None:
        raise ValueError(
            "r and energy are both None; give a rank, such as r=8, or a share, such as energy=0.95"
        )
    return combine(model, {name: 1.0}, into, "svd", r=r, energy=energy)
