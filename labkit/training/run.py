"""The steps of a run, and what comes between them: evaluations, checkpoints, an interrupt, a stop, a pause.

A step: forward, mean loss over the supervised tokens, backward, clip, AdamW. Three things are easy to get
wrong.

- *Logits only where they count*: `labkit.training.loss`.
- *Accumulation.* The loss of a step is the sum over all its supervised tokens divided by their number in the
  whole step. The mean of the micro-batches' means is another number when their lengths differ.
- *Checkpointing over a frozen base.* The re-entrant kind looks for an input that requires a gradient, finds
  none in a frozen embedding, and trains nothing. The non-re-entrant kind, used here, does not look.

Sources: AdamW (Loshchilov & Hutter 2017); gradient checkpointing (Chen et al. 2016).
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from labkit.data.batches import endless_batches, make_batch_of
from labkit.data.encoding import Encoded
from labkit.files.writing import CannotWrite
from labkit.optim.paging import detach_paging
from labkit.training import checkpoint
from labkit.training.config import TrainConfig, learning_rate
from labkit.training.control import TrainControl
from labkit.training.evaluate import loss_of_examples
from labkit.training.history import BestWeights, EvaluationRecord, History, StepRecord, TrainingDiverged, say
from labkit.training.identity import identity_of
from labkit.training.interrupts import held_back
from labkit.training.loss import supervised_loss
from labkit.training.optimizer import make_optimizer, parameter_groups
from labkit.training.readiness import check_causal, not_in_graph, shown, trained_parameters, training_mode


class TrainingRun:
    """The state of one call of `train`: the model, the optimizer, the examples, the history so far."""

    def __init__(
        self,
        model: nn.Module,
        examples: list[Encoded],
        held_out: list[Encoded],
        pad_id: int,
        config: TrainConfig,
        history: History | None = None,
        control: TrainControl | None = None,
    ):
        self.parameters = trained_parameters(model)
        self.device = next(iter(self.parameters.values())).device
        check_causal(model, examples, self.device)
        self.model, self.examples, self.held_out = model, examples, held_out
        self.pad_id, self.config, self.history = pad_id, config, history or History()
        self.control = control or TrainControl()
        self.total = config.total_steps(len(examples))
        self.optimizer = make_optimizer(
            config.optimizer,
            parameter_groups(model, config.lr, config.lora_plus),
            config.state_budget_bytes,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.best: BestWeights | None = None
        self.folder, self.identity = None, {}
        if config.checkpoint_folder is not None:
            self.folder = Path(config.checkpoint_folder).expanduser().absolute()
            self.identity = identity_of(model, config, examples, self.total, held_out)
        self.done, self.kept = 0, 0  # steps that were taken, and that the checkpoint in the folder has
        self.looked = False  # at the gradients, in the first step of this call
        self.without_gradient = set(self.parameters)  # so far

    def train(self) -> History:
        """Take the steps that are left; afterwards modules are in their modes and the optimizer is as before."""
        config = self.config
        with self.control.steers(self.history):
            try:
                with self.folder_in_use(), training_mode(self.model, config.checkpointing):
                    torch.manual_seed(config.seed)
                    with held_back():
                        self.resume()
                    self.take_steps()
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                detach_paging(self.optimizer, keep_state=False)
            if config.patience and self.best:
                with held_back():
                    self.restore_best()
        return self.history

    def folder_in_use(self) -> AbstractContextManager:
        """Hold the checkpoint folder, if there is one."""
        return nullcontext() if self.folder is None else checkpoint.in_use(self.folder)

    def take_steps(self) -> None:
        """Take the steps that are left, unless something stops the run, and do what is due after each."""
        config, history = self.config, self.history
        lengths = [len(example) for example in self.examples]
        batches = endless_batches(lengths, config.batch_size, config.seed, config.batching)
        batches = islice(batches, self.done * config.accumulation, None)
        bar = tqdm(
            total=self.total, initial=self.done, desc="train", unit="step", disable=not config.progress
        )
        self.random_state = checkpoint.random_state() if self.folder else None
        try:
            with bar:
                self.after_step()  # a run that was stopped in the evaluation after its last step makes it up
                for step in range(self.done, self.total):
                    if history.stopped == "finished" and not self.control.go_on():
                        history.stopped = "interrupted"
                        self.keep()
                    if history.stopped != "finished":
                        break
                    record = self.step(step, list(islice(batches, config.accumulation)))
                    self.control.report()
                    self.after_step()
                    speed = f"{history.tokens_per_second:.0f}"
                    bar.set_postfix(loss=f"{record['loss']:.3f}", tok_s=speed, refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            if self.done < self.total or self.evaluation_is_due():
                history.stopped = "interrupted"
            self.keep()

    def step(self, step: int, micro_batches: list[list[int]]) -> StepRecord:
        """One optimizer step over the examples with these indices.

        An interrupt comes before the step or after it: never between a part of it and another.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite; the weights are still those of the step
                before.
            ValueError: in the first step of a call: no parameter got a gradient, or all are zero.
        """
        started, batching = time.perf_counter(), self.config.batching
        batches = [
            make_batch_of([self.examples[i] for i in indices], self.pad_id, batching).to(self.device)
            for indices in micro_batches
        ]
        supervised = sum(batch.n_supervised for batch in batches)
        lr = learning_rate(step, self.total, self.config) * self.control.lr_multiplier
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for batch in batches:
            part = supervised_loss(self.model, batch, self.config.logits) / supervised
            if part.requires_grad:  # else `look_at_gradients` finds none
                part.backward()
            loss += part.item()
        if self.without_gradient or not self.looked:
            self.look_at_gradients()
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip or math.inf))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self.diverged(step, loss, norm, micro_batches)
        if not self.looked and norm == 0 and loss > 0:
            raise ValueError(
                f"the gradient of every parameter that trains is exactly zero at a loss of {loss:.3g}, so nothing would "
                "be learned: a factor of zero stands before them (adapter_strength(model, 0)), or the numbers are too "
                "small for their dtype. The model is unchanged"
            )
        self.looked = True
        with held_back():
            self.optimizer.step()
            record = StepRecord(
                step=step + 1,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                tokens=sum(len(self.examples[i]) for indices in micro_batches for i in indices),
                supervised=supervised,
                seconds=time.perf_counter() - started,
            )
            self.history.steps.append(record)
            self.done, self.random_state = step + 1, checkpoint.random_state() if self.folder else None
        return record

    def look_at_gradients(self) -> None:
        """Note which parameters have had no gradient yet, and say so in the first step.

        Raises:
            ValueError: in the first step, none had one.
        """
        missing = [name for name, p in self.parameters.items() if p.grad is None]
        if len(missing) == len(self.parameters) and not self.looked:
            raise not_in_graph(missing)
        self.without_gradient.intersection_update(missing)
        self.history.without_gradient = sorted(self.without_gradient)
        if self.without_gradient and not self.looked and not self.done:
            say(
                f"{len(missing)} of the {len(self.parameters)} parameters that train got no gradient in the first step: "
                f"{shown(missing)}. They do not learn unless a later step uses them, as experts of a mixture"
            )

    def diverged(
        self, step: int, loss: float, norm: float, micro_batches: list[list[int]]
    ) -> TrainingDiverged:
        """The error that says where the loss was lost, and what to try."""
        kept = self.folder is not None and checkpoint.exists(self.folder)
        where = f"the last good checkpoint is in {self.folder}" if kept else "there is no checkpoint"
        left_out = set(self.history.left_out)
        numbers = [i for i in range(len(self.examples) + len(left_out)) if i not in left_out]
        records = [[numbers[i] for i in indices] for indices in micro_batches]
        message = (
            f"loss {loss} with gradient norm {norm} at step {step + 1} of {self.total}, records {records}; the weights "
            f"are those of step {step}, and {where}. Try a lower lr (now {self.config.lr:g}), clip=1.0, or a warm-up"
        )
        return TrainingDiverged(message, self.history, self.folder if kept else None)

    def after_step(self) -> None:
        """Held-out loss, early stop and checkpoint, where they are due."""
        if self.evaluation_is_due():
            self.evaluate()
            self.kept = 0
        every, stopping = self.config.checkpoint_every, self.history.stopped != "finished"
        if self.done % every == 0 or self.done == self.total or stopping:
            self.keep()

    def keep(self) -> None:
        """Write a checkpoint of the steps done, unless there is one; if it cannot be written, say so."""
        if self.folder is None or self.done == self.kept:
            return
        before, self.kept = self.kept, self.done
        try:
            with held_back():
                checkpoint.save(
                    self.folder,
                    self.identity,
                    self.done,
                    self.parameters,
                    self.optimizer,
                    self.history,
                    self.best,
                    self.random_state,
                )
        except CannotWrite as error:
            self.kept = before
            say(
                f"no checkpoint after step {self.done} of {self.total}: {error}. The model keeps what it has learned, and "
                "training goes on"
            )

    def evaluation_is_due(self) -> bool:
        """Is the held-out loss to be measured after the steps done, and is not yet?"""
        every = self.config.eval_every
        if not every or not self.done or not (self.done % every == 0 or self.done == self.total):
            return False
        return not any(record["step"] == self.done for record in self.history.evals)

    def evaluate(self) -> None:
        """Measure the held-out loss; with patience, keep the best weights, and stop if none is new."""
        # four times the batch: nothing is kept for a backward pass
        loss, tokens = loss_of_examples(self.model, self.held_out, self.pad_id, 4 * self.config.batch_size)
        self.history.evals.append(EvaluationRecord(step=self.done, loss=loss, tokens=tokens))
        if self.config.patience:
            if self.best is None or loss < self.best.loss:
                weights = {name: p.detach().clone() for name, p in self.parameters.items()}
                self.best = BestWeights(loss, weights)
            losses = [record["loss"] for record in self.history.evals]
            if len(losses) - 1 - losses.index(min(losses)) >= self.config.patience:
                self.history.stopped = "early"
        self.control.report()

    def restore_best(self) -> None:
        """Put the weights of the lowest held-out loss back into the model."""
        with torch.no_grad():
            for name, value in self.best.weights.items():
                self.parameters[name].copy_(value)

    def resume(self) -> None:
        """Go on from the checkpoint of this very run, if there is one."""
        if self.folder is None or not checkpoint.exists(self.folder):
            return
        self.done, history, self.best = checkpoint.load(
            self.folder, self.identity, self.parameters, self.optimizer
        )
        self.kept = self.done
        self.history.steps, self.history.evals = history.steps, history.evals
        self.history.stopped = "early" if history.stopped == "early" else "finished"
        self.without_gradient = set(history.without_gradient)
        self.history.without_gradient = history.without_gradient
