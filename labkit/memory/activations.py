"""What the forward pass of a Llama keeps for the backward pass: a closed form, tensor by tensor.

Autograd keeps, of every operation, what its derivative needs, and only if a gradient will flow. Three rules give the rest:

- A product y = W x keeps x if **W** trains, and W if x needs a gradient. A frozen W keeps no input.
- LoRA's A *does* train, so it keeps its input x, and B its input z = A x (only r numbers a token).
- Anything that is not linear (a norm, silu, attention) keeps its inputs or its output, whether or not any weight trains.

So freezing the weights saves some activations, not all; LoRA on every linear layer takes almost all of them back. And a
tensor that several operations keep is there once: the norm's output is the input of q, k and v.

With T tokens, width d, MLP width f, and q, k, v of H heads and G < H key/value heads of h numbers, a Llama block in fp32 with
LoRA on all linears keeps 4 · (2 T (d + 1) norms + T (2 H h + 2 G h + H) attention + 3 T f MLP + 2 T d residual) bytes and
r numbers a token for each adapter. (Of the MLP: gate, up, and act(gate) · up. A fourth, act(gate), is made again: `labkit.training.recompute`.)

In bf16 there are two more: transformers' RMSNorm computes in fp32 and keeps an fp32 copy of its input; and an fp32 adapter
keeps an fp32 copy of its input, each of q, k and v its own.

Source: `torch/csrc/autograd` (derivatives.yaml); transformers `modeling_llama.py`; derived here, and held against the
tensors that a real step keeps, in `tests/test_memory.py`. Compare Korthikanti et al. 2022, "Reducing Activation
Recomputation", section 4, for the same sum over a GPT block with everything trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from labkit.memory.setup import Setup, itemsize
from labkit.training.chunked_loss import ROWS

KINDS = ("inputs", "residual", "norms", "attention", "mlp", "logits")
RNG_STATE = 5056  # bytes of the CPU generator's state, which checkpointing keeps for each block


@dataclass(frozen=True)
class Block:
    """The shapes of a decoder, and what in it trains.

    Attributes:
        layers, d, f, heads, groups, h, vocab: numbers of layers, width, MLP width, attention heads, key/value heads, numbers
            of a head, size of the vocabulary.
        norms: RMSNorms over the width in a block (2, or 4 in Gemma 2); head_norms: over each head of q and k (Qwen 3).
        trained: is the base trained (full fine-tuning); embeddings: do embedding and output layer train.
        adapted: how many numbers of rank the layer of this name in this block adds; 0 if it has no adapter.
        chunked: is the loss taken a few rows at a time, with its gradient made in the forward pass (`labkit.training.loss`)?
    """

    layers: int
    d: int
    f: int
    heads: int
    groups: int
    h: int
    vocab: int
    norms: int
    head_norms: bool
    trained: bool
    embeddings: bool
    adapted: Callable[[int, str], int]
    chunked: bool


@dataclass(frozen=True)
class Saved:
    """One tensor that is kept: its kind, its bytes, and what it is; `layer` is None outside the blocks."""

    kind: str
    bytes: int
    what: str
    layer: int | None = None


def saved_tensors(block: Block, setup: Setup) -> Iterator[Saved]:
    """Every tensor that lives from the forward pass to the backward pass, without checkpointing."""
    yield from outside(block, setup)
    grad = block.embeddings  # does the input of the block need a gradient?
    for layer in range(block.layers):
        yield from of_block(block, setup, layer, grad)
        grad = grad or block.trained or any(block.adapted(layer, name) for name in PARTS)
    yield from of_norm(block, setup, grad, block.trained, "final norm", None)
    if grad and setup.width == 4:
        yield Saved("residual", 4 * setup.tokens * block.d, "output of the last block, T d")
    yield from of_loss(block, setup)


PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def kept_with_checkpointing(block: Block, setup: Setup) -> Iterator[Saved]:
    """What lives from the forward pass to the backward pass when every block is run again in the backward pass."""
    yield from outside(block, setup)
    T, w = setup.tokens, setup.width
    for layer in range(block.layers):
        yield Saved("residual", w * T * block.d, "input of the block, T d", layer)
        if setup.device == "cpu":
            yield Saved("inputs", RNG_STATE, "state of the random generator", layer)
    yield Saved("inputs", 8 * setup.sequence, "position ids")
    if setup.attention == "eager":
        yield Saved("inputs", w * setup.batch * setup.sequence**2, "causal mask, B S²")
    yield from of_norm(block, setup, True, block.trained, "final norm", None)
    if w == 4:
        yield Saved("residual", 4 * T * block.d, "output of the last block, T d")
    yield from of_loss(block, setup)


def outside(block: Block, setup: Setup) -> Iterator[Saved]:
    """The batch, and the tables of the rotary embedding, shared by all blocks."""
    B, S, w = setup.batch, setup.sequence, setup.width
    yield Saved("inputs", 16 * B * S, "token ids and targets, int64")
    yield Saved("inputs", B * (S - 1), "which positions are supervised")
    yield Saved("inputs", 2 * w * S * block.h, "cos and sin of the positions, S h each")


def of_block(block: Block, setup: Setup, layer: int, grad: bool) -> Iterator[Saved]:
    """What one block keeps; `grad`: does its input need a gradient?"""
    T, w, d, f = setup.tokens, setup.width, block.d, block.f
    q = block.heads * block.h
    adapted = {name: block.adapted(layer, name) for name in PARTS}

    def keeps(*names: str, width: int, what: str, kind: str) -> Iterator[Saved]:
        """The common input of layers `names`: kept once in the working dtype, or copied to that of each adapter."""
        a = itemsize(setup.adapter_dtype)
        if block.trained or (a == w and any(adapted[n] for n in names)):
            yield Saved(kind, w * T * width, what, layer)
        elif a != w:
            for n in names:
                if adapted[n]:
                    own = "attention" if n in PARTS[:4] else "mlp"
                    yield Saved(own, a * T * width, f"{what}, {setup.adapter_dtype} copy of {n}'s A", layer)

    if grad and w == 4:
        yield Saved("residual", 4 * T * d, "input of the block, T d", layer)
    yield from of_norm(block, setup, grad, block.trained, "norm before attention", layer)
    yield from keeps("q_proj", "k_proj", "v_proj", width=d, what="norm's output, T d", kind="norms")
    for name in PARTS:
        if adapted[name]:
            kind = "attention" if name in PARTS[:4] else "mlp"
            a = itemsize(setup.adapter_dtype)
            yield Saved(kind, a * T * adapted[name], f"z of {name}, T r", layer)
    q_grad, k_grad, v_grad = (grad or block.trained or bool(adapted[n]) for n in PARTS[:3])
    if q_grad or k_grad or v_grad:
        if block.head_norms:
            for name, heads in (("q", block.heads), ("k", block.groups)):
                yield Saved("attention", 4 * T * heads * block.h, f"{name} before its norm, fp32", layer)
                yield Saved("attention", 4 * T * heads, f"1 / rms of {name}'s heads", layer)
                if block.trained:
                    yield Saved("attention", w * T * heads * block.h, f"{name} normalized", layer)
        yield from of_attention(block, setup, layer)
    yield from (
        keeps("o_proj", width=q, what="attention's output, T H h", kind="attention")
        if setup.attention == "eager" or (itemsize(setup.adapter_dtype) != w and not block.trained)
        else ()
    )
    inner = grad or block.trained or any(adapted[n] for n in PARTS[:4])
    if inner and w == 4:
        yield Saved("residual", 4 * T * d, "sum after attention, T d", layer)
    yield from of_norm(block, setup, inner, block.trained, "norm before the MLP", layer)
    yield from keeps("gate_proj", "up_proj", width=d, what="norm's output, T d", kind="norms")
    gate = inner or block.trained or bool(adapted["gate_proj"])
    up = inner or block.trained or bool(adapted["up_proj"])
    if gate:
        yield Saved("mlp", w * T * f, "gate, for the derivative of the activation function, T f", layer)
        yield Saved("mlp", w * T * f, "up, for the product, T f", layer)
    if up and not remade(setup, gate):
        yield Saved("mlp", w * T * f, "act(gate), for the product, T f", layer)
    yield from keeps("down_proj", width=f, what="act(gate) · up, T f", kind="mlp")


def remade(setup: Setup, gate: bool) -> bool:
    """Is act(gate) made again in the backward pass (`labkit.training.recompute`)? `gate`: does a gradient flow to the gate?"""
    return setup.recompute_act and gate and not setup.checkpointing


def of_attention(block: Block, setup: Setup, layer: int) -> Iterator[Saved]:
    """q, k, v after the rotary embedding, and what softmax needs: a number a row (SDPA), or the whole matrix (eager)."""
    B, S, T, w = setup.batch, setup.sequence, setup.tokens, setup.width
    q, kv = block.heads * block.h, block.groups * block.h
    yield Saved("attention", w * T * q, "q, rotated, T H h", layer)
    if setup.attention == "sdpa":
        yield Saved("attention", w * T * kv, "k, rotated, T G h", layer)
        yield Saved("attention", w * T * kv, "v, T G h", layer)
        yield Saved("attention", w * T * q, "attention's output, T H h", layer)
        yield Saved("attention", 4 * T * block.heads, "log-sum-exp of each row of scores, T H", layer)
    else:
        yield Saved("attention", w * T * q, "k, rotated and repeated for each head, T H h", layer)
        yield Saved("attention", w * T * q, "v, repeated for each head, T H h", layer)
        yield Saved("attention", 4 * B * block.heads * S * S, "softmax of the scores, fp32, B H S²", layer)
        if w != 4:
            yield Saved("attention", w * B * block.heads * S * S, f"the same in {setup.dtype}", layer)


def of_norm(
    block: Block, setup: Setup, grad: bool, trained: bool, what: str, layer: int | None
) -> Iterator[Saved]:
    """RMSNorm: y = g · x / rms(x), computed in fp32; without its output, which belongs to who needs it."""
    T, w = setup.tokens, setup.width
    if grad:
        if w != 4:
            yield Saved("norms", 4 * T * block.d, f"{what}: its input in fp32, T d", layer)
        yield Saved("norms", 4 * T, f"{what}: 1 / rms, T", layer)
    if trained:
        yield Saved("norms", w * T * block.d, f"{what}: x / rms, for the gradient of g, T d", layer)


def of_loss(block: Block, setup: Setup) -> Iterator[Saved]:
    """What the output layer and the cross-entropy keep."""
    T, n, w = setup.tokens, setup.n_supervised, setup.width
    trained = block.trained or block.embeddings
    if setup.logits == "all":
        if trained:
            yield Saved("logits", w * T * block.d, "input of the output layer, T d")
        yield Saved("logits", 4 * n * block.vocab, "log-softmax, fp32, n V")
        yield Saved("logits", 8 * n, "targets, int64")
    elif block.chunked:
        yield Saved("logits", w * n * block.d, "gradient of the hidden states, made in the forward pass, n d")
    else:
        if trained:
            yield Saved("logits", w * n * block.d, "input of the output layer, n d")
        yield Saved("logits", 4 * n * block.vocab, "log-softmax, fp32, n V")
        yield Saved("logits", 8 * n, "targets, int64")


def loss_peak(block: Block, setup: Setup) -> int:
    """Bytes that the loss takes for a moment beyond what it keeps, in the forward pass."""
    n, w, V = setup.n_supervised, setup.width, block.vocab
    if setup.logits == "all":  # the scores at all positions, and those selected of them; then their softmax
        own = 4 * n * V
        return max(w * setup.tokens * V + w * n * V - own, w * n * V + (4 * n * V if w != 4 else 0))
    if not block.chunked:
        return w * n * V + (4 * n * V if w != 4 else 0)
    of_rows = min(ROWS, n) * V  # their scores in fp32, and in the dtype of the weight where that is another
    return w * n * block.d + 4 * of_rows + (w * of_rows if w != 4 else 0)
