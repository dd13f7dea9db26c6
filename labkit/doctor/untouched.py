"""The patient leaves as it came: modes, gradients and the state of the random generators are put back.

The weights need no putting back, since no probe takes a step; that they are the same is tested by their fingerprint.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from labkit.training.readiness import own_modes


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within the block gradients are taken anew, and modes may change; afterwards all is as before."""
    before = [(p, p.grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in before if p.device.type == "cuda"})
    with own_modes(model), torch.random.fork_rng(devices=devices):
        try:
            for parameter, _ in before:
                parameter.grad = None
            yield
        finally:
            for parameter, grad in before:
                parameter.grad = grad
