"""A model of any published shape with random weights, made where it will run, each layer as it will be stored.

Memory and time of a step do not depend on what the weights are. So a 70B model is measured without a file, and a
layer in four bits is *drawn* in four bits:

- NF4 codes of Gaussian weights are nearly equally likely (3.88 of 4 bits of entropy): random bytes stand for them.
- A block's scale is the largest of b magnitudes, P(scale < x) = (2 Φ(x) - 1)^b: a uniform number u gives
  x = Φ⁻¹((1 + u^(1/b)) / 2).
- One factor on all scales gives the config's standard deviation, `initializer_range`.

No weight is ever there in more bits than it is stored in, and drawing its scales takes less for a moment than the
layer itself. All else is initialised by transformers, adapters as by `add_lora`.
"""

import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from labkit.lora.layer import LoRALinear
from labkit.memory.setup import Setup
from labkit.memory.simulation import shaped_model
from labkit.models.shapes import config_of
from labkit.quant.blockwise import NESTED_BLOCKSIZE, quantize_blocks
from labkit.quant.codebooks import codebook as levels_of
from labkit.quant.linear import QuantLinear
from labkit.quant.state import tensors_by_name
from labkit.quant.tensor import NestedScales, QuantizedTensor

USUAL_RANGE = 0.02  # transformers' own default for initializer_range
LARGEST = 6.0  # standard deviations: where u^(1/b) rounds to 1, its quantile is infinite


def random_model(model, setup: Setup, device: torch.device | str = "cpu", seed: int = 0) -> nn.Module:
    """A model with random weights on `device`, quantized and adapted as `setup` says.

    Args:
        model: a name of `known_models()`, a config, or what else `labkit.memory.plan` takes.
        setup: `method`, `dtype`, `r`, `targets` and what else decides how it is stored.
        device: where every tensor is made.
        seed: of the weights; the state of the random generators is afterwards what it was.

    Returns:
        The model, as `real_model` would load it, in training mode.

    Raises:
        ValueError: the model is not known, or has a buffer that transformers does not initialise.
    """
    device = torch.device(device)
    made = shaped_model(config_of(model), setup)  # on the meta device
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    with torch.random.fork_rng([device] if on_gpu else []), torch.no_grad():
        torch.manual_seed(seed)
        fill(made, device)
    return made.train()


def fill(model: nn.Module, device: torch.device) -> None:
    """Give every tensor of `model` memory on `device`, and numbers, module by module."""
    std = getattr(model.config, "initializer_range", None) or USUAL_RANGE
    there: dict[int, nn.Parameter] = {}  # by the id of the parameter on the meta device: tied ones stay tied
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module._buffers.update(tensors_by_name(drawn_weight(module.weight, std, device)))
        allocate(module, there, device)
        if isinstance(module, LoRALinear):
            nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))
            nn.init.zeros_(module.lora_B)
        elif isinstance(module, QuantLinear):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            model._init_weights(module)
        check_filled(name, module)


def allocate(module: nn.Module, there: dict[int, nn.Parameter], device: torch.device) -> None:
    """Put the parameters and buffers of `module` itself, which are on the meta device, on `device`, without numbers.

    Floating buffers are NaN, which shows whether anybody fills them.
    """
    for name, p in module._parameters.items():
        if p is not None:
            if id(p) not in there:
                there[id(p)] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
            module._parameters[name] = there[id(p)]
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            empty = torch.empty_like(buffer, device=device)
            module._buffers[name] = empty.fill_(math.nan) if empty.is_floating_point() else empty.zero_()


def check_filled(name: str, module: nn.Module) -> None:
    """Raise a `ValueError` if a buffer of `module` has kept its NaN."""
    if isinstance(module, QuantLinear):
        return
    for buffer_name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_floating_point() and is_nan(buffer):
            raise ValueError(
                f"transformers does not say how to initialise the buffer {name}.{buffer_name}; "
                "load a real model instead (labkit.memory.real_model)"
            )


def is_nan(buffer: Tensor) -> bool:
    """Does it hold a NaN? A fake tensor holds nothing."""
    return not isinstance(buffer, FakeTensor) and bool(buffer.isnan().any())


def drawn_weight(like: QuantizedTensor, std: float, device: torch.device) -> QuantizedTensor:
    """A random 4-bit weight of the shape and the settings of `like`, whose values have this standard deviation."""
    packed = torch.empty(like.packed.shape, dtype=torch.uint8, device=device).random_(0, 256)
    n_blocks = math.ceil(like.shape.numel() / like.blocksize)
    absmax = drawn_scales(n_blocks, like.blocksize, device)
    levels = levels_of(like.codebook).to(device)  # all sixteen are equally likely
    absmax *= std / (levels.square().mean() * absmax.square().mean()).sqrt()
    scales: Tensor | NestedScales = absmax
    if isinstance(like.scales, NestedScales):
        offset = absmax.mean()
        codes, nested = quantize_blocks(absmax.sub_(offset), levels_of("dynamic8"), NESTED_BLOCKSIZE)
        scales = NestedScales(codes, nested, offset)
    return QuantizedTensor(packed, scales, like.shape, like.dtype, like.codebook, like.blocksize)


def drawn_scales(n: int, blocksize: int, device: torch.device) -> Tensor:
    """(n,) fp32: the largest magnitude of each of n blocks of standard normal numbers."""
    u = torch.rand(n, device=device).pow_(1 / blocksize)
    return torch.special.ndtri(u.add_(1).div_(2)).clamp_(max=LARGEST)
