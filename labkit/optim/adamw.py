"""AdamW, and AdamW with its two moments in 8 bits: what an optimizer keeps for every parameter.

For a gradient g, every step,

    m ← β₁ m + (1 - β₁) g            exp_avg: the mean gradient
    v ← β₂ v + (1 - β₂) g²           exp_avg_sq: the mean square
    w ← w - lr λ w                   weight decay, apart from the gradient ("W")
    w ← w - lr m̂ / (√v̂ + ε),         m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)

m and v are as large as the parameter: eight bytes per number in fp32. `AdamW8bit` keeps 2.03.

Source: Adam (Kingma & Ba 2015); decoupled weight decay (Loshchilov & Hutter 2017); 8-bit Optimizers
(Dettmers et al. 2021), section 2.
Agrees, bit for bit, with: `torch.optim.AdamW(foreach=False, fused=False)`; `AdamW8bit` with bitsandbytes' on
a CPU in the update of w.
"""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from labkit.checks import check_number, check_whole, is_number
from labkit.optim.moments import BLOCKSIZE, MAPS, quantize_moments, read_moments, zero_moments
from labkit.optim.saved_state import check_state_dict

MIN_8BIT_SIZE = 4096  # numbers; a smaller tensor keeps its state in fp32, as with bitsandbytes
PIECE = 1 << 20  # numbers updated at a time; a multiple of the block size


class AdamW(torch.optim.Optimizer):
    """AdamW with fp32 state (the state of a half-precision parameter is in its own dtype, as in PyTorch).

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root: a parameter whose gradients were all zero is not divided by zero.
        weight_decay: share of the weight that a step of size lr takes off.

    Raises:
        ValueError: a value is out of its range; in `step`, a gradient is sparse or complex.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, param_group: dict) -> None:
        """See PyTorch; the settings are checked first."""
        self.check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @staticmethod
    def check_settings(group: Mapping) -> None:
        """Raise a `ValueError` unless every setting of a group can be."""
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, group[name], at_least=0)
        betas = group["betas"]
        two = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not two or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas!r} must be two numbers from 0 up to, not including, 1")

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse or p.grad.is_complex():
                    kind = "sparse" if p.grad.is_sparse else "complex"
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} has a {kind} gradient; AdamW needs a dense, "
                        "real one. (nn.Embedding(sparse=True) makes sparse ones: leave it out.)"
                    )
                state = self.state[p]
                if not state:
                    self.init_state(p, state)
                state["step"] += 1
                self.update(p, p.grad, state, group)
        return loss

    def init_state(self, p: Tensor, state: dict) -> None:
        """Zero moments, of the parameter's shape and dtype, and a step count."""
        if p.dtype == torch.float16 and not p.is_meta:
            warnings.warn(
                "the moments of a float16 parameter are in float16, as in PyTorch: of a gradient below 0.005 the "
                "square, and ε, are zero there, and the weight becomes infinite. Train it in float32 or bfloat16, "
                "or with AdamW8bit, whose moments are not in half precision",
                stacklevel=4,
            )
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def layouts(self, p: Tensor) -> list[dict]:
        """What a state of `p` may look like, in tensors without numbers; the first is that of a new one."""
        state: dict = {}
        self.init_state(torch.empty_like(p, device="meta"), state)
        return [state]

    def load_state_dict(self, state_dict: dict) -> None:
        """See PyTorch.

        Raises:
            ValueError: a state of another kind of optimizer, or of other parameters. Nothing was changed.
        """
        check_state_dict(self, state_dict)
        super().load_state_dict(state_dict)

    def update(self, p: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        """One step of one parameter, in place."""
        adam(p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"].item(), group)


def adam(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: float, group: dict) -> None:
    """The four lines of the module's head, in place; all tensors of one shape.

    The operations and their order are PyTorch's: `lerp` rounds differently from a product and a sum, and so
    does every other way to write these lines.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5
    p.addcdiv_(exp_avg, root.add_(group["eps"]), value=-lr / (1 - beta1**step))


class AdamW8bit(AdamW):
    """AdamW with both moments in 8 bits: 2.03 bytes of state per number instead of 8.

    Moments are stored in blocks of 256, with one byte per number and one fp32 scale per block. Every step
    dequantizes a piece, updates it in fp32, and quantizes it again: a million numbers at a time, or the fp32
    copies of both moments would take, for a moment, what 8 bits have saved. The codebook is `dynamic8`, since
    moments span many powers of ten within a tensor; v is never negative, so its map has no sign and twice the
    levels. Biases and norms stay in fp32: they take large steps and next to no bytes.

    Rounding keeps what holds for exact moments (`labkit.optim.moments`), so that no step is longer than exact
    AdamW's longest: lr · K √(1 - β₂ᵗ) / (1 - β₁ᵗ), with K = 7.27 for the usual betas.

    State of a parameter of n numbers: `exp_avg` and `exp_avg_sq` (n,) uint8, `exp_avg_absmax` and
    `exp_avg_sq_absmax` (ceil(n / 256),) fp32, and `step`. Below `min_8bit_size` the moments are fp32, of the
    parameter's shape.

    Args:
        params, lr, betas, eps, weight_decay: see `AdamW`.
        min_8bit_size: the fewest numbers for which the state is in 8 bits.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, min_8bit_size=MIN_8BIT_SIZE
    ):
        check_whole("min_8bit_size", min_8bit_size, at_least=0)
        self.min_8bit_size = min_8bit_size
        super().__init__(params, lr, betas, eps, weight_decay)

    def __getstate__(self) -> dict:
        """What a copy (deepcopy, pickle) has; PyTorch's leaves out the attributes of subclasses."""
        return super().__getstate__() | {"min_8bit_size": self.min_8bit_size}

    def init_state(self, p: Tensor, state: dict) -> None:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        if p.numel() < self.min_8bit_size:
            state["exp_avg"] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
            state["exp_avg_sq"] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        else:
            state |= zero_moments(p)

    def layouts(self, p: Tensor) -> list[dict]:
        """A small parameter's state may be in 8 bits too, saved with another `min_8bit_size`."""
        eight = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            **zero_moments(torch.empty_like(p, device="meta")),
        }
        return [*super().layouts(p), eight]

    def update(self, p: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        step, whole, flat_grad = state["step"].item(), p.reshape(-1), grad.reshape(-1)  # views, if contiguous
        for first in range(0, p.numel(), PIECE):
            at = slice(first, first + PIECE)
            blocks = slice(first // BLOCKSIZE, (first + PIECE) // BLOCKSIZE)
            w, g = whole[at].float(), flat_grad[at].float()  # (PIECE,) fp32, or fewer
            if "exp_avg_absmax" in state:
                m, v = read_moments(state, at, blocks, group["betas"])
            else:
                m, v = state["exp_avg"].view(-1)[at], state["exp_avg_sq"].view(-1)[at]
            # as bitsandbytes writes it, which rounds differently from `adam` in the last bit
            (beta1, beta2), lr = group["betas"], group["lr"]
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if group["weight_decay"]:
                w.mul_(1 - lr * group["weight_decay"])
            root = v.sqrt() / math.sqrt(1 - beta2**step)
            w.addcdiv_(m, root.add_(group["eps"]), value=-lr / (1 - beta1**step))
            whole[at] = w
            if "exp_avg_absmax" in state:
                for name, (codes, absmax) in zip(MAPS, quantize_moments(m, v, g), strict=True):
                    state[name][at], state[f"{name}_absmax"][blocks] = codes, absmax
        if not p.is_contiguous():
            p.copy_(whole.view_as(p))

    @torch.no_grad()
    def moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq of a parameter in fp32, of its shape."""
        state = self.state[p]
        if "exp_avg_absmax" not in state:
            return state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        betas = next(g["betas"] for g in self.param_groups if any(q is p for q in g["params"]))
        m, v = read_moments(state, slice(None), slice(None), betas)
        return m.view(p.shape), v.view(p.shape)

    def load_state_dict(self, state_dict: dict) -> None:
        """See `AdamW`. PyTorch would cast all state to the parameter's dtype; here each tensor keeps its own."""
        check_state_dict(self, state_dict)
        super().load_state_dict({**state_dict, "state": {}})  # the settings, and an empty state to fill
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if state_dict["state"].get(i):
                saved = {key: torch.as_tensor(value) for key, value in state_dict["state"][i].items()}
                self.state[p] = {
                    key: value.clone() if key == "step" else value.to(p.device, copy=True)
                    for key, value in saved.items()
                }
