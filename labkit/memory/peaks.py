"""The moment at which a training step holds the most, and what is there then: a closed form.

Activations pile up in the forward pass and go, block by block, in the backward pass, in which the gradients of the weights pile
up. Between its ends the sum is a straight line in the number of blocks, so the most is at one of a few moments:

    loss         all activations, and the scores of the rows of the loss
    last block   all blocks' activations, and the gradients on their way through the widest place of a block, its MLP
    attention    (eager only) the same at the matrix of scores
    first block  one block's activations, and nearly all gradients
    end          all gradients, and what the embedding's needs
    optimizer    all gradients

plus, always, what is static. In the MLP four tensors of T f numbers are there at a time: the gradients of the product and of its two factors, and
act(gate), made again. In `down_proj` three; over a 4-bit layer two, and the dequantized weight. Each form is written beside the operation that it follows; all are held against `simulate` in `tests/test_memory.py`.
"""

from dataclasses import dataclass, replace

from labkit.memory.activations import Block, Saved, loss_peak, of_block, remade, saved_tensors
from labkit.memory.ledger import Row
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

    def adjust(self, row: Row) -> Row:
        """A row of gradients with what is there of them at this moment."""
        return replace(row, at_peak=self.gradients) if row.component == "gradients" else row


def peak_of(block: Block, setup: Setup, shapes, kept: list[Saved]) -> Peak:
    """The moment with the most bytes, of a step that keeps `kept`; `shapes` as in `labkit.memory.formulas.Shapes`."""
    moments = [
        at_the_loss(block, setup, kept),
        after_the_loss(block, setup, kept),
        in_the_last_block(block, setup, shapes, kept),
        in_the_first_block(block, setup, shapes, kept),
        at_the_end(block, setup, shapes),
    ]
    if setup.attention == "eager":
        moments.append(in_the_last_attention(block, setup, kept, shapes))
    return max(moments, key=lambda moment: moment.bytes)


def by_kind(kept: list[Saved]) -> dict[str, int]:
    """Bytes of each kind."""
    found: dict[str, int] = {}
    for tensor in kept:
        found[tensor.kind] = found.get(tensor.kind, 0) + tensor.bytes
    return found


def buffer_bytes(setup: Setup, shapes) -> int:
    """The buffer that `QuantLinear` keeps on a CPU for dequantized weights: the largest that fits its limit."""
    if setup.device != "cpu":
        return 0
    width = itemsize(setup.compute_dtype or setup.dtype)
    sizes = [width * shapes.parameters[name] for name in shapes.quantized]
    return max((n for n in sizes if n <= SCRATCH_BYTES), default=0)


def dequantized_bytes(setup: Setup, shapes, part: str) -> int:
    """A dequantized weight of the layers called `part`, where it takes new memory; 0 if they are not quantized."""
    width = itemsize(setup.compute_dtype or setup.dtype)
    sizes = [width * shapes.parameters[n] for n in shapes.quantized if n.endswith(f".{part}.weight")]
    largest = max(sizes, default=0)
    return 0 if setup.device == "cpu" and largest <= SCRATCH_BYTES else largest


def at_the_loss(block: Block, setup: Setup, kept: list[Saved]) -> Peak:
    """The end of the forward pass."""
    return Peak(
        "loss, forward",
        loss_peak(block, setup),
        by_kind(kept),
        0,
        "scores of the output layer and their softmax",
    )


def after_the_loss(block: Block, setup: Setup, kept: list[Saved]) -> Peak:
    """The start of the backward pass: the loss's own gradients, or those of the final norm."""
    n, w, V, T, d = setup.n_supervised, setup.width, block.vocab, setup.tokens, block.d
    if block.chunked:
        # the gradient at all positions, and RMSNorm's products in fp32
        work = w * T * d + (3 * 4 * T * d if w == 4 else 4 * 4 * T * d)
        return Peak("backward, final norm", work, by_kind(kept), 0, "gradients in the final norm")
    # of the log-likelihood, and of log-softmax: both fp32
    work = 8 * n * V
    if setup.logits == "all" and w != 4:
        work = max(work, 4 * n * V + w * n * V)
    if (
        setup.logits == "all"
    ):  # the same at all positions, twice: selecting and shifting each put them into zeros
        T1 = setup.batch * (setup.sequence - 1)
        work = max(work, w * (n + T1) * V - 4 * n * V, w * (T1 + T) * V - 4 * n * V)
    return Peak("backward, loss", work, by_kind(kept), 0, "gradients of the scores")


def in_the_last_block(block: Block, setup: Setup, shapes, kept: list[Saved]) -> Peak:
    """The backward pass in the MLP of the last block, where it is widest."""
    T, w, d, f = setup.tokens, setup.width, block.d, block.f
    last = block.layers - 1
    again = [s for s in saved_tensors(block, setup) if s.layer == last]
    work = w * T * d  # the gradient of the block's output
    if setup.checkpointing:  # the block has been run again; its input was there already
        work += sum(s.bytes for s in again if s.what != "input of the block, T d")
    product = sum(s.bytes for s in again if s.what.startswith("act(gate) · up"))
    weight = dequantized_bytes(setup, shapes, "down_proj")
    gradients = 0
    if block.adapted(last, "down_proj"):
        # in down_proj: through A, the base, and their sum, never more than at the product; or through A and the base, with the weight
        through = max(at_the_product(block, setup), 2 * w * T * f + weight) - product
        if itemsize(setup.adapter_dtype) != w:  # through A in the adapter's dtype, its input still there
            through = max(through, itemsize(setup.adapter_dtype) * T * f)
    else:
        through = max(at_the_product(block, setup), w * T * f + weight) - product
    if block.embeddings:
        g = itemsize(setup.gradient_dtype or setup.dtype)
        gradients = g * (block.vocab * d + (d * f if block.trained else 0))
    if setup.checkpointing:
        through = max(through, running_again(block, setup, last))
    at = [s for s in kept if s.layer is not None or s.kind == "inputs"]
    formula = "gradients in the MLP of the last block" + (
        ", and that block run again" if setup.checkpointing else ""
    )
    if weight:
        formula += ", and its weight dequantized"
    return Peak("backward, last block", work + through, by_kind(at), gradients, formula)


def at_the_product(block: Block, setup: Setup) -> int:
    """act(gate) · up: the gradients of the product and of its two factors, and act(gate) if it is made again."""
    return (4 if remade(setup, gate=True) else 3) * setup.width * setup.tokens * block.f


def running_again(block: Block, setup: Setup, layer: int) -> int:
    """What an adapter in another dtype than its base takes while the block runs again, beyond all that the block keeps.

    In `up_proj`: the base's output, B A x, and B A x scaled, in the adapter's dtype; not yet there: the output of `up_proj`, and
    the input of `down_proj`.
    """
    T, w, f, a = setup.tokens, setup.width, block.f, itemsize(setup.adapter_dtype)
    if a == w or not block.adapted(layer, "up_proj"):
        return 0
    later = [s for s in of_block(block, setup, layer, True) if s.what.startswith("act(gate) · up")]
    return 2 * a * T * f - sum(s.bytes for s in later)


def in_the_last_attention(block: Block, setup: Setup, kept: list[Saved], shapes) -> Peak:
    """The backward pass at the matrix of scores of the last block."""
    T, w, d = setup.tokens, setup.width, block.d
    last = block.layers - 1
    scores = setup.batch * block.heads * setup.sequence**2
    again = [s for s in saved_tensors(block, setup) if s.layer == last]
    gone = [s for s in again if s.kind == "mlp" or s.what.startswith(("norm before the MLP", "sum after"))]
    work = 2 * w * T * d
    at = [s for s in kept if s.layer is not None or s.kind == "inputs"]
    if setup.checkpointing:
        work += sum(s.bytes for s in again if s not in gone and s.what != "input of the block, T d")
    else:
        work -= sum(s.bytes for s in gone)
    # of the probabilities, and of the scores: fp32, and in the working dtype
    work += 2 * 4 * scores if w == 4 else (w + 4 + 4) * scores
    gradients = 0
    if block.embeddings:
        own = 3 * d * block.f if block.trained else 0
        gradients = itemsize(setup.gradient_dtype or setup.dtype) * (own + block.vocab * d)
    return Peak("backward, last attention", work, by_kind(at), gradients, "gradients of the matrix of scores")


def in_the_first_block(block: Block, setup: Setup, shapes, kept: list[Saved]) -> Peak:
    """The backward pass in the MLP of the first block: nearly all gradients are there."""
    T, w, d, f = setup.tokens, setup.width, block.d, block.f
    again = [s for s in saved_tensors(block, setup) if s.layer == 0]
    product = sum(s.bytes for s in again if s.what.startswith("act(gate) · up"))
    gradients = all_gradients(setup, shapes)
    if block.embeddings and not shapes.tied:  # the embedding's is still to come
        gradients -= itemsize(setup.gradient_dtype or setup.dtype) * block.vocab * d
    if block.trained:  # and those of the first block's other layers
        q, kv = block.heads * block.h, block.groups * block.h
        gradients -= itemsize(setup.gradient_dtype or setup.dtype) * (2 * d * f + 2 * d * q + 2 * d * kv)
    through = at_the_product(block, setup) - product
    if setup.checkpointing:
        through = max(through, running_again(block, setup, 0))
        through += sum(s.bytes for s in again if s.what != "input of the block, T d")
    at = [s for s in kept if s.layer == 0 or s.kind == "inputs"]
    work = w * T * d + through
    formula = "gradients in the MLP of the first block"
    return Peak("backward, first block", work, by_kind(at), gradients, formula)


def at_the_end(block: Block, setup: Setup, shapes) -> Peak:
    """All gradients; an embedding's is made in full, and if it is tied, added to the output layer's in new memory."""
    gradients = all_gradients(setup, shapes)
    if block.embeddings:
        g = itemsize(setup.gradient_dtype or setup.dtype)
        ends = 2 * g * block.vocab * block.d if shapes.tied else setup.width * setup.tokens * block.d
        formula = (
            "both gradients of the tied embedding, and their sum" if shapes.tied else "gradient of its output"
        )
        return Peak("backward, embedding", ends, {}, gradients, formula)
    return Peak("optimizer", 0, {}, gradients, "none: the fused step works in place")


def all_gradients(setup: Setup, shapes) -> int:
    """Bytes of a gradient for all that trains."""
    trained = shapes.trained(setup).values()
    return sum(n * itemsize(setup.gradient_dtype or dtype) for n, dtype in trained)
