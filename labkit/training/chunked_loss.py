"""DOC"""

import weakref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS = 128  # scored at a time: 25 MB in fp32 on a vocabulary of 49,152


# of each output layer that was seen: are the model's logits its output, unchanged?
_unchanged: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def may_be_chunked(output: nn.Module) -> bool:
    """Is the output layer a frozen `nn.Linear` without a bias, and autocast off?"""
    return (
        type(output) is nn.Linear
        and output.bias is None
        and not output.weight.requires_grad
        and not torch.is_autocast_enabled(output.weight.device.type)
    )


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of W h, with the gradient to h made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden (n, width), weight (vocab, width), targets (n,) to a number."""
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needed else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            scores = F.linear(hidden[rows], weight).float()  # (rows, vocab); the rest is made in its place
            right = torch.arange(len(scores), device=scores.device), targets[rows]
            scores -= scores.amax(-1, keepdim=True)  # exp cannot overflow then
            total -= scores[right].sum()
            sums = scores.exp_().sum(-1, keepdim=True)
            total += sums.log().sum()
            if needed:
                scores.div_(sums)[right] -= 1  # p - onehot
                scores = scores.to(weight.dtype)
                torch.mm(scores, weight, out=gradient[rows])
            del scores  # before the next are made
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None
