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

from labkit.alternatives.methods import AddedMethod, check_unadapted, install, method_of
from labkit.alternatives.sublayers import layers_named
from labkit.quant.layer_kinds import is_conv1d, widths
from labkit.quant.linear import QuantLinear

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


class IA3Linear(nn.Module):
    """A linear layer with a learned vector on its output, `l * base(x)`, or on its input, `base(l * x)`.

    Args:
        base: `nn.Linear`, `QuantLinear` or GPT-2's `Conv1D`.
        on_input: multiply the input.
    """

    def __init__(self, base: nn.Module, on_input: bool):
        super().__init__()
        n_in, n_out = widths(base)
        device = base.packed.device if isinstance(base, QuantLinear) else base.weight.device
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # LoRA's reason: small updates
        self.base, self.on_input = base, on_input
        self.vector = nn.Parameter(torch.ones(n_in if on_input else n_out, device=device, dtype=dtype))
        self.is_merged = False  # is the vector in the weight of `base`?

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if self.is_merged:
            return self.base(x)
        if self.on_input:
            return self.base((x * self.vector).to(x.dtype))
        y = self.base(x)  # (..., out)
        return (y * self.vector).to(y.dtype)

    @torch.no_grad()
    def merged_layer(self) -> nn.Module:
        """A layer like `base` that computes what this one does.

        Raises:
            ValueError: a 4-bit layer whose blocks would need more than one factor.
        """
        if isinstance(self.base, QuantLinear):
            return self.merged_in_four_bits()
        weight, bias = self.base.weight, self.base.bias
        factors = self.vector[None, :] if self.on_input else self.vector[:, None]  # of an (out, in) weight
        new = (weight * (factors.T if is_conv1d(self.base) else factors)).to(weight.dtype)
        if is_conv1d(self.base):
            layer = type(self.base)(self.base.nf, 1)  # its weight and bias are set below
            layer.nx = self.base.nx
        else:
            layer = nn.Linear(self.base.in_features, self.base.out_features, bias is not None, device="meta")
        layer.weight = nn.Parameter(new, requires_grad=False)
        if bias is not None:
            bias = bias.clone() if self.on_input else (bias * self.vector).to(bias.dtype)
            layer.bias = nn.Parameter(bias, requires_grad=False)
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
    layers = {
        name: IA3Linear(layer, on_input).train(layer.training)
        for names, on_input in ((config.outputs, False), (config.inputs, True))
        for name, layer in layers_named(model, tuple(names)).items()
    }
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
    """The layers of `model` with vectors, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IA3Linear)}


def merge_ia3(model: nn.Module) -> nn.Module:
    """Multiply the vectors into the weights, so they cost nothing from now on; in place. Returns `model`.

    The layers as they were are kept, for `unmerge_ia3`.

    Raises:
        ValueError: there are no vectors, they are merged already, or a 4-bit layer cannot take them. Nothing
            is changed then.
    """
    layers = ia3_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no (IA)^3 vectors to merge; call add_ia3 first")
    new = {}
    for name, layer in layers.items():
        if layer.is_merged:
            raise ValueError(f"the vectors are merged already ({name}); unmerge them first")
        try:
            new[name] = layer.merged_layer()
        except ValueError as error:
            raise ValueError(f"{name} is a 4-bit layer that cannot be merged: {error}") from None
    method_of(model).base_before_merge = {name: layer.base for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.base, layer.is_merged = new[name], True
    return model


def unmerge_ia3(model: nn.Module) -> nn.Module:
    """Undo `merge_ia3`: put back the very layers that it kept; in place. Returns `model`.

    (Dividing by the vectors again would not be exact, and fails at zero.)

    Raises:
        ValueError: nothing is merged.
    """
    merged = {name: layer for name, layer in ia3_layers(model).items() if layer.is_merged}
    if not merged:
        raise ValueError(f"{type(model).__name__} has no merged (IA)^3 vectors to unmerge")
    kept = method_of(model).base_before_merge
    for name, layer in merged.items():
        layer.base, layer.is_merged = kept.pop(name), False
    return model
