"""Where an adapter starts when it starts from the weight W: PiSSA, OLoRA, LoftQ.

    PiSSA     s B A starts as the r largest singular parts of W, and the frozen base becomes W - s B A
    OLoRA     the same with the first r columns of a QR decomposition
    LoftQ     the base is 4-bit, and s B A starts as the best fit to what quantization lost

All three look at W before it is quantized. So over a 4-bit base they are added by `labkit.add_qlora`, which
quantizes afterwards (QPiSSA quantizes the *residual* W - s B A, whose range is smaller), not by `add_lora` on
a model in 4 bits.

Sources: PiSSA (Meng et al. 2024), section 3; OLoRA (Büyükakyüz 2024), algorithm 1; LoftQ (Li et al. 2023),
algorithm 1. Agrees with: PEFT `tuners/lora/layer.py` (`pissa_init`, `olora_init`).
"""

import copy

import torch
from torch import Tensor, nn

from labkit.lora.layer import LoRALinear
from labkit.quant.config import QuantConfig
from labkit.quant.layer_kinds import dense_weight, is_transposed
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import quantize

LOFTQ_ITERATIONS = 5
# directions beyond r in a random decomposition, which make the first r more exact (Halko et al., section 4.2)
OVERSAMPLING = 10


def top_factors(matrix: Tensor, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose `scaling * B A` is the best approximation of `matrix` of rank r.

    Args:
        matrix: in fp32.
        niter: None for the exact decomposition; or the power iterations of a random one (Halko et al. 2011),
            which takes a fraction of the time: PiSSA, section 4.
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


def loftq(layer: LoRALinear, iterations: int, quantization: QuantConfig) -> None:
    """In turns, quantize what the adapter does not hold and fit the adapter to the error: W ~ Q + s B A."""
    weight = dense_weight(layer.base).float()  # (out, in)
    held = torch.zeros_like(weight)
    for _ in range(iterations):
        quantized = quantize(weight - held, quantization)
        A, B = top_factors(weight - quantized.dequantize(torch.float32), layer.r, layer.scaling)
        held = layer.scaling * (B @ A)
    start_from(layer, A, B)
    base = QuantLinear.in_place_of(layer.base, quantized, quantization.compute_dtype)
    layer.base = base.requires_grad_(False)


def split_off(layer: LoRALinear, A: Tensor, B: Tensor) -> None:
    """Give the layer these factors, and a base of its own with W - s B A; the original is left as it was."""
    start_from(layer, A, B)
    weight = layer.base.weight
    rest = dense_weight(layer.base).float() - layer.scaling * (B @ A)
    rest = (rest.T if is_transposed(layer.base) else rest).to(weight.dtype).contiguous()
    # a copy of the module, which takes `rest` for the copy of its weight; its bias does not train either
    layer.base = copy.deepcopy(layer.base, {id(weight): nn.Parameter(rest)}).requires_grad_(False)


def start_from(layer: LoRALinear, A: Tensor, B: Tensor) -> None:
    """Give the layer these factors, and have it remember them."""
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    layer.start_A, layer.start_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
