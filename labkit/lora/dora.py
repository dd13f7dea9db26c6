"""DoRA: learn the length of each row of the weight apart from its direction.

    y = m/n * (W x + s B A x)        n = row norms of W + s B A, constant for autograd;  m trains

Source: DoRA (Liu et al. 2024), equation 5 and section 4.3. Agrees with: PEFT `tuners/lora/dora.py`, torchtune
`modules/peft/dora.py`.
"""

import torch
from torch import Tensor, nn

from labkit.lora.config import LoRAConfig
from labkit.lora.layer import LoRALinear
from labkit.quant.layer_kinds import dense_weight


class DoRALinear(LoRALinear):
    """`LoRALinear` that learns the length of each row of the weight apart from its direction.

    The magnitude m starts at the norms of W's rows, so m/n = 1 and the output is the base's. Every forward
    pass takes the norms n again, which costs as much as r more rows of x: little in training, a lot when
    tokens are generated one at a time; `labkit.merge` saves it there.
    """

    row_squares: Tensor | None  # (out,): |W_i|^2, or None while the base has not been measured

    def __init__(self, base: nn.Module, config: LoRAConfig):
        super().__init__(base, config)
        self.lora_magnitude = nn.Parameter(self.row_norms())  # (out,)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "base":  # the rows of another one, which is quantized for example, have other lengths
            self.register_buffer("row_squares", None, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.row_squares = None  # a cast base has other rows, and a cast sum of squares few digits
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.row_squares = None

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """(out,): the norms of the rows of V = W + s B A, a constant for autograd (DoRA, section 4.3).

        V itself, (out, in), is never made: |V_i|^2 = |W_i|^2 + 2 s <(W A^T)_i, B_i> + s^2 |(B A)_i|^2, where
        W A^T is what the base layer makes of the r rows of A, and |(B A)_i|^2 = B_i (A A^T) B_i^T.
        """
        if self.row_squares is None:
            self.row_squares = dense_weight(self.base).to(self.lora_A.dtype).square().sum(1)
        A, B, s = self.lora_A, self.lora_B, self.scaling
        WA = self.base(A.to(self.base.weight.dtype)).to(A.dtype)  # (r, out)
        if self.base.bias is not None:
            WA = WA - self.base.bias
        squares = self.row_squares + s * ((2 * WA.T + s * (B @ (A @ A.T))) * B).sum(1)
        return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()  # a row of zeros has m/n = 1 too

    def delta(self) -> Tensor:
        """What the adapter changes in the weight, (out, in); unlike LoRA's, not of rank r."""
        weight = dense_weight(self.base)
        return self.merged_weight(weight) - weight

    def merged_weight(self, weight: Tensor) -> Tensor:
        stretch = (self.lora_magnitude / self.row_norms())[:, None]
        return (stretch * (weight + super().delta())).to(weight.dtype)

    def stretch(self, y: Tensor) -> Tensor:
        """m/n times what the layer puts out without its bias, which is not stretched; y (..., out)."""
        factor, bias = self.lora_magnitude / self.row_norms(), self.base.bias  # (out,)
        stretched = factor * y if bias is None else factor * y + (1 - factor) * bias
        return stretched.to(y.dtype)
