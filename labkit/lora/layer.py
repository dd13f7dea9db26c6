"""Low-rank adaptation: leave the weight alone, and learn a correction of rank r beside it.

    y = W x + (alpha / r) B A x          A: (r, in), B: (out, r), r much smaller than in and out

W is frozen. Only A and B are trained: r * (in + out) parameters instead of in * out. A starts random and B at zero, so
the model before the first step is exactly the base model; and because B = 0, the first gradient of A is zero too and
only B moves. The scaling alpha / r keeps the size of the correction comparable when r is changed.

Why the layer keeps its base as a child module and does not subclass `nn.Linear`: the base can then be anything that
maps x to y: a 32-bit linear, a 4-bit one (QLoRA), or GPT-2's transposed one, and the forward pass need not know which.

Nothing here merges on its own, as `.eval()` does in some libraries: `merge` and `unmerge` are calls that you write.

Source: LoRA (Hu et al. 2021), section 4.1. Agrees with: PEFT `tuners/lora/layer.py`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.lora.config import LoRAConfig
from labkit.lora.fast import add_product
from labkit.quant.linear import QuantLinear
from labkit.quant.linears import widths
from labkit.quant.tensor import QuantizedTensor


class LoRALinear(nn.Module):
    """A linear layer with a low-rank correction: `base(x) + scaling * B A dropout(x)`.

    Args:
        base: `nn.Linear`, `QuantLinear` or Conv1D; frozen by `add_lora`.
        config: rank, scaling, dropout, initialization.
    """

    def __init__(self, base: nn.Module, config: LoRAConfig):
        super().__init__()
        self.base = base
        self.scaling = config.scaling
        self.dropout = nn.Dropout(config.dropout)
        self.merged_from: Tensor | QuantizedTensor | None = None  # the base weight as it was, while merged
        self.in_features, self.out_features = widths(base)
        device = base.packed.device if isinstance(base, QuantLinear) else base.weight.device
        # adapters train in at least fp32: their updates are smaller than bf16 can add to them
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(config.r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r, device=device, dtype=dtype))
        if config.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / config.r)
        elif config.init in ("b_random", "b_random_small"):
            fan_in = config.r if config.init == "b_random" else self.in_features
            nn.init.uniform_(self.lora_B, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        else:  # the starts that use the weight are made later
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """The correction as a matrix, `scaling * B A`, shape (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The one weight that does what `weight`, the base's, (out, in), and the adapter do together."""
        return weight + self.delta().to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)  # (rows, out)
        if self.merged_from is None:
            if self.training:
                rows = self.dropout(rows)
            z = F.linear(rows.to(self.lora_A.dtype), self.lora_A)  # (rows, r)
            y = add_product(y, z, self.lora_B, self.scaling)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}" + (", merged" if self.merged_from is not None else "")


class LoRAEmbedding(LoRALinear):
    """`LoRALinear` over an embedding: for a one-hot x, A x is a column of A, and is looked up instead of multiplied.

    A (r, vocabulary) starts at zero and B (width, r) from N(0, 1), as in PEFT; there is no dropout of one-hot rows.
    """

    def __init__(self, base: nn.Embedding, config: LoRAConfig):
        super().__init__(base, config)
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids to (..., width)."""
        y = self.base(ids)
        if self.merged_from is not None:
            return y
        z = F.embedding(ids, self.lora_A.T, self.base.padding_idx)  # (..., r)
        scale = getattr(self.base, "embed_scale", 1.0)  # Gemma's embedding multiplies what it looks up
        return y + (scale * self.scaling * F.linear(z, self.lora_B)).to(y.dtype)
