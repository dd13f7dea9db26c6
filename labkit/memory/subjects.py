"""What to take a step with, to measure it: a real model for a setup, and a batch of random tokens."""

import torch
from torch import nn

from labkit.data.batches import IGNORE, Batch
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.memory.setup import DTYPES, Setup
from labkit.models.loading import load
from labkit.quant.model import quantize_model


def make_batch(
    vocabulary: int, batch_size: int, max_length: int, supervised: float = 1.0, seed: int = 0
) -> Batch:
    """Random tokens; the last positions of each example are supervised, `Setup.per_example` of them."""
    setup = Setup(batch_size=batch_size, max_length=max_length, supervised=supervised)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch_size, max_length), generator=generator)
    targets = ids.clone()
    targets[:, : max_length - setup.per_example] = IGNORE
    return Batch(ids, targets)


def real_model(name: str, setup: Setup) -> nn.Module:
    """A base model, quantized and adapted as `setup` says: what `plan` and `simulate` are about."""
    model, _ = load(name, dtype=DTYPES[setup.dtype])
    if setup.method == "qlora":
        quantize_model(model, setup.quantization, progress=False)
    if setup.method != "full":
        add_lora(model, LoRAConfig(r=setup.r, targets=setup.targets))
    return model.requires_grad_(True) if setup.method == "full" else model
