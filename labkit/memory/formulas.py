"""How much memory a step of fine-tuning takes: predicted, simulated, and measured, in the same rows.

    plan(…)      from formulas, in a second, for any model, without its weights
    simulate(…)  by running this course's own training step on tensors without numbers (`labkit.memory.simulation`)
    measure(…)   from a real step (`labkit.memory.measurement`)

The exact part is counting: with P parameters, of which P_t train, and bytes b of each kind,

    static = b_weights · P  +  constants  +  b_adapter · P_t  +  (4 + 4) · P_t   (AdamW's two moments)
    then gradients b · P_t, and activations, which grow with the number of tokens and not with P_t.

The parameters are counted on the model's own modules, built on the meta device, and what LoRA adapts is found by the rules that
`add_lora` goes by. The activations are a closed form for Llama-like blocks: see `labkit.memory.activations`. The peak is the largest of
a few moments, see `labkit.memory.peaks`.

Sources: QLoRA (Dettmers et al. 2023), section 3 and appendix G; Rajbhandari et al. 2020 (ZeRO), section 3, for the
16 bytes a parameter of mixed-precision AdamW.
"""

from dataclasses import replace

from labkit.memory import peaks
from labkit.memory.activations import KINDS, PARTS, Block, kept_with_checkpointing, saved_tensors
from labkit.memory.counting import Shapes, shapes_of, training_rows, weight_rows
from labkit.memory.ledger import Ledger, Row
from labkit.memory.setup import Setup, setup_of
from labkit.models.shapes import attention_of, changes_logits, config_of

CUDA_ROUNDING = 512  # bytes: the smallest block of CUDA's caching allocator


def plan(model, method: str = "qlora", **settings) -> Ledger:
    """Predict the memory of a training step from the shapes alone.

    Args:
        model: a name of `known_models()`, a folder with a `config.json`, a transformers config, or a model (of which only
            the config is read).
        method: "full", "lora" or "qlora".
        settings: any field of `Setup`: rank, targets, sequence, batch, optimizer, checkpointing, dtype, adapter_dtype,
            attention, logits, supervised …

    Returns:
        A `Ledger`. `weights`, `constants`, `lora`, `gradients` and `optimizer` are exact. `activations` are a closed form,
        `temporary` and the peak an estimate; `.notes` says where the form does not fit the model.

    Raises:
        ValueError: an unknown model or setting, a sequence longer than the model's positions, a rank above the width of an
            adapted layer, or targets that match nothing.

    >>> ledger = plan("llama-2-7b", "lora", rank=32, targets="attention", sequence=1024)
    >>> ledger.counts["trainable"], ledger.counts["parameters"]
    (33554432, 6738415616)
    """
    setup = setup_of(method, settings)
    config = config_of(model)
    setup = replace(setup, attention=attention_of(config, setup.attention))
    shapes = shapes_of(config, setup)
    rows = [*weight_rows(shapes, setup), *training_rows(shapes, setup)]
    block = block_of(config, shapes, setup)
    kept = list((kept_with_checkpointing if setup.checkpointing else saved_tensors)(block, setup))
    peak = peaks.peak_of(block, setup, shapes, kept)
    rows += activation_rows(kept, peak, setup)
    rows = [peak.adjust(row) for row in rows]
    rows.append(
        Row("temporary", "tensors", peak.temporary, peak.temporary, peak.formula, "labkit.memory.peaks")
    )
    if buffer := peaks.buffer_bytes(setup, shapes):
        formula = "one dequantized weight, in memory that every layer uses"
        rows.append(
            Row("temporary", "buffer for a dequantized layer", buffer, buffer, formula, "labkit.quant.linear")
        )
    if setup.device == "cuda":
        extra = sum(-n % CUDA_ROUNDING for n in shapes.tensor_bytes(setup))
        formula = f"every static tensor rounded up to {CUDA_ROUNDING} bytes; fragmentation is not predicted"
        rows.append(Row("overhead", "rounding", extra, extra, formula, "c10/cuda/CUDACachingAllocator"))
    return Ledger(
        rows,
        title=f"{shapes.name}: {setup.describe()} (plan)",
        moment=peak.moment,
        settings=setup.as_dict() | {"model": shapes.name},
        counts=shapes.counts(setup),
        notes=notes_of(config, setup, shapes),
    )


def block_of(config, shapes: Shapes, setup: Setup) -> Block:
    """The decoder's shapes, as `labkit.memory.activations` needs them."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    h = getattr(config, "head_dim", None) or config.hidden_size // heads
    adapted = {}
    for name in shapes.adapted:
        parts = name.split(".")
        index = next((int(p) for p in parts if p.isdigit()), 0)
        adapted[index, parts[-1]] = setup.rank
    trained = setup.method == "full"
    frozen_output = not trained and not setup.train_embeddings
    return Block(
        layers=config.num_hidden_layers,
        d=config.hidden_size,
        f=config.intermediate_size,
        heads=heads,
        groups=getattr(config, "num_key_value_heads", None) or heads,
        h=h,
        vocab=config.vocab_size,
        norms=sum(name.startswith("model.layers.0.") and "layernorm" in name for name in shapes.parameters),
        head_norms=any(name.endswith("q_norm.weight") for name in shapes.parameters),
        trained=trained,
        embeddings=trained or setup.train_embeddings,
        adapted=lambda layer, name: adapted.get((layer, name), 0),
        chunked=frozen_output and setup.logits == "supervised" and not changes_logits(config),
    )


MODELLED = ("llama", "mistral", "qwen2", "qwen3")


def notes_of(config, setup: Setup, shapes: Shapes) -> list[str]:
    """What the numbers do not say."""
    notes = []
    if config.model_type not in MODELLED:
        notes.append(
            f"activations are those of a Llama block of these sizes; blocks of {config.model_type!r} may keep much more: "
            "their peak is underestimated. simulate runs them as they are"
        )
    window = getattr(config, "sliding_window", None)
    if window and setup.sequence >= window and setup.attention == "sdpa" and config.model_type == "mistral":
        notes.append(
            f"from {window} tokens on, the sliding window needs a mask and k, v repeated for each head: not counted"
        )
    unknown = {name.rpartition(".")[2] for name in shapes.adapted} - set(PARTS)
    if unknown:
        notes.append(f"activations kept for the adapters of {', '.join(sorted(unknown))} are not counted")
    return notes


def activation_rows(kept, peak, setup: Setup) -> list[Row]:
    """What is kept, by kind."""
    rows = []
    how = "kept with checkpointing" if setup.checkpointing else "kept for backward"
    for kind in KINDS:
        mine = [tensor for tensor in kept if tensor.kind == kind]
        if not mine:
            continue
        largest = dict.fromkeys(
            tensor.what for tensor in sorted(mine, key=lambda tensor: -tensor.bytes) if tensor.bytes
        )
        formula = f"{len(mine)} tensors {how}: " + "; ".join(list(largest)[:6])
        n = sum(tensor.bytes for tensor in mine)
        rows.append(Row("activations", kind, n, peak.kept.get(kind, 0), formula, "labkit.memory.activations"))
    return rows


def crossover(model, a: dict, b: dict, sequences=None, **settings):
    """Where one way of training takes more memory than another: the peaks of both over sequence lengths.

    QLoRA can take more than LoRA. Not here, where what is not in 4 bits keeps its dtype; but libraries that prepare a quantized
    model for training turn all the rest (embeddings, norms, output layer) into fp32, and with them every activation:

        crossover("qwen2.5-0.5b", a=dict(method="qlora", dtype="fp32"), b=dict(method="lora", dtype="bf16"))

    Args:
        model: as for `plan`.
        a, b: the method of each, and what else differs between them.
        sequences: lengths; default: powers of two from 16 up to what the model knows.
        settings: what both share, as for `plan`.

    Returns:
        A DataFrame with columns `sequence`, `a` and `b` (peaks in bytes), and `difference` = a - b, above 0 where a takes more.
        `.attrs["crossover"]`: the shortest length, to the token, from which a takes more up to the longest given; None if there is none.
    """
    import pandas as pd

    config = config_of(model)
    if sequences is None:
        longest = getattr(config, "max_position_embeddings", 4096)
        sequences = [2**k for k in range(4, longest.bit_length()) if 2**k <= longest]

    def peaks_at(sequence: int) -> tuple[int, int]:
        return tuple(plan(config, **{**settings, **one, "sequence": sequence}).peak for one in (a, b))

    found = {sequence: peaks_at(sequence) for sequence in sorted(sequences)}
    rows = [{"sequence": s, "a": x, "b": y, "difference": x - y} for s, (x, y) in found.items()]
    frame = pd.DataFrame(rows)
    frame.attrs["crossover"] = _first_above(frame, peaks_at)
    return frame


def _first_above(frame, peaks_at) -> int | None:
    """The shortest sequence with a above b, by bisection between the rows around the change of sign."""
    above = [d > 0 for d in frame["difference"]]
    if not above or not above[-1]:
        return None
    last = max((i for i, yes in enumerate(above) if not yes), default=None)
    if last is None:
        return int(frame["sequence"][0])
    low, high = int(frame["sequence"][last]), int(frame["sequence"][last + 1])
    while high - low > 1:
        middle = (low + high) // 2
        one, other = peaks_at(middle)
        low, high = (low, middle) if one > other else (middle, high)
    return high
