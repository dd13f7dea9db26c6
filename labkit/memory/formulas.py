"""How much memory a step of fine-tuning takes: predicted, simulated, and measured, in the same rows.

    plan(…)      from formulas, in a second, for any model, without its weights
    simulate(…)  by running this course's own step on tensors without numbers (`labkit.memory.simulation`)
    measure(…)   from a real step (`labkit.memory.measurement`)

The exact part is counting (`labkit.memory.counting`): with P parameters, of which P_t train, and b bytes of
each kind,

    static = b_weights · P  +  constants  +  b_adapter · P_t  +  (4 + 4) · P_t   (AdamW's two moments)

then gradients b · P_t, and activations, which grow with the number of tokens and not with P_t: a closed form
for Llama-like blocks (`labkit.memory.activations`). The peak is the largest of a few moments
(`labkit.memory.peaks`).

Sources: QLoRA (Dettmers et al. 2023), section 3 and appendix G; Rajbhandari et al. 2020 (ZeRO), section 3,
for the 16 bytes per parameter of mixed-precision AdamW.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from labkit.checks import needed
from labkit.memory import peaks
from labkit.memory.activations import (
    ATTENTION_LAYERS,
    KINDS,
    MLP_LAYERS,
    Decoder,
    SavedTensor,
    kept_with_checkpointing,
    saved_tensors,
)
from labkit.memory.allocator import block_bytes
from labkit.memory.counting import ModelTensors, tensors_of, training_rows, weight_rows
from labkit.memory.ledger import Ledger, LedgerRow
from labkit.memory.setup import Setup, setup_of
from labkit.memory.sharing import Sharing, share
from labkit.models.shapes import attention_of, changes_logits, config_of, decoder_shape


def plan(
    model, method: str = "qlora", ranks: int = 1, shard: str | None = None, offload: bool = False, **settings
) -> Ledger:
    """Predict the memory of a training step from the shapes alone.

    Args:
        model: a name of `known_models()`, a folder with a `config.json`, a transformers config, or a model
            (of which only the config is read).
        method: "full", "lora" or "qlora".
        ranks, shard, offload: of several processes, each with a step of this setup: the ledger is that of one of
            them; see `labkit.memory.sharing.Sharing`.
        settings: any field of `Setup`: r, targets, max_length, batch_size, optimizer, checkpointing, dtype,
            adapter_dtype, attention, logits, supervised …

    Returns:
        A `Ledger`. `weights`, `constants`, `lora`, `gradients` and `optimizer` are exact. `activations` are a
        closed form, `temporary` and the peak an estimate; `.notes` says where the form does not fit the
        model. On a card come on top, and cannot be planned: cuBLAS's workspaces (`labkit.memory.card`), what
        kernels take for themselves, and what the allocator reserves between tensors (`labkit.memory.allocator`).

    Raises:
        ValueError: an unknown model or setting, a max_length above the model's positions, an r above the
            width of an adapted layer, targets that match nothing, or a model whose blocks have no MLP of one
            width.

    >>> ledger = plan("llama-2-7b", "lora", r=32, targets="attention", max_length=1024)
    >>> ledger.counts["trainable"], ledger.counts["parameters"]
    (33554432, 6738415616)
    """
    setup, sharing = setup_of(method, settings), Sharing(ranks, shard, offload)
    config = config_of(model)
    setup = replace(setup, attention=attention_of(config, setup.attention))
    tensors = tensors_of(config, setup)
    decoder = decoder_of(config, tensors, setup)
    kept = list((kept_with_checkpointing if setup.checkpointing else saved_tensors)(decoder, setup))
    peak = peaks.peak_of(decoder, setup, tensors, kept)
    rows = [*weight_rows(tensors, setup), *training_rows(tensors, setup), *activation_rows(kept, peak, setup)]
    rows = [peak.adjust(row) for row in rows] + extra_rows(tensors, peak, setup)
    ledger = Ledger(
        rows,
        title=f"{tensors.name}: {setup.describe()} (plan)",
        moment=peak.moment,
        settings=setup.as_dict() | {"model": tensors.name},
        counts=tensors.counts(setup),
        notes=notes_of(config, setup, tensors),
    )
    return share(ledger, tensors, setup, sharing)


def decoder_of(config, tensors: ModelTensors, setup: Setup) -> Decoder:
    """The decoder as `labkit.memory.activations` needs it."""
    shape = decoder_shape(config)
    if shape.intermediate_size is None:
        raise ValueError(
            f"plan needs the width of the MLP, and a {config.model_type!r} config has no intermediate_size; "
            "simulate runs its blocks as they are"
        )
    base_trains = setup.method == "full"
    embeddings_train = base_trains or setup.train_embeddings
    return Decoder(
        shape=shape,
        head_norms=any(name.endswith("q_norm.weight") for name in tensors.parameters),
        base_trains=base_trains,
        embeddings_train=embeddings_train,
        adapted=frozenset((block_number(name), name.rpartition(".")[2]) for name in tensors.adapted),
        chunked_loss=not embeddings_train and setup.logits == "supervised" and not changes_logits(config),
    )


def block_number(name: str) -> int:
    """Of a module: the first number in its full name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


MODELLED = ("llama", "mistral", "qwen2", "qwen3")


def notes_of(config, setup: Setup, tensors: ModelTensors) -> list[str]:
    """What the numbers do not say."""
    notes = []
    if config.model_type not in MODELLED:
        notes.append(
            f"activations are those of a Llama block of these sizes; blocks of {config.model_type!r} may keep"
            " much more: their peak is underestimated. simulate runs them as they are"
        )
    window = getattr(config, "sliding_window", None)
    if window and setup.max_length >= window and setup.attention == "sdpa" and config.model_type == "mistral":
        notes.append(
            f"from {window} tokens on, the sliding window needs a mask and k, v repeated for each head: "
            "not counted"
        )
    unknown = {name.rpartition(".")[2] for name in tensors.adapted} - {*ATTENTION_LAYERS, *MLP_LAYERS}
    if unknown:
        notes.append(f"activations kept for the adapters of {', '.join(sorted(unknown))} are not counted")
    return notes


def activation_rows(kept: list[SavedTensor], peak: peaks.Peak, setup: Setup) -> list[LedgerRow]:
    """What is kept, by kind."""
    rows = []
    how = "kept with checkpointing" if setup.checkpointing else "kept for backward"
    for kind in KINDS:
        mine = [tensor for tensor in kept if tensor.kind == kind]
        if not mine:
            continue
        largest_first = sorted(mine, key=lambda tensor: -tensor.bytes)
        names = dict.fromkeys(tensor.what for tensor in largest_first if tensor.bytes)
        formula = f"{len(mine)} tensors {how}: " + "; ".join(list(names)[:6])
        n = sum(tensor.bytes for tensor in mine)
        at_peak = peak.kept.get(kind, 0)
        rows.append(LedgerRow("activations", kind, n, at_peak, formula, "labkit.memory.activations"))
    return rows


def extra_rows(tensors: ModelTensors, peak: peaks.Peak, setup: Setup) -> list[LedgerRow]:
    """What is temporary at the peak, and what the allocator adds."""
    n = peak.temporary
    rows = [LedgerRow("temporary", "tensors", n, n, peak.formula, "labkit.memory.peaks")]
    if n := peaks.buffer_bytes(setup, tensors):
        formula = "one dequantized weight, in memory that every layer uses"
        rows.append(
            LedgerRow("temporary", "buffer for a dequantized layer", n, n, formula, "labkit.quant.scratch")
        )
    if setup.device == "cuda":
        n = sum(block_bytes(size) - size for size in tensors.tensor_bytes(setup))
        formula = (
            "each static tensor in a block of its own: a multiple of 512 bytes, from 10 MiB on up to 1 MiB more; "
            "fragmentation is not predicted, nor are cuBLAS's workspaces"
        )
        rows.append(LedgerRow("overhead", "rounding", n, n, formula, "c10/cuda/CUDACachingAllocator"))
    return rows


def crossover(model, a: dict, b: dict, max_lengths: Iterable[int] | None = None, **settings):
    """Where one way of training takes more memory than another: both peaks over the length of examples.

    QLoRA can take more than LoRA. Not here, where what is not in 4 bits keeps its dtype; but libraries that
    prepare a quantized model for training turn all the rest (embeddings, norms, output layer) into fp32, and
    with them every activation:

        crossover("qwen2.5-0.5b", a=dict(method="qlora", dtype="fp32"), b=dict(method="lora", dtype="bf16"))

    Args:
        model: as for `plan`.
        a, b: the method of each, and what else differs between them.
        max_lengths: default: powers of two from 16 up to what the model knows.
        settings: what both share, as for `plan`.

    Returns:
        A DataFrame with columns `max_length`, `a` and `b` (peaks in bytes), and `difference` = a - b, above 0
        where a takes more. `.attrs["crossover"]`: the shortest length, to the token, from which a takes more
        up to the longest given; None if there is no such length.
    """
    pd = needed("pandas", "crossover")
    config = config_of(model)
    if max_lengths is None:
        longest = getattr(config, "max_position_embeddings", 4096)
        max_lengths = [2**k for k in range(4, longest.bit_length()) if 2**k <= longest]

    def peaks_at(max_length: int) -> tuple[int, int]:
        one, other = (plan(config, **{**settings, **way, "max_length": max_length}).peak for way in (a, b))
        return one, other

    rows = []
    for max_length in sorted(max_lengths):
        one, other = peaks_at(max_length)
        rows.append({"max_length": max_length, "a": one, "b": other, "difference": one - other})
    frame = pd.DataFrame(rows)
    frame.attrs["crossover"] = _first_above(frame, peaks_at)
    return frame


def _first_above(frame, peaks_at: Callable[[int], tuple[int, int]]) -> int | None:
    """The shortest length with a above b, by bisection between the rows around the change of sign."""
    above = [d > 0 for d in frame["difference"]]
    if not above or not above[-1]:
        return None
    last = max((i for i, yes in enumerate(above) if not yes), default=None)
    if last is None:
        return int(frame["max_length"][0])
    low, high = int(frame["max_length"][last]), int(frame["max_length"][last + 1])
    while high - low > 1:
        middle = (low + high) // 2
        one, other = peaks_at(middle)
        low, high = (low, middle) if one > other else (middle, high)
    return high
