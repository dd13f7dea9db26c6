"""What the forward pass of a Llama keeps for the backward pass: a closed form, tensor by tensor.

Autograd keeps, of every operation, what its derivative needs, and only if a gradient will flow:

- A product y = W x keeps x if **W** trains, not if it is frozen.
- LoRA's A trains: it keeps its input x, and B keeps z = A x.
- What is not linear (a norm, silu, attention) keeps inputs or output, whatever trains.

So freezing weights saves some activations, and LoRA on every layer takes most back. For T tokens in fp32,
with width d, MLP width f, H heads of queries and G of keys of h numbers each, a block keeps

    2T(d+1) in norms, T(2Hh + 2Gh + H) in attention, 3Tf in the MLP, 2Td between them, 7Tr in adapters

Source: `torch/csrc/autograd/derivatives.yaml`, transformers' `modeling_llama.py`; Korthikanti et al. 2022.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from labkit.memory.setup import Setup, itemsize
from labkit.models.shapes import DecoderShape
from labkit.training.chunked_loss import ROWS

KINDS = ("inputs", "residual", "norms", "attention", "mlp", "logits")
QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION_LAYERS = (*QKV, "o_proj")
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")
RNG_STATE = 5056  # bytes of the CPU generator's state, which checkpointing keeps for each block


@dataclass(frozen=True)
class Decoder:
    """A decoder, and what in it trains.

    Attributes:
        shape: its sizes.
        head_norms: is there an RMSNorm over each head of q and k (Qwen 3)?
        base_trains: full fine-tuning; embeddings_train: do the embedding and the output layer train?
        adapted: (block, name of the layer) of every adapter.
        chunked_loss: is the loss taken a few rows at a time, and its gradient made in the forward pass
            (`labkit.training.chunked_loss`)?
    """

    shape: DecoderShape
    head_norms: bool
    base_trains: bool
    embeddings_train: bool
    adapted: frozenset[tuple[int, str]]
    chunked_loss: bool

    def adapts(self, layer: int, *names: str) -> bool:
        """Does one of these layers of a block have an adapter?"""
        return any((layer, name) in self.adapted for name in names)

    def trains(self, layer: int, *names: str) -> bool:
        """Does one of these layers of a block train, itself or by its adapter?"""
        return self.base_trains or self.adapts(layer, *names)


class Part(Enum):
    """What a moment of `labkit.memory.peaks` asks for among the tensors that are kept."""

    BLOCK_INPUT = auto()
    SCORES = auto()  # softmax of q k, as eager attention keeps it
    ATTENTION_SUM = auto()  # the residual stream between attention and the MLP
    MLP_NORM = auto()  # of the norm between attention and the MLP
    PRODUCT = auto()  # act(gate) · up, and its copies in an adapter's dtype


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that is kept.

    Attributes:
        kind: one of `KINDS`.
        bytes: its size.
        what: what it is, for people.
        layer: the number of its block; None outside the blocks.
        part: what it is, for code that looks for it.
    """

    kind: str
    bytes: int
    what: str
    layer: int | None = None
    part: Part | None = None


def saved_tensors(decoder: Decoder, setup: Setup) -> Iterator[SavedTensor]:
    """Every tensor that lives from the forward pass to the backward pass, without checkpointing."""
    yield from outside(decoder, setup)
    grad = decoder.embeddings_train  # does the input of the block need a gradient?
    for layer in range(decoder.shape.num_hidden_layers):
        yield from of_block(decoder, setup, layer, grad)
        grad = grad or decoder.trains(layer, *ATTENTION_LAYERS, *MLP_LAYERS)
    yield from of_norm(decoder, setup, grad, "final norm")
    if grad and setup.width == 4:
        yield SavedTensor(
            "residual", 4 * setup.tokens * decoder.shape.hidden_size, "output of the last block, T d"
        )
    yield from of_loss(decoder, setup)


def kept_with_checkpointing(decoder: Decoder, setup: Setup) -> Iterator[SavedTensor]:
    """What lives from the forward pass to the backward pass when every block is run again in the latter."""
    yield from outside(decoder, setup)
    T, w, d = setup.tokens, setup.width, decoder.shape.hidden_size
    for layer in range(decoder.shape.num_hidden_layers):
        yield SavedTensor("residual", w * T * d, "input of the block, T d", layer, Part.BLOCK_INPUT)
        if setup.device == "cpu":
            yield SavedTensor("inputs", RNG_STATE, "state of the random generator", layer)
    yield SavedTensor("inputs", 8 * setup.max_length, "position ids")
    if setup.attention == "eager":
        yield SavedTensor("inputs", w * setup.batch_size * setup.max_length**2, "causal mask, B S²")
    yield from of_norm(decoder, setup, True, "final norm")
    if w == 4:
        yield SavedTensor("residual", 4 * T * d, "output of the last block, T d")
    yield from of_loss(decoder, setup)


def outside(decoder: Decoder, setup: Setup) -> Iterator[SavedTensor]:
    """The batch, and the tables of the rotary embedding, which all blocks share."""
    B, S, w = setup.batch_size, setup.max_length, setup.width
    yield SavedTensor("inputs", 16 * B * S, "token ids and targets, int64")
    yield SavedTensor("inputs", B * (S - 1), "which positions are supervised")
    yield SavedTensor("inputs", 2 * w * S * decoder.shape.head_dim, "cos and sin of the positions, S h each")


def of_block(decoder: Decoder, setup: Setup, layer: int, grad: bool) -> Iterator[SavedTensor]:
    """What one block keeps; `grad`: does its input need a gradient?"""
    yield from of_first_half(decoder, setup, layer, grad)
    yield from of_second_half(decoder, setup, layer, grad or decoder.trains(layer, *ATTENTION_LAYERS))


def of_first_half(decoder: Decoder, setup: Setup, layer: int, grad: bool) -> Iterator[SavedTensor]:
    """x + attention(norm(x))."""
    T, w, d = setup.tokens, setup.width, decoder.shape.hidden_size
    if grad and w == 4:
        yield SavedTensor("residual", 4 * T * d, "input of the block, T d", layer, Part.BLOCK_INPUT)
    yield from of_norm(decoder, setup, grad, "norm before attention", layer)
    yield from common_input(decoder, setup, layer, QKV, d, "norm's output, T d", "norms")
    yield from inside_adapters(decoder, setup, layer, ATTENTION_LAYERS)
    if grad or decoder.trains(layer, *QKV):
        yield from of_attention(decoder, setup, layer)
    # the fused attention has kept its output, the input of o_proj, and only a copy in another dtype comes on
    # top
    if setup.attention == "eager" or (itemsize(setup.adapter_dtype) != w and not decoder.base_trains):
        width = decoder.shape.q_width
        yield from common_input(
            decoder, setup, layer, ("o_proj",), width, "attention's output, T H h", "attention"
        )


def of_second_half(decoder: Decoder, setup: Setup, layer: int, grad: bool) -> Iterator[SavedTensor]:
    """x + mlp(norm(x)), with mlp(x) = down(act(gate(x)) · up(x))."""
    T, w, d, f = setup.tokens, setup.width, decoder.shape.hidden_size, decoder.shape.intermediate_size
    if grad and w == 4:
        yield SavedTensor("residual", 4 * T * d, "sum after attention, T d", layer, Part.ATTENTION_SUM)
    yield from of_norm(decoder, setup, grad, "norm before the MLP", layer, Part.MLP_NORM)
    yield from common_input(decoder, setup, layer, MLP_LAYERS[:2], d, "norm's output, T d", "norms")
    yield from inside_adapters(decoder, setup, layer, MLP_LAYERS)
    gate = grad or decoder.trains(layer, "gate_proj")
    up = grad or decoder.trains(layer, "up_proj")
    if gate:
        yield SavedTensor("mlp", w * T * f, "gate, for the derivative of the activation function, T f", layer)
        yield SavedTensor("mlp", w * T * f, "up, for the product, T f", layer)
    if up and not recomputed(setup, gate):
        yield SavedTensor("mlp", w * T * f, "act(gate), for the product, T f", layer)
    what = "act(gate) · up, T f"
    yield from common_input(decoder, setup, layer, ("down_proj",), f, what, "mlp", Part.PRODUCT)


def recomputed(setup: Setup, gate: bool) -> bool:
    """Is act(gate) recomputed (`labkit.training.recompute`)? `gate`: does a gradient flow to the gate?"""
    return setup.recompute_act and gate and not setup.checkpointing


def common_input(
    decoder: Decoder,
    setup: Setup,
    layer: int,
    names: Iterable[str],
    width: int,
    what: str,
    kind: str,
    part: Part | None = None,
) -> Iterator[SavedTensor]:
    """The input of the layers `names`: kept once, or once per adapter that works in another dtype."""
    T, w, a = setup.tokens, setup.width, itemsize(setup.adapter_dtype)
    if decoder.base_trains or (a == w and decoder.adapts(layer, *names)):
        yield SavedTensor(kind, w * T * width, what, layer, part)
    elif a != w:
        for name in names:
            if decoder.adapts(layer, name):
                copy = f"{what}, {setup.adapter_dtype} copy of {name}'s A"
                yield SavedTensor(half_of(name), a * T * width, copy, layer, part)


def inside_adapters(
    decoder: Decoder, setup: Setup, layer: int, names: Iterable[str]
) -> Iterator[SavedTensor]:
    """z = A x of each adapter, the input of its B."""
    a = itemsize(setup.adapter_dtype)
    for name in names:
        if decoder.adapts(layer, name):
            yield SavedTensor(half_of(name), a * setup.tokens * setup.r, f"z of {name}, T r", layer)


def half_of(name: str) -> str:
    """The kind of what belongs to one layer."""
    return "attention" if name in ATTENTION_LAYERS else "mlp"


def of_attention(decoder: Decoder, setup: Setup, layer: int) -> Iterator[SavedTensor]:
    """q, k, v after the rotary embedding, and what softmax needs: a number per row (SDPA), or all (eager)."""

    def kept(n: int, what: str, part: Part | None = None) -> SavedTensor:
        return SavedTensor("attention", n, what, layer, part)

    shape, T, w = decoder.shape, setup.tokens, setup.width
    H, G, h = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    scores = setup.batch_size * H * setup.max_length**2
    if decoder.head_norms:
        for name, heads in (("q", H), ("k", G)):
            yield kept(4 * T * heads * h, f"{name} before its norm, fp32")
            yield kept(4 * T * heads, f"1 / rms of {name}'s heads")
            if decoder.base_trains:
                yield kept(w * T * heads * h, f"{name} normalized")
    yield kept(w * T * H * h, "q, rotated, T H h")
    if setup.attention == "sdpa":
        yield kept(w * T * G * h, "k, rotated, T G h")
        yield kept(w * T * G * h, "v, T G h")
        yield kept(w * T * H * h, "attention's output, T H h")
        yield kept(4 * T * H, "log-sum-exp of each row of scores, T H")
    else:
        yield kept(w * T * H * h, "k, rotated and repeated for each head, T H h")
        yield kept(w * T * H * h, "v, repeated for each head, T H h")
        yield kept(4 * scores, "softmax of the scores, fp32, B H S²", Part.SCORES)
        if w != 4:
            yield kept(w * scores, f"the same in {setup.dtype}", Part.SCORES)


def of_norm(
    decoder: Decoder, setup: Setup, grad: bool, what: str, layer: int | None = None, part: Part | None = None
) -> Iterator[SavedTensor]:
    """RMSNorm: y = g · x / rms(x), computed in fp32; without y, which belongs to the layers that need it."""
    T, w, d = setup.tokens, setup.width, decoder.shape.hidden_size
    if grad:
        if w != 4:  # in fp32 it is a tensor of the residual stream, kept there
            yield SavedTensor("norms", 4 * T * d, f"{what}: its input in fp32, T d", layer, part)
        yield SavedTensor("norms", 4 * T, f"{what}: 1 / rms, T", layer, part)
    if decoder.base_trains:
        yield SavedTensor("norms", w * T * d, f"{what}: x / rms, for the gradient of g, T d", layer, part)


def of_loss(decoder: Decoder, setup: Setup) -> Iterator[SavedTensor]:
    """What the output layer and the cross-entropy keep."""
    n, w, d = setup.n_supervised, setup.width, decoder.shape.hidden_size
    if decoder.chunked_loss:
        yield SavedTensor("logits", w * n * d, "gradient of the hidden states, made in the forward pass, n d")
        return
    if decoder.embeddings_train:
        rows, name = (setup.tokens, "T") if setup.logits == "all" else (n, "n")
        yield SavedTensor("logits", w * rows * d, f"input of the output layer, {name} d")
    yield SavedTensor("logits", 4 * n * decoder.shape.vocab_size, "log-softmax, fp32, n V")
    yield SavedTensor("logits", 8 * n, "targets, int64")


def loss_peak(decoder: Decoder, setup: Setup) -> int:
    """Bytes that the loss takes for a moment beyond what it keeps, in the forward pass."""
    n, w, V = setup.n_supervised, setup.width, decoder.shape.vocab_size
    if setup.logits == "all":  # the scores at all positions, and those selected of them; then their softmax
        own = 4 * n * V
        return max(w * setup.tokens * V + w * n * V - own, w * n * V + (4 * n * V if w != 4 else 0))
    if not decoder.chunked_loss:
        return w * n * V + (4 * n * V if w != 4 else 0)
    of_rows = min(ROWS, n) * V  # their scores in fp32, and in the dtype of the weight where that is another
    return w * n * decoder.shape.hidden_size + 4 * of_rows + (w * of_rows if w != 4 else 0)
