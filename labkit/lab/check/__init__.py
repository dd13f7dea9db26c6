"""Exercise checks: `check.<name>(your_function)` tries it on fresh inputs, and names the mistake that it looks like."""

from labkit.lab.check.compare import NotYet
from labkit.lab.check.lora import greedy_token, lora_forward, lora_parameters, supervise, training_flops
from labkit.lab.check.quantization import bits_per_weight, weight_bytes

__all__ = [
    "NotYet",
    "bits_per_weight",
    "greedy_token",
    "lora_forward",
    "lora_parameters",
    "supervise",
    "training_flops",
    "weight_bytes",
]
