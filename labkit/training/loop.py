"""One training loop for full fine-tuning, LoRA and QLoRA: it trains whatever parameters ask for a gradient.

`train` takes in records and settings, refuses what cannot become a run, and leaves the steps to
`labkit.training.run`.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from labkit.data.encoding import Encoded, encode_all
from labkit.data.records import records_of
from labkit.training.config import TrainConfig
from labkit.training.control import TrainControl
from labkit.training.history import History, say
from labkit.training.limits import check_fits, padding_id
from labkit.training.readiness import check_arguments, check_packs, shown
from labkit.training.run import TrainingRun


def train(
    model: nn.Module,
    tokenizer,
    data: Sequence[dict],
    config: TrainConfig | None = None,
    held_out: Sequence[dict] | None = None,
    control: TrainControl | None = None,
) -> History:
    """Train the parameters of `model` that require a gradient, in place.

    An interrupt (Ctrl-C, the stop button) ends the run before or after a step, never within one, and returns
    what there is; with a `checkpoint_folder` the next call goes on there. A checkpoint that cannot be written
    in mid-run, on a full disk, is a warning: the run goes on, and the model is trained all the same.

    Args:
        model: a causal language model of transformers, with or without adapters.
        tokenizer: its tokenizer.
        data: records; see `labkit.data.encoding`. Longer ones than `max_length` are left out, with a warning.
        config: see `TrainConfig`.
        held_out: records for the held-out loss; needed for `eval_every`.
        control: to pause, stop or steer the run from another thread, or be called after each step.

    Returns:
        A `History`.

    Raises:
        ValueError: nothing to train on or nothing that trains, parameters that have no part in the loss, a
            model that is not causal or too small for the data, or a checkpoint of another run. The model is
            unchanged then.
        TrainingDiverged: the loss is NaN or infinite; says at which step and records.
        labkit.files.InUse, labkit.files.CannotWrite: the checkpoint folder is another run's, or cannot be
            written to.
    """
    config = config or TrainConfig()
    check_arguments(model, tokenizer, config, control)
    history = History()
    examples, history.left_out = encoded(model, tokenizer, data, "data", config)
    if config.batching == "packed":
        check_packs(model, examples)
    measured: list[Encoded] = []
    if held_out is not None and (others := records_of(held_out, "held_out")):
        measured, history.held_out_left_out = encoded(model, tokenizer, others, "held_out", config)
    if config.eval_every and not measured:
        raise ValueError("eval_every needs held_out records to measure the loss on")
    if measured and not config.eval_every:
        say("held_out was given, and eval_every was not: the held-out loss is never measured")
    return TrainingRun(
        model, examples, measured, padding_id(tokenizer, model), config, history, control
    ).train()


def encoded(
    model: nn.Module, tokenizer, data: Iterable[Mapping], name: str, config: TrainConfig
) -> tuple[list[Encoded], list[int]]:
    """The records that fit, encoded, and the indices of those that do not, after a warning that says which.

    Raises:
        ValueError: see `records_of`, `encode_all` and `check_fits`.
    """
    records = records_of(data, name)
    examples, left_out = encode_all(records, tokenizer, config.max_length)
    check_fits(model, examples, left_out)
    if left_out:
        say(
            f"{len(left_out)} of {len(records)} records of {name} are longer than max_length={config.max_length} tokens "
            f"and are left out: {shown([str(i) for i in left_out])}"
        )
    return examples, left_out
