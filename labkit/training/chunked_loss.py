"""The fast path of `labkit.training.loss.supervised_loss`: a few rows of scores at a time, and none of them
kept.

With p = softmax(W h), the gradient that goes on to h is (p - onehot) W, and all that it needs is at hand once
the loss of these rows is known. So `ROWS` rows are scored, turned into their gradient, and dropped before the
next.

This needs a frozen output layer, as under LoRA, and logits that are its output and nothing else: Gemma 2 caps
them, Cohere and Granite scale them. That cannot be read off every model, so the first forward pass lets the
output layer score one row, and compares it with the model's logits.

Sources: "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024), section 4; Liger kernel
(Hsu et al. 2024), section 3.2, whose gradient in the forward pass this is.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from labkit.data.batches import IGNORE, Batch
from labkit.models.walk import unwrap
from labkit.training.recompute import recompute_activations

ROWS = 128  # scored at a time: 25 MB in fp32 on a vocabulary of 49,152

# of each output layer seen so far: are the model's logits its output, unchanged?
_unchanged: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def chunked_loss(model: nn.Module, batch: Batch) -> Tensor | None:
    """`supervised_loss(model, batch)`, or None where the module docstring's conditions do not hold."""
    output = unwrap(model).get_output_embeddings()
    known = _unchanged.get(output)  # None: nobody has looked yet
    if known is False or not may_be_chunked(output):
        return None
    targets = batch.targets[:, 1:]  # (batch, time - 1)
    keep = targets != IGNORE
    hidden: list[Tensor] = []

    def catch(_, arguments: tuple[Tensor]) -> tuple[Tensor]:
        hidden.append(arguments[0][:, :-1][keep])  # (n_supervised, width)
        return (hidden[0][None, : 0 if known else 1],)  # the model itself scores one row, to look, or none

    hook = output.register_forward_pre_hook(catch)
    try:
        with recompute_activations(model):
            scores = model(**batch.inputs(), use_cache=False).logits[0]  # (0 or 1, vocab)
    finally:
        hook.remove()
    if known is None and len(scores):
        with torch.no_grad():
            _unchanged[output] = torch.equal(scores.float(), output(hidden[0][None, :1])[0].float())
        if not _unchanged[output]:
            return None
    return ChunkedCrossEntropy.apply(hidden[0], output.weight, targets[keep])


def may_be_chunked(output: nn.Module) -> bool:
    """Is the output layer a frozen `nn.Linear` without a bias, and autocast off?"""
    return (
        type(output) is nn.Linear
        and output.bias is None
        and not output.weight.requires_grad
        and not torch.is_autocast_enabled(output.weight.device.type)
    )


@contextmanager
def assume_unchanged(output: nn.Module, unchanged: bool) -> Iterator[None]:
    """Within the block, take it as known whether the model's logits are the output of this layer."""
    before = _unchanged.get(output)
    _unchanged[output] = unchanged
    try:
        yield
    finally:
        _unchanged.pop(output, None)
        if before is not None:
            _unchanged[output] = before


class ChunkedCrossEntropy(torch.autograd.Function):
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
            total -= scores.gather(1, targets[rows, None]).sum()  # raises for a target that is no id, as -1
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
