"""(IA)^3: learn one factor per activation, and multiply.

    k <- l_k * W_k x        v <- l_v * W_v x        mlp(x) = W_down (l_ff * h), h the inner activations

Factors start at one, so the untrained model is exactly the base. Scaling a layer's output is diag(l) W,
scaling its input is W diag(l): matrices again, so everything merges into the weights.

*Over a 4-bit base.* diag(l) W scales rows. If a row is a whole number of quantization blocks, merging
multiplies each block's absmax by its row's factor: the codes stay, and the result is exact. (Double-quantized
scales become fp32.) W diag(l) scales *columns*, which cross the blocks. But if h = a(W_gate x) * (W_up x), as
in a gated MLP, l_ff can equally scale W_up's output: `outputs=("k_proj", "v_proj", "up_proj"), inputs=()`
merges exactly.

Source: T-Few (Liu et al. 2022), section 3.3. Agrees with: PEFT `tuners/ia3/layer.py`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from labkit.alternatives.methods import AddedMethod, check_unadapted, install
from labkit.alternatives.sublayers import device_of, layers_named
from labkit.models.stand_in import StandIn
from labkit.models.walk import own_name, unwrap
from labkit.quant.layer_kinds import is_conv1d, widths
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor

# (outputs, inputs): which layers make keys and values, and which reads the inner activations of the MLP
KNOWN_NAMES = (
    (("k_proj", "v_proj"), ("down_proj",)),  # Llama, Mistral, Qwen, Gemma
    (("k_proj", "v_proj"), ("fc2",)),  # OPT, Phi
    # GPT-2 makes queries, keys and values in one layer, and PEFT multiplies all three. The factors on the
    # queries are superfluous: only their product with those on the keys counts. But PEFT's folders have them
    (("c_attn",), ("mlp.c_proj",)),
    (("query_key_value",), ("dense_4h_to_h",)),  # GPT-NeoX, Falcon, Bloom
)


@dataclass(frozen=True)
class IA3Config:
    """What to multiply.

    Args:
        outputs: names, or last parts of names, of layers whose output is multiplied. With None for both, the
            paper's layers are found by the names that Llama-, OPT-, GPT-2- and NeoX-type models give them.
        inputs: the same, of layers whose input is multiplied.

    Raises:
        ValueError: only one of the two is given, both are empty, or a layer is in both.
    """

    outputs: tuple[str, ...] | list[str] | None = None
    inputs: tuple[str, ...] | list[str] | None = None

    def __post_init__(self):
        if (self.outputs is None) != (self.inputs is None):
            raise ValueError("give outputs and inputs, or neither; () for no layer")
        if isinstance(self.outputs, str) or isinstance(self.inputs, str):
            raise ValueError(f"outputs={self.outputs!r}, inputs={self.inputs!r}: give lists of names")
        if self.outputs is not None and not (self.outputs or self.inputs):
            raise ValueError("outputs and inputs are both empty: nothing would be trained")
        both = set(self.outputs or ()) & set(self.inputs or ())
        if both:
            raise ValueError(
                f"{sorted(both)} are in outputs and in inputs; a layer can be in only one of them"
            )


class IA3Linear(StandIn):
    """A linear layer with a learned vector on its output, `l * base(x)`, or on its input, `base(l * x)`.

    Code that reads `weight` and `bias` and multiplies by itself, as PyTorch's attention does, gets those with the
    vector in them: what it computes is right, and trains the vector.

    Args:
        base: `nn.Linear`, `QuantLinear` or GPT-2's `Conv1D`.
        on_input: multiply the input.

    Attributes:
        base_before_merge: the base as it was, while the vector is in the weight of `base`.
        is_used: has a forward pass used the vector?
    """

    def __init__(self, base: nn.Module, on_input: bool):
        super().__init__(base)
        n_in, n_out = widths(base)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # LoRA's reason: small updates
        self.on_input, self.is_used = on_input, False
        self.in_features, self.out_features = n_in, n_out
        self.vector = nn.Parameter(
            torch.ones(n_in if on_input else n_out, device=device_of(base), dtype=dtype)
        )

    @property
    def base_before_merge(self) -> nn.Module | None:
        return self.aside[0] if self.aside else None

    @property
    def is_merged(self) -> bool:
        """Is the vector in the weight of `base`?"""
        return bool(self.aside)

    @property
    def weight(self) -> Tensor:
        """The weight with the vector in it, stored as the base stores its own, a 4-bit one dequantized."""
        self.is_used = True
        if self.is_merged:
            return self.base.weight
        weight = self.base.weight
        weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        if is_conv1d(self.base):
            return self.stretched(weight.T).T.to(weight.dtype)
        return self.stretched(weight).to(weight.dtype)

    def stretched(self, weight: Tensor) -> Tensor:
        """A weight, (out, in), with the vector in it: `diag(l) W`, or on the input `W diag(l)`."""
        return weight * (self.vector[None, :] if self.on_input else self.vector[:, None])

    @property
    def bias(self) -> Tensor | None:
        """The bias, with the vector in it if that is on the output."""
        bias = self.base.bias
        if bias is None or self.on_input or self.is_merged:
            return bias
        return (bias * self.vector).to(bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        self.is_used = True
        if self.is_merged:
            return self.base(x)
        if self.on_input:
            return self.base((x * self.vector).to(x.dtype))
        y = self.base(x)  # (..., out)
        return (y * self.vector).to(y.dtype)

    def put_over(self, base: nn.Module) -> None:
        """Stand over `base`, as this layer did before over it, or over what it was then."""
        was_merged = self.is_merged
        if base is self.plain_base():
            return
        self.aside, self.base = (), base
        self.vector.data = self.vector.to(device_of(base))
        if was_merged:
            self.merge(self.merged_layer())

    def plain_base(self) -> nn.Module:
        """The base without the vector."""
        for kept in self.aside:
            kept.training = self.training
        return self.aside[0] if self.aside else self.base

    def merge(self, merged: nn.Module) -> None:
        """Compute with `merged`, and keep the base aside."""
        self.aside, self.base = (self.base,), merged

    def unmerge(self) -> None:
        """Compute with the very base that `merge` kept."""
        self.base, self.aside = self.plain_base(), ()

    @torch.no_grad()
    def merged_layer(self) -> nn.Module:
        """A layer like `base` that computes what this one does.

        Raises:
            ValueError: a 4-bit layer whose blocks would need more than one factor.
        """
        if isinstance(self.base, QuantLinear):
            return self.merged_in_four_bits()
        if is_conv1d(self.base):
            layer = type(self.base)(self.base.nf, 1)  # its weight and bias are set below
            layer.nx = self.base.nx
        else:
            layer = nn.Linear(self.in_features, self.out_features, self.base.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.base.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return layer.train(self.base.training)

    def merged_in_four_bits(self) -> QuantLinear:
        base, weight = self.base, self.base.weight
        if self.on_input:
            raise ValueError(
                "its input is multiplied, which scales columns, and a block of 4-bit weights has one scale for a piece "
                "of a row. In a gated MLP multiply the output of up_proj instead: "
                "outputs=('k_proj', 'v_proj', 'up_proj'), inputs=()"
            )
        if base.in_features % base.blocksize:
            raise ValueError(
                f"a row has {base.in_features} weights, not a whole number of blocks of {base.blocksize}, so a block "
                "would need two scales. Call dequantize_model(model) first and merge into the 16- or 32-bit weights"
            )
        # (out, blocks per row)
        rows = weight.absmax.view(base.out_features, -1) * self.vector[:, None].float()
        bias = None if base.bias is None else base.bias * self.vector.to(base.bias.dtype)
        layer = QuantLinear(replace(weight, scales=rows.flatten()), bias, base.compute_dtype)
        layer.of_conv1d = base.of_conv1d
        return layer.requires_grad_(False).train(base.training)

    def extra_repr(self) -> str:
        return ("input" if self.on_input else "output") + (", merged" if self.is_merged else "")


def add_ia3(model: nn.Module, config: IA3Config | None = None) -> nn.Module:
    """Freeze `model` and give the layers that `config` names their vectors; in place. Returns `model`.

    Raises:
        ValueError: the model has a method already, or a name matches no layer. Nothing is changed then.
    """
    check_unadapted(model, "(IA)^3")
    config = config or IA3Config()
    if config.outputs is None:
        config = IA3Config(*names_in(model))
    inner, layers, made = unwrap(model), {}, {}
    for names, on_input in ((config.outputs, False), (config.inputs, True)):
        for path, layer in layers_named(inner, tuple(names)).items():
            if id(layer) not in made:  # else it stands in several places, and so does what stands in for it
                made[id(layer)] = IA3Linear(layer, on_input).train(layer.training)
            layers[path] = made[id(layer)]
    return install(model, AddedMethod(config, layers))


def names_in(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(outputs, inputs) for a model whose layers have names that are known here.

    Raises:
        ValueError: they have not.
    """
    for outputs, inputs in KNOWN_NAMES:
        try:
            layers_named(model, outputs + inputs)
        except ValueError:
            continue
        return outputs, inputs
    raise ValueError(
        f"the layers of {type(model).__name__} have none of the names that (IA)^3 knows; say which make keys and "
        "values, and which reads the inner activations of the MLP: IA3Config(outputs=[…], inputs=[…])"
    )


def ia3_layers(model: nn.Module) -> dict[str, IA3Linear]:
    """The layers of `model` with vectors, by the names that they have in the base."""
    return {own_name(model, path): m for path, m in model.named_modules() if isinstance(m, IA3Linear)}


def merge_ia3(model: nn.Module) -> nn.Module:
    """Multiply the vectors into the weights, so they cost nothing from now on; in place. Returns `model`.

    The layers as they were are kept, for `unmerge_ia3`.

    Raises:
        ValueError: there are no vectors, they are merged already, or a 4-bit layer cannot take them. Nothing
            is changed then.
    """
    layers = ia3_layers(model)
    if not layers:
        raise ValueError(f"{type(unwrap(model)).__name__} has no (IA)^3 vectors to merge; call add_ia3 first")
    new = {}
    for name, layer in layers.items():
        if layer.is_merged:
            raise ValueError(f"the vectors are merged already ({name}); unmerge them first")
        try:
            new[name] = layer.merged_layer()
        except ValueError as error:
            raise ValueError(f"{name} is a 4-bit layer that cannot be merged: {error}") from None
    for name, layer in layers.items():
        layer.merge(new[name])
    return model


def unmerge_ia3(model: nn.Module) -> nn.Module:
    """Undo `merge_ia3`: put back the very layers that it kept; in place. Returns `model`.

    (Dividing by the vectors again would not be exact, and fails at zero.)

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for layer in ia3_layers(model).values() if layer.is_merged]
    if not merged:
        raise ValueError(f"{type(unwrap(model)).__name__} has no merged (IA)^3 vectors to unmerge")
    for layer in merged:
        layer.unmerge()
    return model
