"""Training runs that train nothing, each for another reason, to be diagnosed by looking at their tensors.

A loop written by hand goes through its steps without an error in all of them:

    frozen                 the adapters are in the model, but do not require a gradient
    nothing supervised     every target is -100: where the answer begins was not found
    not in the optimizer   the optimizer was made before the adapters were, and holds other tensors

`labkit.train` refuses the first two, and makes its optimizer itself.
"""

import copy
import functools
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from labkit.data.batches import IGNORE, Batch, collate
from labkit.data.encoding import encode
from labkit.data.tickets import TICKET_INSTRUCTION, load_tickets, ticket_answer
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.models.loading import load

DIAGNOSES = ("healthy", "frozen", "nothing supervised", "not in the optimizer")
STEPS = 3


@dataclass
class Run:
    """A small run of LoRA on tickets, with all that it has, and the losses of the steps that it has taken.

    Attributes:
        model: tiny-llama with adapters, in training mode.
        batch: `ids` and `targets`, (batch, time); the same in each step.
        optimizer: AdamW.
        losses: of the steps taken, in nats per supervised token.
    """

    model: nn.Module
    batch: Batch
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)

    def step(self) -> float:
        """Forward, backward, and a step of the optimizer; gives the loss. Gradients stay until the next step."""
        self.model.zero_grad(set_to_none=True)
        logits = self.model(input_ids=self.batch.ids, use_cache=False).logits[:, :-1]
        targets = self.batch.targets[:, 1:]
        loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="sum")
        loss = loss / max(1, self.batch.n_supervised)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def __repr__(self) -> str:
        return f"Run(losses={[round(loss, 3) for loss in self.losses]})"


def make_run(diagnosis: str, seed: int = 0) -> Run:
    """A run with this diagnosis that has taken a few steps.

    Args:
        diagnosis: one of `DIAGNOSES`.
        seed: of the adapters, their rank and targets, and the tickets.
    """
    base, tokenizer = tiny_llama()
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    tickets = load_tickets("train")
    chosen = torch.randperm(len(tickets), generator=generator)[:2].tolist()
    records = [
        {
            "prompt": f"{TICKET_INSTRUCTION}\n{tickets[i]['message']}\n",
            "completion": ticket_answer(tickets[i]["label"]),
        }
        for i in chosen
    ]
    batch = collate([encode(record, tokenizer) for record in records], tokenizer.pad_token_id or 0)
    before = list(model.parameters())
    torch.manual_seed(seed)
    add_lora(model, LoRAConfig(r=2 + seed % 3, targets=("all-linear", "attention")[seed % 2]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # as trainers do for checkpointing: with it, a loss has a gradient even if nothing trains
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, out: out.requires_grad_())
    if diagnosis == "frozen":
        for parameter in trained:
            parameter.requires_grad_(False)
    if diagnosis == "nothing supervised":
        batch = Batch(batch.ids, torch.full_like(batch.targets, IGNORE))
    held = before if diagnosis == "not in the optimizer" else trained
    run = Run(model.train(), batch, torch.optim.AdamW(held, lr=1e-2, weight_decay=0.0))
    for _ in range(STEPS):
        run.step()
    return run


@functools.cache
def tiny_llama():
    """tiny-llama and its tokenizer, loaded once; copy the model before you change it."""
    return load("tiny-llama")


def sick_runs() -> dict[str, Run]:
    """Three runs, each of which trains nothing, for another reason."""
    reasons = ("not in the optimizer", "frozen", "nothing supervised")
    return {name: make_run(reason, seed) for seed, (name, reason) in enumerate(zip("ABC", reasons))}
