"""The LoRA family: each member is one change to `labkit.lora`, and this file holds the changes.

    LoRA      y = W x + s B A x                        s = alpha / r;  A random, B = 0
    rsLoRA    the same, s = alpha / sqrt(r)            the size of the update then holds as r grows    (LoRAConfig.scaling)
    LoRA+     the same, a higher learning rate for B   `parameter_groups`
    DoRA      y = m/n * (W x + s B A x)                n = row norms of W + s B A, m trains: `DoRALinear`
    PiSSA     s B A starts as the r largest singular parts of W, and the frozen base becomes W - s B A: `pissa`
    OLoRA     the same with the first r columns of a QR decomposition: `olora`
    LoftQ     the base is 4-bit, and s B A starts as the best fit to what quantization lost: `loftq`

The last three start from the weight W before it is quantized. So over a 4-bit base they are added by `add_qlora`, which
quantizes afterwards (QPiSSA: the *residual* W - s B A is quantized, whose range is smaller), not by `add_lora` on a model in 4 bits.

Sources: rsLoRA (Kalajdzievski 2023), equation 9; LoRA+ (Hayou et al. 2024), section 4; DoRA (Liu et al. 2024), equation 5 and
section 4.3; PiSSA (Meng et al. 2024), section 3; OLoRA (Büyükakyüz 2024), algorithm 1; LoftQ (Li et al. 2023), algorithm 1.
Agrees with: PEFT `tuners/lora/dora.py`, `layer.py` (`pissa_init`, `olora_init`), torchtune `modules/peft/dora.py`.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.lora import (
    LoRAConfig,
    LoRAEmbedding,
    LoRALinear,
    adapter_in_place,
    add_lora,
    add_product,
    lora_layers,
    put_in_place,
)
from labkit.models.surgery import inside, is_output_layer
from labkit.quant.linear import QuantLinear
from labkit.quant.linears import dense_weight, is_four_bit, is_transposed
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize

LOFTQ_ITERATIONS = 5
OVERSAMPLING = 10  # directions beyond r in a random decomposition, which make the first r more exact (Halko et al., section 4.2)
RANDOM_STARTS = ("default", "gaussian", "b_random", "b_random_small")  # they leave the base as it is


class DoRALinear(LoRALinear):
    """`LoRALinear` that learns the length of each row of the weight apart from its direction.

    A base in 4 bits or 32; the magnitude m starts at the norms of W's rows, so that m/n = 1 and the output is the base's.
    Each forward pass takes the norms again, at the cost of r more rows of x: little in training, much for one token at a
    time, where `labkit.merge` saves it.
    """

    def __init__(self, base: nn.Module, config: LoRAConfig):
        super().__init__(base, config)
        self.measure()
        self.lora_magnitude = nn.Parameter(self.row_norms())  # (out,)

    def measure(self) -> None:
        """Keep |W_i|^2, which changes only if another base takes this one's place (it was quantized, for instance)."""
        squares = dense_weight(self.base).to(self.lora_A.dtype).square().sum(1)
        self.register_buffer("row_squares", squares, persistent=False)  # (out,)
        self.measured = (self.base,)  # in a tuple, so that it does not count as one more module

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """(out,): the norms of the rows of V = W + s B A, a constant for autograd (DoRA, section 4.3).

        V itself, (out, in), is never made: |V_i|^2 = |W_i|^2 + 2 s <(W A^T)_i, B_i> + s^2 |(B A)_i|^2, where W A^T is what the base
        layer makes of the r rows of A, and |(B A)_i|^2 = B_i (A A^T) B_i^T.
        """
        if self.measured[0] is not self.base:
            self.measure()
        A, B, s = self.lora_A, self.lora_B, self.scaling
        WA = self.base(A.to(self.base.weight.dtype)).to(A.dtype)  # (r, out)
        if self.base.bias is not None:
            WA = WA - self.base.bias
        squares = self.row_squares + s * ((2 * WA.T + s * (B @ (A @ A.T))) * B).sum(1)
        return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()  # a row of zeros has m/n = 1 too

    def delta(self) -> Tensor:
        """What the adapter changes in the weight, (out, in); unlike LoRA's its rank is not r."""
        weight = dense_weight(self.base)
        return self.merged_weight(weight) - weight

    def merged_weight(self, weight: Tensor) -> Tensor:
        stretch = (self.lora_magnitude / self.row_norms())[:, None]
        return (stretch * (weight + super().delta())).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)  # (rows, out)
        if self.merged_from is None:
            if self.training:
                rows = self.dropout(rows)
            z = F.linear(rows.to(self.lora_A.dtype), self.lora_A)  # (rows, r)
            y = self.stretch(add_product(y, z, self.lora_B, self.scaling))
        return y.view(*x.shape[:-1], self.out_features)

    def stretch(self, y: Tensor) -> Tensor:
        """m/n times what the layer puts out without its bias, which is not stretched; y (rows, out)."""
        factor, bias = self.lora_magnitude / self.row_norms(), self.base.bias  # (out,)
        stretched = factor * y if bias is None else factor * y + (1 - factor) * bias
        return stretched.to(y.dtype)


def make_layer(base: nn.Module, config: LoRAConfig) -> LoRALinear:
    """The layer of `config`'s variant over `base`, with its start made.

    Raises:
        ValueError: the variant or the start does not work on this kind of layer.
    """
    kind = type(base).__name__
    if isinstance(base, nn.Embedding):
        if config.variant.endswith("dora") or config.init not in RANDOM_STARTS[:2]:
            raise ValueError(
                f"variant={config.variant!r}, init={config.init!r} cannot adapt {kind}: an embedding is looked up, not "
                "multiplied; 'lora' and 'rslora' with init='default' can"
            )
        return LoRAEmbedding(base, config)
    if config.init.startswith("loftq"):
        raise ValueError(
            f"init={config.init!r} fits the adapter to what quantization loses: call labkit.add_qlora(model, config) on a "
            "full-precision model"
        )
    if config.init not in RANDOM_STARTS and is_four_bit(base):
        raise ValueError(
            f"init={config.init!r} splits a weight before it is quantized, and this {kind} is in 4 bits already: load the model "
            "in full precision and call labkit.add_qlora(model, config), which quantizes afterwards"
        )
    if config.init not in RANDOM_STARTS and config.variant.endswith("dora"):
        raise ValueError(
            f"init={config.init!r} changes the base, whose row norms DoRA starts from; use variant='lora' or 'rslora'"
        )
    layer = (DoRALinear if config.variant.endswith("dora") else LoRALinear)(base, config)
    if config.init.startswith("pissa"):
        pissa(layer, int(config.init.rpartition("_")[2]) if "niter" in config.init else None)
    elif config.init == "olora":
        olora(layer)
    return layer


def top_factors(matrix: Tensor, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) such that `scaling * B A` is the best approximation of `matrix` (out, in) of rank r.

    Args:
        matrix: in fp32.
        niter: None for the exact decomposition; or the power iterations of a random one (Halko et al. 2011), which takes a
            fraction of the time: PiSSA, section 4.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(matrix, q=min(r + OVERSAMPLING, *matrix.shape), niter=niter)
        Vh = V.T
    root = (S[:r] / scaling).sqrt()  # half of each singular value to A, half to B
    return root[:, None] * Vh[:r], U[:, :r] * root


def pissa(layer: LoRALinear, niter: int | None = None) -> None:
    """The principal singular parts of W go to the adapter, and train; the rest stays, frozen."""
    split_off(layer, *top_factors(dense_weight(layer.base).float(), layer.r, layer.scaling, niter))


def olora(layer: LoRALinear) -> None:
    """The first r columns of Q and rows of R of W = Q R go to the adapter."""
    Q, R = torch.linalg.qr(dense_weight(layer.base).float())
    split_off(layer, R[: layer.r], Q[:, : layer.r])


def loftq(layer: LoRALinear, iterations: int, **quantization) -> None:
    """Quantize what the adapter does not hold, fit the adapter to what quantization lost, and again: W is about Q + s B A."""
    weight = dense_weight(layer.base).float()  # (out, in)
    held = torch.zeros_like(weight)
    for _ in range(iterations):
        quantized = quantize(weight - held, **quantization)
        A, B = top_factors(weight - quantized.dequantize(torch.float32), layer.r, layer.scaling)
        held = layer.scaling * (B @ A)
    start_from(layer, A, B)
    layer.base = QuantLinear(quantized, layer.base.bias).train(layer.base.training).requires_grad_(False)


def split_off(layer: LoRALinear, A: Tensor, B: Tensor) -> None:
    """Give the layer these factors, and a base with W - s B A. The base of before is left as it was, to go back to."""
    start_from(layer, A, B)
    weight = layer.base.weight
    rest = dense_weight(layer.base).float() - layer.scaling * (B @ A)
    rest = (rest.T if is_transposed(layer.base) else rest).to(weight.dtype).contiguous()
    # a copy of the module that finds its weight made already
    layer.base = copy.deepcopy(layer.base, {id(weight): nn.Parameter(rest, requires_grad=False)})


def start_from(layer: LoRALinear, A: Tensor, B: Tensor) -> None:
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    layer.register_buffer("start_A", layer.lora_A.detach().clone(), persistent=False)
    layer.register_buffer("start_B", layer.lora_B.detach().clone(), persistent=False)


def add_qlora(model: nn.Module, config: LoRAConfig, progress: bool = False, **quantization) -> nn.Module:
    """Put adapters on `model` and its linear layers in 4 bits, in the order that the start of the adapter asks for.

    The random starts: quantize, then add. PiSSA and OLoRA: split the weights, then quantize the rest. LoftQ: both in turn.
    The latter two do not keep the original weights, so such an adapter cannot be disabled or put beside others.

    Args:
        model: in full precision.
        config: see `labkit.LoRAConfig`.
        progress, quantization: see `labkit.quantize_model`.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: see `add_lora` and `quantize_model`.
    """
    skip = [name for name in plain_linears(model) if inside(name, config.modules_to_save)]
    if config.init in RANDOM_STARTS:
        quantize_model(model, skip=tuple(skip), progress=progress, **quantization)
        return add_lora(model, config)
    from labkit.provenance import fingerprint

    start = {"origin": fingerprint(model), "quantization": quantization}
    fit = config.init.startswith("loftq")
    add_lora(model, replace(config, init="default") if fit else config)
    adapter = model.lora_adapters["default"]
    adapter.config, adapter.originals, adapter.start = config, None, start
    model.lora_config = config
    if fit:
        settings = {k: v for k, v in quantization.items() if k != "compute_dtype"}
        number = config.init.rpartition("_")[2]
        for layer in lora_layers(model).values():
            loftq(layer, int(number) if number.isdigit() else LOFTQ_ITERATIONS, **settings)
            layer.base.compute_dtype = quantization.get("compute_dtype")
    train = [p for p in model.parameters() if p.requires_grad]
    if set(plain_linears(model)) - set(skip):
        quantize_model(model, skip=tuple(skip), progress=progress, **quantization)
    for parameter in train:
        parameter.requires_grad_(True)
    return model


def plain_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers that `quantize_model` would quantize."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_output_layer(model, m)]


def plain_factors(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """The adapter as plain LoRA on the *original* weight: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], of rank 2r."""
    if not hasattr(layer, "start_A"):
        return layer.lora_A.detach(), layer.lora_B.detach()
    A = torch.cat([layer.lora_A.detach(), layer.start_A])  # (2r, in)
    B = torch.cat([layer.lora_B.detach(), -layer.start_B], dim=1)  # (out, 2r)
    return A, B


def plain_config(config: LoRAConfig) -> LoRAConfig:
    """The config of `plain_factors`: twice the rank, and the same scaling."""
    if config.init in RANDOM_STARTS:
        return config
    wider = math.sqrt(2) if config.variant.startswith("rs") else 2
    return replace(
        config,
        r=2 * config.r,
        alpha=config.alpha * wider,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: alpha * wider for key, alpha in config.alpha_pattern.items()},
        init="default",
    )


def to_plain_lora(model: nn.Module) -> nn.Module:
    """Turn a PiSSA or OLoRA adapter that is in place into LoRA of rank 2r on the base model as it was; in place.

    The outputs are those of before, but for rounding; the adapter can then be disabled, combined, and served beside others.

    Raises:
        ValueError: no adapter of this kind, it is merged, or (`add_qlora`) the original weights are gone.
    """
    adapter = adapter_in_place(model)
    if adapter is None or adapter.config.init in RANDOM_STARTS:
        raise ValueError("to_plain_lora takes a model with a PiSSA or OLoRA adapter in place")
    if adapter.originals is None or any(
        layer.merged_from is not None for layer in lora_layers(model).values()
    ):
        raise ValueError(
            "the original weights are not at hand: unmerge the adapter first; if add_qlora made it, save it and load it onto "
            "the full-precision base"
        )
    config = plain_config(adapter.config)
    for name, old in adapter.modules.items():
        if isinstance(old, LoRALinear):
            new = type(old)(adapter.originals.pop(name), config.for_layer(name)).train(old.training)
            new.lora_A.data, new.lora_B.data = plain_factors(old)
            adapter.modules[name] = new
    adapter.config = config
    put_in_place(model, model.lora_active)
    return model


def parameter_groups(model: nn.Module, lr: float, ratio: float = 1.0) -> list[Mapping]:
    """The parameters of `model` that train, in groups for an optimizer: LoRA+ gives every B the rate `ratio * lr`.

    Groups differ in nothing but `lr` and `lr_ratio`, by which a schedule multiplies; weight decay is the optimizer's for all.
    (PEFT's LoRA+ also gives DoRA's magnitudes and biases B's rate, and embeddings one of their own; this does not.)

    Raises:
        ValueError: ratio is no positive number, or it is not 1 and there is no B.
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"lora_plus={ratio!r} must be a positive number; the paper's is 16, and 1 is LoRA")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if ratio == 1:
        return [{"params": list(named.values()), "lr": lr, "lr_ratio": 1.0}]
    split = {1.0: [], ratio: []}
    for name, parameter in named.items():
        split[ratio if name.endswith("lora_B") else 1.0].append(parameter)
    if not split[ratio]:
        raise ValueError(f"lora_plus={ratio!r} is a rate for the B matrices of LoRA, and this model has none")
    return [
        {"params": params, "lr": lr * factor, "lr_ratio": factor}
        for factor, params in split.items()
        if params
    ]
