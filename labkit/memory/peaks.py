"""The moment at which a training step holds the most, and what is there then: a closed form.

Activations pile up in the forward pass and go, block by block, in the backward pass, while gradients pile up.
Between its ends the sum is a straight line in the number of blocks, so the peak is at one of these:

    loss         all activations, and the scores of a few rows
    last block   the blocks' activations, and gradients in the widest place, the MLP
    attention    (eager only) the same at the matrix of scores
    first block  one block's activations, nearly all gradients
    end          all gradients, what the embedding's needs
    optimizer    all gradients

plus what is static. In the MLP four tensors of T f numbers live at once: the gradients of the product and its
factors, and act(gate), recomputed; in `down_proj` three; over a 4-bit layer two, and the dequantized weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from labkit.memory.activations import (
    Decoder,
    Part,
    SavedTensor,
    loss_peak,
    of_block,
    recomputed,
    saved_tensors,
)
from labkit.memory.counting import ModelTensors
from labkit.memory.ledger import LedgerRow
from labkit.memory.setup import Setup, itemsize
from labkit.quant.scratch import SCRATCH_BYTES


@dataclass
class Peak:
    """A moment of the step: bytes of what is temporary, of what is kept (by kind), and of gradients."""

    moment: str
    temporary: int
    kept: dict[str, int]
    gradients: int
    formula: str

    @property
    def bytes(self) -> int:
        return self.temporary + sum(self.kept.values()) + self.gradients

    def adjust(self, row: LedgerRow) -> LedgerRow:
        """A row of gradients with what is there of them at this moment."""
        return replace(row, at_peak=self.gradients) if row.component == "gradients" else row


def peak_of(decoder: Decoder, setup: Setup, tensors: ModelTensors, kept: list[SavedTensor]) -> Peak:
    """The moment with the most bytes, of a step that keeps `kept`."""
    moments = [
        at_the_loss(decoder, setup, kept),
        after_the_loss(decoder, setup, kept),
        in_the_last_block(decoder, setup, tensors, kept),
        in_the_first_block(decoder, setup, tensors, kept),
        at_the_end(decoder, setup, tensors),
    ]
    if setup.attention == "eager":
        moments.append(in_the_last_attention(decoder, setup, kept))
    return max(moments, key=lambda moment: moment.bytes)


def by_kind(kept: Iterable[SavedTensor]) -> dict[str, int]:
    """Bytes of each kind."""
    found: dict[str, int] = {}
    for tensor in kept:
        found[tensor.kind] = found.get(tensor.kind, 0) + tensor.bytes
    return found


def bytes_of(tensors: Iterable[SavedTensor], part: Part) -> int:
    """Bytes of one part of what is kept."""
    return sum(tensor.bytes for tensor in tensors if tensor.part is part)


def bytes_without(tensors: Iterable[SavedTensor], part: Part) -> int:
    """Bytes of all that is kept but one part."""
    return sum(tensor.bytes for tensor in tensors if tensor.part is not part)


def of_the_blocks(kept: Iterable[SavedTensor]) -> list[SavedTensor]:
    """What is still kept when the backward pass reaches the blocks: theirs, and the batch."""
    return [tensor for tensor in kept if tensor.layer is not None or tensor.kind == "inputs"]


def buffer_bytes(setup: Setup, tensors: ModelTensors) -> int:
    """The buffer of `QuantLinear` on a CPU for a dequantized weight: the size of the largest that fits."""
    if setup.device != "cpu":
        return 0
    width = itemsize(setup.compute_dtype or setup.dtype)
    sizes = [width * tensors.parameters[name] for name in tensors.quantized]
    return max((n for n in sizes if n <= SCRATCH_BYTES), default=0)


def dequantized_bytes(setup: Setup, tensors: ModelTensors, layer_name: str) -> int:
    """A dequantized weight of the layers of this name, if it takes new memory; 0 if it is not quantized."""
    width = itemsize(setup.compute_dtype or setup.dtype)
    names = [name for name in tensors.quantized if name.endswith(f".{layer_name}.weight")]
    largest = max((width * tensors.parameters[name] for name in names), default=0)
    return 0 if setup.device == "cpu" and largest <= SCRATCH_BYTES else largest


def gradient_bytes(setup: Setup) -> int:
    """Bytes of a number in the gradient of a weight of the model."""
    return itemsize(setup.gradient_dtype or setup.dtype)


def at_the_loss(decoder: Decoder, setup: Setup, kept: list[SavedTensor]) -> Peak:
    """The end of the forward pass."""
    formula = "scores of the output layer and their softmax"
    return Peak("loss, forward", loss_peak(decoder, setup), by_kind(kept), 0, formula)


def after_the_loss(decoder: Decoder, setup: Setup, kept: list[SavedTensor]) -> Peak:
    """The start of the backward pass: the loss's own gradients, or those of the final norm."""
    n, w, T = setup.n_supervised, setup.width, setup.tokens
    V, d = decoder.shape.vocab_size, decoder.shape.hidden_size
    if decoder.chunked_loss:
        # the gradient at all positions, and RMSNorm's products in fp32
        work = w * T * d + (3 * 4 * T * d if w == 4 else 4 * 4 * T * d)
        return Peak("backward, final norm", work, by_kind(kept), 0, "gradients in the final norm")
    # of the log-likelihood, and of log-softmax: both fp32
    work = 8 * n * V
    if setup.logits == "all":
        if w != 4:
            work = max(work, 4 * n * V + w * n * V)
        # the same at all positions, twice: selecting and shifting each put them into zeros
        T1 = setup.batch_size * (setup.max_length - 1)
        work = max(work, w * (n + T1) * V - 4 * n * V, w * (T1 + T) * V - 4 * n * V)
    return Peak("backward, loss", work, by_kind(kept), 0, "gradients of the scores")


def in_the_last_block(decoder: Decoder, setup: Setup, tensors: ModelTensors, kept: list[SavedTensor]) -> Peak:
    """The backward pass in the MLP of the last block, where it is widest."""
    T, w = setup.tokens, setup.width
    d, f = decoder.shape.hidden_size, decoder.shape.intermediate_size
    last = decoder.shape.num_hidden_layers - 1
    again = [s for s in saved_tensors(decoder, setup) if s.layer == last]
    work = w * T * d  # the gradient of the block's output
    if setup.checkpointing:  # the block has been run again; its input was there already
        work += bytes_without(again, Part.BLOCK_INPUT)
    gradients = 0
    if decoder.embeddings_train:
        own = d * f if decoder.base_trains else 0
        gradients = gradient_bytes(setup) * (decoder.shape.vocab_size * d + own)
    through, weight = through_the_mlp(decoder, setup, tensors, last, again)
    formula = "gradients in the MLP of the last block"
    formula += ", and that block run again" if setup.checkpointing else ""
    formula += ", and its weight dequantized" if weight else ""
    return Peak("backward, last block", work + through, by_kind(of_the_blocks(kept)), gradients, formula)


def through_the_mlp(
    decoder: Decoder, setup: Setup, tensors: ModelTensors, layer: int, again: list[SavedTensor]
) -> tuple[int, int]:
    """What the MLP of a block takes in its backward pass beyond what it keeps, and how much of it is a weight.

    `again`: what this block keeps, for itself or when it is run again.
    """
    Tf = setup.tokens * decoder.shape.intermediate_size
    product = bytes_of(again, Part.PRODUCT)
    weight = dequantized_bytes(setup, tensors, "down_proj")
    if decoder.adapts(layer, "down_proj"):
        # in down_proj: through A, the base, and their sum, never more than at the product; or through A and
        # the base, with the weight
        through = max(at_the_product(decoder, setup), 2 * setup.width * Tf + weight) - product
        if itemsize(setup.adapter_dtype) != setup.width:  # through A in its dtype, its input still there
            through = max(through, itemsize(setup.adapter_dtype) * Tf)
    else:
        through = max(at_the_product(decoder, setup), setup.width * Tf + weight) - product
    if setup.checkpointing:
        through = max(through, running_again(decoder, setup, layer))
    return through, weight


def at_the_product(decoder: Decoder, setup: Setup) -> int:
    """act(gate) · up: the gradients of the product and of its factors, and act(gate) if it is recomputed."""
    many = 4 if recomputed(setup, gate=True) else 3
    return many * setup.width * setup.tokens * decoder.shape.intermediate_size


def running_again(decoder: Decoder, setup: Setup, layer: int) -> int:
    """What an adapter in another dtype than its base takes while a block runs again, beyond what that keeps.

    In `up_proj` there are the base's output, and B A x twice, in the adapter's dtype, before and after scaling.
    Not yet there are the output of `up_proj` and the input of `down_proj`.
    """
    T, w, a = setup.tokens, setup.width, itemsize(setup.adapter_dtype)
    if a == w or not decoder.adapts(layer, "up_proj"):
        return 0
    later = bytes_of(of_block(decoder, setup, layer, grad=True), Part.PRODUCT)
    return 2 * a * T * decoder.shape.intermediate_size - later


def in_the_last_attention(decoder: Decoder, setup: Setup, kept: list[SavedTensor]) -> Peak:
    """The backward pass at the matrix of scores of the last block."""
    shape, w, d = decoder.shape, setup.width, decoder.shape.hidden_size
    scores = setup.batch_size * shape.num_attention_heads * setup.max_length**2
    again = [s for s in saved_tensors(decoder, setup) if s.layer == shape.num_hidden_layers - 1]
    gone = [s for s in again if s.kind == "mlp" or s.part in (Part.MLP_NORM, Part.ATTENTION_SUM)]
    work = 2 * w * setup.tokens * d
    if setup.checkpointing:
        work += bytes_without((s for s in again if s not in gone), Part.BLOCK_INPUT)
    else:
        work -= sum(s.bytes for s in gone)
    # of the probabilities, and of the scores: fp32, and in the working dtype
    work += 2 * 4 * scores if w == 4 else (w + 4 + 4) * scores
    gradients = 0
    if decoder.embeddings_train:
        own = 3 * d * shape.intermediate_size if decoder.base_trains else 0
        gradients = gradient_bytes(setup) * (own + shape.vocab_size * d)
    formula = "gradients of the matrix of scores"
    return Peak("backward, last attention", work, by_kind(of_the_blocks(kept)), gradients, formula)


def in_the_first_block(
    decoder: Decoder, setup: Setup, tensors: ModelTensors, kept: list[SavedTensor]
) -> Peak:
    """The backward pass in the MLP of the first block: nearly all gradients are there."""
    shape, g = decoder.shape, gradient_bytes(setup)
    d, f = shape.hidden_size, shape.intermediate_size
    again = [s for s in saved_tensors(decoder, setup) if s.layer == 0]
    gradients = all_gradients(setup, tensors)
    if decoder.embeddings_train and not tensors.tied:  # the embedding's is still to come
        gradients -= g * shape.vocab_size * d
    if decoder.base_trains:  # and those of the first block's other layers
        gradients -= g * (2 * d * f + 2 * d * shape.q_width + 2 * d * shape.kv_width)
    through, weight = through_the_mlp(decoder, setup, tensors, 0, again)
    if setup.checkpointing:
        through += bytes_without(again, Part.BLOCK_INPUT)
    at = [s for s in kept if s.layer == 0 or s.kind == "inputs"]
    work = setup.width * setup.tokens * d + through
    formula = "gradients in the MLP of the first block"
    formula += ", and its weight dequantized" if weight else ""
    return Peak("backward, first block", work, by_kind(at), gradients, formula)


def at_the_end(decoder: Decoder, setup: Setup, tensors: ModelTensors) -> Peak:
    """All gradients; the embedding's is dense, and a tied one is added to the output layer's in a copy."""
    gradients = all_gradients(setup, tensors)
    if not decoder.embeddings_train:
        return Peak("optimizer", 0, {}, gradients, "none: the fused step works in place")
    V, d = decoder.shape.vocab_size, decoder.shape.hidden_size
    if tensors.tied:
        ends, formula = (
            2 * gradient_bytes(setup) * V * d,
            "both gradients of the tied embedding, and their sum",
        )
    else:
        ends, formula = setup.width * setup.tokens * d, "gradient of its output"
    return Peak("backward, embedding", ends, {}, gradients, formula)


def all_gradients(setup: Setup, tensors: ModelTensors) -> int:
    """Bytes of a gradient for all that trains."""
    trained = tensors.trained(setup).values()
    return sum(n * itemsize(setup.gradient_dtype or dtype) for n, dtype in trained)
