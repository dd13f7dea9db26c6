"""Low-rank adaptation: leave the weight alone, and learn a correction of rank r beside it.

    y = W x + (alpha / r) B A x          A (r, in), B (out, r), r small

W is frozen. Only A and B train: r * (in + out) parameters instead of in * out. A starts random and B at zero,
so before the first step the model is exactly the base; and because B = 0, the first gradient of A is zero and
only B moves. Dividing by r keeps the size of the correction comparable across ranks.

The base is a child module, not a parent class, so it can be anything that maps x to y: a 32-bit linear layer,
a 4-bit one (QLoRA) or GPT-2's transposed one.

Source: LoRA (Hu et al. 2021), section 4.1. Agrees with: PEFT `tuners/lora/layer.py`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.hardware import fast_paths
from labkit.lora.config import LoRAConfig
from labkit.lora.fast import sum_in_place
from labkit.models.stand_in import StandIn
from labkit.quant.layer_kinds import dense_weight, is_four_bit, is_transposed, widths
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor


class LoRALinear(StandIn):
    """A linear layer with a low-rank correction: `base(x) + scaling * B A dropout(x)`.

    It stands in for its base. Code that takes `weight` and multiplies by it gets W + s B A, and trains A and B
    (without the dropout, which there is no x for).

    Args:
        base: `nn.Linear`, `QuantLinear` or Conv1D; frozen by `add_lora`.
        config: rank, scaling, dropout, initialization.

    Attributes:
        start_A, start_B: where A and B started, if the base was changed to make room for them
            (`labkit.lora.starts`).
    """

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, base: nn.Module, config: LoRAConfig):
        super().__init__(base)
        self.scaling = config.scaling
        self.dropout = nn.Dropout(config.dropout)
        self.in_features, self.out_features = widths(base)
        device = base.packed.device if isinstance(base, QuantLinear) else base.weight.device
        # adapters train in at least fp32: their updates are smaller than bf16 can add to them
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.zeros(config.r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r, device=device, dtype=dtype))
        if config.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / config.r)
        elif config.init in ("b_random", "b_random_small"):
            fan_in = config.r if config.init == "b_random" else self.in_features
            nn.init.uniform_(self.lora_B, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        else:  # the starts that use the weight are made later
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def is_merged(self) -> bool:
        """Is the correction in the base's weight?"""
        return bool(self.aside)

    @property
    def base_before_merge(self) -> Tensor | QuantizedTensor | None:
        """The base's weight as it was, while the correction is merged into it."""
        return self.aside[0].weight if self.aside else None

    @property
    def has_own_base(self) -> bool:
        """Did the start change the base, so the adapter is not a correction of the model's own weight?"""
        return self.start_A is not None

    def delta(self) -> Tensor:
        """The correction as a matrix, `scaling * B A`, shape (out, in)."""
        A, B, s = self.lora_A, self.lora_B, self.scaling
        if math.frexp(s)[0] == 0.5:  # a power of two: no bit depends on the order, and B is smaller than B A
            return (s * B) @ A
        return (B @ A).mul_(s)  # in place: new memory costs more than the product

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The one weight that does what `weight`, the base's, (out, in), and the adapter do together.

        The sum is taken in the dtype of the factors, at least fp32, and rounded once to that of `weight`.
        """
        delta = self.delta()
        merged = weight + delta if torch.is_grad_enabled() else delta.add_(weight)
        return merged.to(weight.dtype)

    @property
    def weight(self) -> Tensor | QuantizedTensor:
        """The weight that the layer computes with, the correction in it, stored as the base stores its own.

        That of a 4-bit base is dequantized. Of one in a format that is not ours, it is the packed weight.
        """
        base = self.base
        if self.is_merged or (is_four_bit(base) and not isinstance(base, QuantLinear)):
            return base.weight
        merged = self.merged_weight(dense_weight(base))
        return merged.T if is_transposed(base) else merged

    def forward(self, x: Tensor) -> Tensor:
        """`base(x) + scaling * B A dropout(x)`: (..., in) to (..., out)."""
        if self.is_merged:
            return self.base(x)
        A, B, s = self.lora_A, self.lora_B, self.scaling
        if fast_paths():
            return self.stretch(sum_in_place(x, self.base, self.dropout, A, B, s))
        y = self.base(x)  # (..., out)
        z = F.linear(self.dropout(x).to(A.dtype), A)  # (..., r)
        return self.stretch(y + (s * F.linear(z, B)).to(y.dtype))

    def stretch(self, y: Tensor) -> Tensor:
        """A hook for what changes the whole output, (..., out): LoRA leaves it as it is."""
        return y

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}" + (", merged" if self.is_merged else "")


class LoRAEmbedding(LoRALinear):
    """`LoRALinear` over an embedding: for a one-hot x, A x is a column of A, looked up instead of multiplied.

    A (r, vocabulary) starts at zero and B (width, r) from N(0, 1), as in PEFT; there is no dropout of one-hot
    rows.
    """

    def __init__(self, base: nn.Embedding, config: LoRAConfig):
        super().__init__(base, config)
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids to (..., width)."""
        y = self.base(ids)
        if self.is_merged:
            return y
        z = F.embedding(ids, self.lora_A.T, self.base.padding_idx)  # (..., r)
        scale = getattr(self.base, "embed_scale", 1.0)  # Gemma's embedding multiplies what it looks up
        return y + (scale * self.scaling * F.linear(z, self.lora_B)).to(y.dtype)
