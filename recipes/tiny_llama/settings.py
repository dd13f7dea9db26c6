"""What decides the weights of tiny-llama: its architecture, the plan of its training, and the data of each
step.

Each epoch cuts the token stream into windows at another offset and shuffles them; both follow from (seed,
epoch) alone, so step k sees the same tokens whether or not the run was interrupted. The learning rate is
warm-up, stable, decay (WSD; Hu et al. 2024, arXiv:2404.06395): a linear warm-up, then constant, then linear
to zero over the last `decay` of the budget. As the stable phase does not know where it ends, a resumed run
may be given another budget, as long as its decay has not begun. AdamW has the settings of Llama (Touvron et
al. 2023).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ARCHITECTURE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@dataclass(frozen=True)
class Plan:
    """What decides the result: with the same plan, text and machine, the weights come out the same."""

    tokens: int = 8_400_000
    batch: int = 4
    context: int = 512
    lr: float = 3e-3
    warmup: int = 100  # steps
    decay: float = 0.25  # share of the budget
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    compile: bool = False
    bf16: bool = False  # matrix products in bfloat16; weights, gradients, moments and the loss stay fp32

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.context)

    @property
    def decay_from(self) -> int:
        return self.steps - round(self.decay * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        up = min(1.0, (step + 1) / self.warmup)
        down = min(1.0, (self.steps - step) / max(1, self.steps - self.decay_from))
        return self.lr * up * down


def windows(stream: np.ndarray, plan: Plan, step: int) -> Tensor:
    """The token ids (batch, context + 1) of a step: a function of the plan and the step only."""
    # steps; one window is spare, for the offset
    per_epoch = (len(stream) - plan.context - 1) // plan.context // plan.batch
    if per_epoch < 1:
        raise ValueError(
            f"{len(stream)} tokens are too few for a batch of {plan.batch} windows of {plan.context}"
        )
    epoch, place = divmod(step, per_epoch)
    random = np.random.default_rng([plan.seed, epoch])
    offset = random.integers(plan.context)
    chosen = random.permutation(per_epoch * plan.batch)[place * plan.batch : (place + 1) * plan.batch]
    starts = offset + chosen * plan.context
    return torch.from_numpy(np.stack([stream[s : s + plan.context + 1] for s in starts]).astype(np.int64))


def make_model(architecture: dict, seed: int) -> LlamaForCausalLM:
    """The model before training, in fp32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**architecture)).float()


def make_optimizer(model: LlamaForCausalLM, plan: Plan) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, fused=True)
