"""The loss of a step of fine-tuning, taken only where it counts.

    loss = - sum over supervised positions t of  log softmax(W h_t)[token t+1]

The output layer W scores each of 49,152 tokens at each position: in fp32 that is 200 kB per position, more
than a layer of this size keeps for its backward pass. But the loss reads only the scores of the completion,
so those of the prompt are never made: the output layer is shown the supervised positions alone. Position t
predicts token t + 1, hence the targets are shifted by one.

`labkit.training.chunked_loss` is the fast path of the same call: it never holds all supervised scores either.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from labkit.data.batches import IGNORE, Batch
from labkit.hardware import fast_paths
from labkit.models.walk import unwrap
from labkit.training.chunked_loss import chunked_loss
from labkit.training.recompute import recompute_activations

LOGITS = ("supervised", "all")


def supervised_loss(model: nn.Module, batch: Batch, logits: str = "supervised") -> Tensor:
    """Sum over the supervised tokens of -log p(token | everything before it), in nats.

    Args:
        model: a causal language model of transformers.
        batch: ids and targets (batch, time).
        logits: "supervised" makes (n_supervised, vocab) scores, a few rows at a time where `chunked_loss`
            can. "all" makes (batch, time, vocab), as most trainers do: the same loss, more work.
    """
    if logits == "supervised" and fast_paths() and (loss := chunked_loss(model, batch)) is not None:
        return loss
    targets = batch.targets[:, 1:]  # (batch, time - 1)
    keep = targets != IGNORE
    with recompute_activations(model):
        if logits == "all":
            scores = model(**batch.inputs(), use_cache=False).logits[:, :-1][keep]
        else:
            with output_layer_sees(model, keep):
                scores = model(**batch.inputs(), use_cache=False).logits[0]
    return F.cross_entropy(scores.float(), targets[keep], reduction="sum")  # scores: (n_supervised, vocab)


@contextmanager
def output_layer_sees(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """Within the block, the output layer is given the positions in `keep`, (batch, time - 1), as one long
    sequence.
    """

    def select(_, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (arguments[0][:, :-1][keep][None],)  # (1, n_supervised, width)

    hook = unwrap(model).get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
