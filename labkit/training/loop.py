"""One training loop for full fine-tuning, LoRA and QLoRA: it trains whatever parameters ask for a gradient.

A step: forward, mean loss over the supervised tokens, backward, clip, AdamW. Three things in it are easily got wrong.

- *Logits only where they count*: `labkit.training.loss`.
- *Accumulation.* The loss of a step is the sum over all its supervised tokens divided by their number in the whole
  step. The mean of the means of micro-batches is another number when their lengths differ.
- *Checkpointing over a frozen base.* The re-entrant kind looks for an input that requires a gradient, finds none in
  a frozen embedding, and trains nothing. The non-re-entrant kind, used here, does not look.

Source: AdamW (Loshchilov & Hutter 2017); gradient checkpointing (Chen et al. 2016).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.data.batches import collate, endless_batches
from labkit.data.encoding import encode_all, fingerprint
from labkit.optim.paging import detach_paging
from labkit.training import checkpoint
from labkit.training.config import TrainConfig, learning_rate
from labkit.training.history import History, TrainingDiverged
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
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient; call add_lora, or unfreeze some")
    run = _Run(model, parameters, examples, held_out_examples, tokenizer.pad_token_id or 0, config)
    run.history.left_out = left_out
    return run.train()


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self, model, parameters: dict[str, nn.Parameter], examples, held_out, pad_id: int, config: TrainConfig
    ):
        self.model, self.parameters, self.examples, self.held_out = model, parameters, examples, held_out
        self.pad_id, self.config, self.history = pad_id, config, History()
        self.total = config.total_steps(len(examples))
        self.device = next(iter(parameters.values())).device
        adam = dict(betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
        self.optimizer = make_optimizer(
            config.optimizer,
            parameter_groups(model, config.lr, config.lora_plus),
            config.state_budget_bytes,
            **adam,
        )
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.folder = None if config.checkpoint_folder is None else Path(config.checkpoint_folder)
        # what must be the same for a run to go on where another stopped
        same = {
            k: v
            for k, v in asdict(config).items()
            if k not in ("checkpoint_folder", "checkpoint_every", "progress", "state_budget_bytes")
        }
        self.identity = {
            **same,
            "betas": list(config.betas),
            "data": fingerprint(examples),
            "total": self.total,
        }

    def train(self) -> History:
        config, model = self.config, self.model
        was_training = model.training
        model.train()
        torch.manual_seed(config.seed)
        first = self.resume()
        lengths = [len(example) for example in self.examples]
        batches = endless_batches(lengths, config.batch_size, config.seed)
        batches = islice(batches, first * config.accumulation, None)
        if config.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        bar = tqdm(total=self.total, initial=first, desc="train", unit="step", disable=not config.progress)
        try:
            for step in range(first, self.total):
                if self.history.stopped != "finished":
                    break
                self.step(step, list(islice(batches, config.accumulation)))
                self.after_step(step)
                row = self.history.steps[-1]
                bar.set_postfix(
                    loss=f"{row['loss']:.3f}", tok_s=f"{self.history.tokens_per_second:.0f}", refresh=False
                )
                bar.update()
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
        finally:
            bar.close()
            if config.checkpointing:
                model.activation_checkpointing_disable()
            model.train(was_training)
            self.optimizer.zero_grad(set_to_none=True)
            detach_paging(self.optimizer, keep_state=False)
        if config.patience and self.best:
            self.restore_best()
        return self.history

    def step(self, step: int, micro_batches: list[list[int]]) -> None:
        """One optimizer step over the examples of `micro_batches`, and its row of the history."""
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
            raise TrainingDiverged(
                self.diverged_message(step, loss, norm, micro_batches), self.history, self.folder
            )
        self.optimizer.step()
        tokens = sum(len(self.examples[i]) for indices in micro_batches for i in indices)
        seconds = time.perf_counter() - started
        row = dict(
            step=step + 1,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=tokens,
            supervised=supervised,
            seconds=seconds,
        )
        self.history.steps.append(row)

    def diverged_message(self, step: int, loss: float, norm: float, micro_batches: list[list[int]]) -> str:
        kept = (
            f"the last good checkpoint is in {self.folder}" if self.folder else "no checkpoint_folder was set"
        )
        return (
            f"loss {loss} with gradient norm {norm} at step {step + 1} of {self.total}, examples {micro_batches}; the "
            f"weights are those of step {step}, and {kept}. Try a lower lr (now {self.config.lr:g}), clip=1.0, or a warm-up"
        )

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
        from labkit.training.evaluate import loss_of_examples

        # four times the batch: nothing is kept for a backward pass
        loss, tokens = loss_of_examples(self.model, self.held_out, self.pad_id, 4 * self.config.batch_size)
        self.history.evals.append(dict(step=step + 1, loss=loss, tokens=tokens))
        if self.config.patience:
            if self.best is None or loss < self.best[0]:
                self.best = (loss, {name: p.detach().clone() for name, p in self.parameters.items()})
            since = [row["loss"] for row in self.history.evals]
            if len(since) - 1 - since.index(min(since)) >= self.config.patience:
                self.history.stopped = "early"

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, value in self.best[1].items():
                self.parameters[name].copy_(value)

    def resume(self) -> int:
        """Load the checkpoint of this very run, if there is one; the number of steps that it had done."""
        if self.folder is None or not checkpoint.exists(self.folder):
            return 0
        done, self.history, self.best = checkpoint.load(
            self.folder, self.identity, self.parameters, self.optimizer
        )
        return done
