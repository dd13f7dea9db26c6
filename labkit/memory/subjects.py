"""What to take a step with, to measure it: a real model for a set-up, and a batch of random tokens."""

import torch
from torch import nn

from labkit.data.batches import Batch
from labkit.memory.setup import DTYPES, Setup


def make_batch(vocabulary: int, batch: int, sequence: int, supervised: float = 1.0, seed: int = 0) -> Batch:
    """Random tokens, of which the last positions of each example are supervised, as many as `Setup.per_example` says."""
    setup = Setup(batch=batch, sequence=sequence, supervised=supervised)
    ids = torch.randint(0, vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(seed))
    targets = ids.clone()
    targets[:, : sequence - setup.per_example] = -100
    return Batch(ids, targets)


def real_model(name: str, setup: Setup) -> nn.Module:
    """A base model, quantized and adapted as `setup` says: the real thing that `plan` and `simulate` are about."""
    from labkit.lora.config import LoRAConfig
    from labkit.lora.inject import add_lora
    from labkit.models.loading import load
    from labkit.quant.model import quantize_model

    model, _ = load(name, dtype=DTYPES[setup.dtype])
    if setup.method == "qlora":
        compute = setup.compute_dtype and DTYPES[setup.compute_dtype]
        quantize_model(
            model,
            blocksize=setup.blocksize,
            double_quant=setup.double_quant,
            progress=False,
            compute_dtype=compute,
        )
    if setup.method != "full":
        add_lora(model, LoRAConfig(r=setup.rank, targets=setup.targets))
    return model.requires_grad_(True) if setup.method == "full" else model
