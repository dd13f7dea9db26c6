"""The loss of a step of fine-tuning, taken only where it counts, and without ever holding all logits.

    loss = - sum over supervised positions t of  log softmax(W h_t)[token t+1]

The output layer W makes a score for each of 49,152 tokens at each position: in fp32 200 kB a position, more than a
layer of this size keeps of it for the backward pass. Two things keep that small.

- *Only supervised positions.* The loss reads the scores of the completion alone; those of the prompt are never made.
- *A few rows at a time.* With p = softmax(W h), the gradient that goes on to h is (p - onehot) W: all that it needs is at
  hand when the loss of these rows has been taken. So the rows are scored, turned into their gradient, and dropped, before the
  next are scored. Nothing of the scores waits for the backward pass.

The second needs an output layer that is frozen, as under LoRA, and logits that are its output and nothing else (some models
cap or scale them). Otherwise autograd keeps what it needs, as usual.

Sources: chunked cross-entropy, "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024), section 4;
Liger kernel (Hsu et al. 2024), section 3.2, whose gradient in the forward pass this is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.data.batches import IGNORE, Batch
from labkit.training.chunked_loss import _ChunkedLoss, _unchanged, may_be_chunked
from labkit.training.recompute import recompute_activations

LOGITS = ("supervised", "all")


def supervised_loss(model: nn.Module, batch: Batch, logits: str = "supervised") -> Tensor:
    """Sum over the supervised tokens of -log p(token | everything before it), in nats.

    Position t predicts token t + 1, so that targets are shifted by one. With logits="supervised" the output layer
    sees only the positions whose prediction counts: (n_supervised, vocab) logits instead of (batch, time, vocab), and of
    these `ROWS` at a time where the module docstring allows it. "all" is what most trainers do: the same loss, more work.
    """
    targets = batch.targets[:, 1:]  # (batch, time - 1)
    keep = targets != IGNORE
    if logits == "all":
        scores = scores_of(model, batch)[:, :-1][keep]
        return F.cross_entropy(scores.float(), targets[keep], reduction="sum")
    output = model.get_output_embeddings()
    known = _unchanged.get(output)  # None: nobody has looked yet
    in_chunks = may_be_chunked(output) and known is not False
    scored = None  # rows that the model itself scores: all of them
    if in_chunks:
        scored = 0 if known else 1  # one row, to look; then none
    hidden: list[Tensor] = []

    def select(_, arguments):
        hidden.append(arguments[0][:, :-1][keep])  # (n_supervised, width)
        return (hidden[0][None, :scored],)

    hook = output.register_forward_pre_hook(select)
    try:
        scores = scores_of(model, batch)[0]  # (scored, vocab)
    finally:
        hook.remove()
    if not in_chunks:
        return F.cross_entropy(scores.float(), targets[keep], reduction="sum")
    if known is None and len(scores):
        with torch.no_grad():
            _unchanged[output] = torch.equal(scores.float(), output(hidden[0][None, :1])[0].float())
        if not _unchanged[output]:
            return supervised_loss(model, batch, logits)
    return _ChunkedLoss.apply(hidden[0], output.weight, targets[keep])


def scores_of(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a forward pass that keeps no more for the backward pass than it must."""
    with recompute_activations(model):
        return model(input_ids=batch.ids, use_cache=False).logits
