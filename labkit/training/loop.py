"""One training loop for full fine-tuning, LoRA and QLoRA: it trains whatever parameters ask for a gradient.

A step: forward, mean loss over the supervised tokens, backward, clip, AdamW. Three things in it are easy to
    get wrong.

- *Logits only where they count*: `labkit.training.loss`.
- *Accumulation.* The loss of a step is the sum over all its supervised tokens divided by their number in the
  whole step. The mean of the micro-batches' means is another number when their lengths differ.
- *Checkpointing over a frozen base.* The re-entrant kind looks for an input that requires a gradient, finds
  none in a frozen embedding, and trains nothing. The non-re-entrant kind, used here, does not look.

Sources: AdamW (Loshchilov & Hutter 2017); gradient checkpointing (Chen et al. 2016).
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from labkit.data.batches import collate, endless_batches
from labkit.data.encoding import Encoded, encode_all
from labkit.optim.paging import detach_paging
from labkit.training import checkpoint
from labkit.training.config import TrainConfig, learning_rate
from labkit.training.evaluate import loss_of_examples
from labkit.training.history import BestWeights, EvaluationRecord, History, StepRecord, TrainingDiverged
from labkit.training.loss import supervised_loss
from labkit.training.optimizer import make_optimizer, parameter_groups


def train(
    model: nn.Module,
    tokenizer,
    data: Sequence[dict],
    config: TrainConfig | None = None,
    held_out: Sequence[dict] | None = None,
) -> History:
    """Train the parameters of `model` that require a gradient, in place.

    Args:
        model: a causal language model of transformers, with or without adapters.
        tokenizer: its tokenizer.
        data: records; see `labkit.data.encoding`.
        config: see `TrainConfig`.
        held_out: records for the held-out loss; needed for `eval_every`.

    Returns:
        A `History`. An interrupt (Ctrl-C, the stop button) ends the run early and returns what there is.

    Raises:
        ValueError: nothing to train on or nothing that trains, or a checkpoint of another run.
        TrainingDiverged: the loss is NaN or infinite; says at which step and examples.
    """
    config = config or TrainConfig()
    examples, left_out = encode_all(list(data), tokenizer, config.max_length)
    if config.eval_every and not held_out:
        raise ValueError("eval_every needs held_out records to measure the loss on")
    held_out_examples = encode_all(list(held_out), tokenizer, config.max_length)[0] if held_out else []
    run = TrainingRun(model, examples, held_out_examples, tokenizer.pad_token_id or 0, config)
    run.history.left_out = left_out
    return run.train()


class TrainingRun:
    """The state of one call of `train`: the model, the optimizer, the examples, the history so far."""

    def __init__(
        self,
        model: nn.Module,
        examples: list[Encoded],
        held_out: list[Encoded],
        pad_id: int,
        config: TrainConfig,
    ):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter of the model requires a gradient; call add_lora, or unfreeze some")
        self.model, self.examples, self.held_out = model, examples, held_out
        self.pad_id, self.config, self.history = pad_id, config, History()
        self.total = config.total_steps(len(examples))
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(
            config.optimizer,
            parameter_groups(model, config.lr, config.lora_plus),
            config.state_budget_bytes,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.best: BestWeights | None = None
        self.folder = None if config.checkpoint_folder is None else Path(config.checkpoint_folder)
        self.identity = (
            {} if self.folder is None else checkpoint.identity_of(model, config, examples, self.total)
        )

    def train(self) -> History:
        """Take the steps that are left; afterwards the model's mode and the optimizer are as before."""
        config = self.config
        try:
            with training_mode(self.model, config.checkpointing):
                torch.manual_seed(config.seed)
                self.take_steps(self.resume())
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            detach_paging(self.optimizer, keep_state=False)
        if config.patience and self.best:
            self.restore_best()
        return self.history

    def take_steps(self, done: int) -> None:
        """Take steps `done` … total - 1, unless something stops the run, and do what is due after each."""
        config, history = self.config, self.history
        lengths = [len(example) for example in self.examples]
        batches = endless_batches(lengths, config.batch_size, config.seed)
        batches = islice(batches, done * config.accumulation, None)
        bar = tqdm(total=self.total, initial=done, desc="train", unit="step", disable=not config.progress)
        with bar, interrupts_recorded(history):
            for step in range(done, self.total):
                if history.stopped != "finished":
                    break
                record = self.step(step, list(islice(batches, config.accumulation)))
                history.steps.append(record)
                self.after_step(step)
                speed = f"{history.tokens_per_second:.0f}"
                bar.set_postfix(loss=f"{record['loss']:.3f}", tok_s=speed, refresh=False)
                bar.update()

    def step(self, step: int, micro_batches: list[list[int]]) -> StepRecord:
        """One optimizer step over the examples with these indices.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite; the weights are still those of the step
                before.
        """
        started = time.perf_counter()
        batches = [
            collate([self.examples[i] for i in indices], self.pad_id).to(self.device)
            for indices in micro_batches
        ]
        supervised = sum(batch.n_supervised for batch in batches)
        lr = learning_rate(step, self.total, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for batch in batches:
            part = supervised_loss(self.model, batch, self.config.logits) / supervised
            part.backward()
            loss += part.item()
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip or math.inf))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self.diverged(step, loss, norm, micro_batches)
        self.optimizer.step()
        return StepRecord(
            step=step + 1,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=sum(len(self.examples[i]) for indices in micro_batches for i in indices),
            supervised=supervised,
            seconds=time.perf_counter() - started,
        )

    def diverged(
        self, step: int, loss: float, norm: float, micro_batches: list[list[int]]
    ) -> TrainingDiverged:
        """The error that says where the loss was lost, and what to try."""
        kept = (
            f"the last good checkpoint is in {self.folder}" if self.folder else "no checkpoint_folder was set"
        )
        message = (
            f"loss {loss} with gradient norm {norm} at step {step + 1} of {self.total}, examples "
            f"{micro_batches}; the weights are those of step {step}, and {kept}. Try a lower lr (now "
            f"{self.config.lr:g}), clip=1.0, or a warm-up"
        )
        return TrainingDiverged(message, self.history, self.folder)

    def after_step(self, step: int) -> None:
        """Held-out loss, early stop and checkpoint, where they are due."""
        config, last = self.config, step + 1 == self.total
        if config.eval_every and ((step + 1) % config.eval_every == 0 or last):
            self.evaluate(step)
        stopping = self.history.stopped != "finished"
        if self.folder and ((step + 1) % config.checkpoint_every == 0 or last or stopping):
            checkpoint.save(
                self.folder, self.identity, step + 1, self.parameters, self.optimizer, self.history, self.best
            )

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss; with patience, keep the best weights, and stop if none is new."""
        # four times the batch: nothing is kept for a backward pass
        loss, tokens = loss_of_examples(self.model, self.held_out, self.pad_id, 4 * self.config.batch_size)
        self.history.evals.append(EvaluationRecord(step=step + 1, loss=loss, tokens=tokens))
        if self.config.patience:
            if self.best is None or loss < self.best.loss:
                weights = {name: p.detach().clone() for name, p in self.parameters.items()}
                self.best = BestWeights(loss, weights)
            losses = [record["loss"] for record in self.history.evals]
            if len(losses) - 1 - losses.index(min(losses)) >= self.config.patience:
                self.history.stopped = "early"

    def restore_best(self) -> None:
        """Put the weights of the lowest held-out loss back into the model."""
        with torch.no_grad():
            for name, value in self.best.weights.items():
                self.parameters[name].copy_(value)

    def resume(self) -> int:
        """Load the checkpoint of this very run, if there is one; the number of steps that it had done."""
        if self.folder is None or not checkpoint.exists(self.folder):
            return 0
        done, self.history, self.best = checkpoint.load(
            self.folder, self.identity, self.parameters, self.optimizer
        )
        return done


@contextmanager
def training_mode(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Within the block, `model` is in training mode, with gradient checkpointing if `checkpointing`."""
    was_training = model.training
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            model.activation_checkpointing_disable()
        model.train(was_training)


@contextmanager
def interrupts_recorded(history: History) -> Iterator[None]:
    """An interrupt (Ctrl-C) within the block ends it, and the run with it, but is not an error."""
    try:
        yield
    except KeyboardInterrupt:
        history.stopped = "interrupted"
