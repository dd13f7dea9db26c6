"""The weights of a model with its adapter merged, one at a time, as the plain model of its class names them.

The model itself is not changed, and no second one is made: each weight is merged when it is asked for, and can be
dropped once it is written. The sum W + s B A is taken in fp32 and rounded by the caller, once. A 4-bit base is
dequantized first, so that the sum is that of what the adapter was trained on.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import adapters_of, check_standing, mounted_adapter, standing
from labkit.models.walk import adapters_in, stood_in_for, unwrap
from labkit.quant.layer_kinds import dense_weight, is_four_bit, is_transposed
from labkit.quant.linear import QuantLinear


@dataclass(frozen=True)
class MergedWeight:
    """A weight or buffer of the merged model.

    Attributes:
        name: in the plain model of this class.
        shape: there.
        holder: the module of the model at hand that stands in the place of its module.
    """

    name: str
    shape: tuple[int, ...]
    holder: nn.Module

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The weight: merged, in at least fp32, or as the model holds it if no adapter concerns it."""
        part = self.name.rpartition(".")[2]
        layer = unwrap(self.holder)
        if part != "weight" or not hasattr(layer, "weight"):
            return getattr(layer, part).detach()
        weight = dense_weight(layer)  # (out, in)
        adapter = adapter_on(self.holder)
        if adapter is not None and not adapter.is_merged:
            weight = adapter.merged_weight(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        return weight.T if is_transposed(layer) else weight

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """`compute` in another dtype, contiguous, on the CPU.

        Raises:
            ValueError: it holds NaN or infinity, or what is too large for `dtype`.
        """
        weight = self.compute()
        rounded = (weight.to(dtype) if weight.is_floating_point() else weight).cpu().contiguous()
        if not torch.isfinite(rounded).all():
            before = torch.isfinite(weight).all()
            kind = str(dtype).removeprefix("torch.")
            why = f"numbers too large for {kind}; choose bfloat16 or float32" if before else "NaN or infinity"
            raise ValueError(f"{self.name} holds {why}; nothing was saved")
        return rounded


def adapter_on(holder: nn.Module) -> LoRALinear | None:
    """The adapter among what stands in for a layer; None if there is none."""
    while not isinstance(holder, LoRALinear) and (child := stood_in_for(holder)) is not None:
        holder = holder._modules[child]
    return holder if isinstance(holder, LoRALinear) else None


def merged_weights(model: nn.Module) -> list[MergedWeight]:
    """What the merged model consists of, a weight that several modules share once.

    Args:
        model: a model of transformers, with an adapter mounted, merged or not, or with none at all.

    Raises:
        ValueError: the model has adapters and none is mounted, or adapters that are not ours to merge; or it is not,
            weight by weight, what its config describes.
    """
    check_mergeable(model)
    inner = unwrap(model)
    found: list[MergedWeight] = []
    first: dict[int, MergedWeight] = {}
    for name, expected in plain_state(inner).items():
        path, _, part = name.rpartition(".")
        try:
            weight = MergedWeight(name, tuple(expected.shape), standing(model, path))
            layer = unwrap(weight.holder)
            shape = tuple(getattr(layer, part).shape)
        except (KeyError, AttributeError):
            raise not_as_described(inner, f"{name} is missing") from None
        if is_four_bit(layer) and not isinstance(layer, QuantLinear):
            dense_weight(layer)  # says what can be done about another library's format
        if shape != weight.shape:
            raise not_as_described(inner, f"{name} has shape {shape}, not {weight.shape}")
        other = first.setdefault(id(expected), weight)
        if other is weight:
            found.append(weight)
        elif not torch.equal(weight.compute(), other.compute()):
            raise not_as_described(
                inner,
                f"{name} is tied to {other.name} in it, and has values of its own; call untie_embeddings first",
            )
    return found


def check_mergeable(model: nn.Module) -> None:
    """Raise a `ValueError` if `model` is not of transformers, or has adapters that cannot be merged here."""
    inner = unwrap(model)
    if not hasattr(inner, "config") or not type(inner).__module__.startswith("transformers."):
        raise ValueError(
            f"{type(inner).__name__} is no model of transformers, whose formats are written here"
        )
    others = [one for one in adapters_in(model) if one != "LoRA"]
    if others:
        raise ValueError(
            f"{type(inner).__name__} has {' and '.join(others)}, which cannot be merged here; merge them with their own "
            "library, or take them off"
        )
    adapters = adapters_of(model)
    if adapters.by_name and mounted_adapter(model) is None:
        raise ValueError(
            "no adapter is mounted, so there is nothing to merge: call labkit.use_adapter(model, name) first, with one "
            f"of {', '.join(adapters.by_name)}; or take them off with labkit.unload(model, merged=False)"
        )
    check_standing(model)


def plain_state(inner: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a fresh model of this class and config, without memory; tied ones are one object."""
    with torch.device("meta"):
        plain = type(inner)(copy.deepcopy(inner.config))
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    return {name: parameters.get(name, tensor) for name, tensor in plain.state_dict().items()}


def not_as_described(inner: nn.Module, what: str) -> ValueError:
    return ValueError(
        f"{type(inner).__name__} is not what its config describes: {what}. A model that was changed after it was loaded "
        "keeps its config up to date, as resize_token_embeddings does"
    )
