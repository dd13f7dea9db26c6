"""A run that ends itself with SIGKILL in the middle of a step, when told to: see `test_checkpoint.py`."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from labkit import models
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.quant.model import quantize_model
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from tests.conftest import make_small_llama

ACCUMULATED = 2


def run(folder: Path, last_step: int | None = None) -> list:
    """Losses, those of evaluations, and a hash of the weights, of a run in 4 bits with dropout; its checkpoints are in `folder`.

    Args:
        folder: may hold the checkpoint of a run that was killed.
        last_step: of this process, counted from its own first; killed with its first gradient made, and its second not.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models.fetch("smollm2-135m"))
    model = make_small_llama()
    quantize_model(model, progress=False)
    torch.manual_seed(3)
    add_lora(model, LoRAConfig(r=4, dropout=0.1))
    if last_step:
        kill_in_step(model, last_step)
    records = [ticket_chat(t) for t in load_tickets("train")[:16]]
    settings = {"lr": 1e-2, "steps": 16, "batch_size": 2, "accumulation": ACCUMULATED, "eval_every": 5}
    config = TrainConfig(**settings, progress=False, checkpoint_folder=folder, checkpoint_every=4)
    history = train(model, tokenizer, records, config, held_out=records[:4])
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return [
        history.losses,
        [e["loss"] for e in history.evals],
        hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    ]


def kill_in_step(model: torch.nn.Module, step: int) -> None:
    """End this process in the last forward pass of that step."""
    passed = []

    def count(module, *_):
        passed.extend([1] * module.training)
        if len(passed) == step * ACCUMULATED:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.norm.register_forward_hook(count)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the numbers depend on it
    print(run(Path(sys.argv[1]), int(sys.argv[2])))
