"""What a model can take in: ids that its embedding has rows for, and no more tokens than it has positions.

A tokenizer may have tokens that the model has no row for (`[PAD]` was added, or it belongs to another model), and
a record may be longer than the model's context. The first ends deep inside the model as an index error, on a GPU
as a device assert. The second does too where positions are a table, as in GPT-2. Where they are computed, as in
RoPE, nothing fails: the model is trained at positions that it has never seen, and everything is a little worse.
Both are refused before the first step.
"""

from collections.abc import Collection, Sequence
from itertools import count

from torch import nn

from labkit.data.encoding import Encoded
from labkit.models.walk import unwrap


def check_fits(model: nn.Module, examples: Sequence[Encoded], left_out: Collection[int] = ()) -> None:
    """Check that the model has a row for every id and a position for every token of `examples`.

    Args:
        model: a causal language model; virtual tokens before the text take their part of its positions.
        examples: as they come from `encode_all`.
        left_out: the indices that `encode_all` left out, so that the message counts as the records do.

    Raises:
        ValueError: an example does not fit; names its record, and what to do.
    """
    context, taken = context_of(model), virtual_tokens_of(model)
    skipped = set(left_out)
    records = (i for i in count() if i not in skipped)
    for i, example in zip(records, examples):
        check_ids(model, example.prompt + example.completion, f"record {i}")
        if context is not None and len(example) + taken > context:
            also = f" and {taken} virtual tokens before them" if taken else ""
            raise ValueError(
                f"record {i} has {len(example)} tokens{also}, and {type(unwrap(model)).__name__} has {context} positions; "
                f"set max_length={max(context - taken, 1)}, which leaves longer records out, or shorten them. (Where "
                "positions are computed, as in RoPE, and meant to reach further, raise "
                "model.config.max_position_embeddings.)"
            )


def check_ids(model: nn.Module, ids: Sequence[int], name: str) -> None:
    """Check that the model has a row for each of `ids`.

    Raises:
        ValueError: it has not; says what `name` is, and what to do.
    """
    rows = rows_of(model)
    if rows is not None and ids and (max(ids) >= rows or min(ids) < 0):
        missing = next(i for i in ids if not 0 <= i < rows)
        raise ValueError(
            f"{name} has the token id {missing}, and {type(unwrap(model)).__name__} has ids 0 to {rows - 1}: its "
            "tokenizer has tokens that the model lacks. Load the tokenizer that belongs to the model, or give the model "
            "rows for them with model.resize_token_embeddings(len(tokenizer)), before an adapter is added"
        )


def rows_of(model: nn.Module) -> int | None:
    """How many ids the model can both read and write; None if it does not say."""
    inner = unwrap(model)
    rows = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(inner, name)()
            rows.append(layer.weight.shape[0])
        except (AttributeError, NotImplementedError):  # a model of another library, or one without a head
            continue
    return min(rows, default=None)


def context_of(model: nn.Module) -> int | None:
    """The positions of the model, as its config says; None where it sets no limit.

    A config with scaled rotary positions may state the length before the scaling.
    """
    config = getattr(unwrap(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        return None
    ropes = getattr(config, "rope_parameters", None) or {}
    scalings = [r for r in ropes.values() if isinstance(r, dict)] or [ropes]  # one, or one per kind of layer
    reach = [(r.get("original_max_position_embeddings") or length) * (r.get("factor") or 1) for r in scalings]
    return max(length, *map(int, reach))


def virtual_tokens_of(model: nn.Module) -> int:
    """Positions that a soft prompt or a prefix takes up; see `labkit.alternatives.methods`."""
    added = getattr(unwrap(model), "added_method", None)
    return 0 if added is None else added.positions


def padding_id(tokenizer, model: nn.Module) -> int:
    """The id to pad with: the tokenizer's if the model has a row for it, else 0.

    Under a causal model nothing reads what is computed at padding, so any id that it has will do.
    """
    given, rows = tokenizer.pad_token_id, rows_of(model)
    return given if given is not None and (rows is None or given < rows) else 0
